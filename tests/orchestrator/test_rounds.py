"""The orchestrator's rules: no silent device delays a round for ever, no result counts twice."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import CohortConfig
from orchestrator.rules import rounds
from orchestrator.rules.rounds import (
    Aggregate,
    Finish,
    GiveUp,
    Open,
    Phase,
    Remind,
    RoundState,
    Session,
)

RULES = CohortConfig(min_devices=2, wait_s=10.0, quorum=1.0, deadline_s=100.0)


def collecting(*devices: str, rules: CohortConfig = RULES, last: int = 2) -> RoundState:
    state = RoundState(rounds=last, seed=0)
    for device in devices:
        state, _ = rounds.born(state, rules, device, Session(1), 0.0)
    state, actions = rounds.ticked(state, rules, 10.0)
    assert actions == (Open(1, frozenset(devices)),)
    return state


def test_a_cohort_waits_for_the_minimum_and_then_for_latecomers():
    state = RoundState(rounds=1, seed=0)
    state, actions = rounds.born(state, RULES, "a", Session(1), 0.0)
    assert actions == ()
    assert rounds.ticked(state, RULES, 1e6)[1] == ()
    state, actions = rounds.born(state, RULES, "b", Session(1), 50.0)
    assert actions == ()
    state, actions = rounds.born(state, RULES, "c", Session(1), 55.0)
    assert actions == ()
    assert rounds.ticked(state, RULES, 60.0)[1] == (Open(1, frozenset("abc")),)


def test_a_full_cohort_does_not_wait_and_is_the_same_for_the_same_seed():
    rules = CohortConfig(min_devices=2, max_devices=2, wait_s=1e9)
    state, _ = rounds.born(RoundState(rounds=1, seed=0), rules, "a", Session(1), 0.0)
    _, actions = rounds.born(state, rules, "b", Session(1), 0.0)
    assert actions == (Open(1, frozenset("ab")),)
    many = {f"d{i}": 1 for i in range(50)}
    assert rounds.choose(many, 10, 3, 1) == rounds.choose(dict(reversed(many.items())), 10, 3, 1)
    assert len(rounds.choose(many, 10, 3, 1)) == 10
    assert rounds.choose(many, 10, 3, 1) != rounds.choose(many, 10, 3, 2)


def test_the_round_closes_when_all_have_returned_and_the_last_one_finishes():
    state = collecting("a", "b", last=1)
    state, actions = rounds.returned(state, RULES, "a", 20.0)
    assert actions == ()
    state, actions = rounds.returned(state, RULES, "b", 21.0)
    assert actions == (Aggregate(1, frozenset("ab")),)
    state, actions = rounds.aggregated(state, RULES, 22.0)
    assert actions == (Finish(),)
    assert state.phase is Phase.FINISHED


def test_a_quorum_closes_the_round_without_the_slowest():
    rules = CohortConfig(min_devices=3, wait_s=10.0, quorum=0.66, deadline_s=100.0)
    state = collecting("a", "b", "c", rules=rules)
    state, _ = rounds.returned(state, rules, "a", 20.0)
    _, actions = rounds.returned(state, rules, "c", 20.0)
    assert actions == (Aggregate(1, frozenset("ac")),)


def test_one_silent_device_delays_no_longer_than_the_deadline():
    state, _ = rounds.returned(collecting("a", "b"), RULES, "a", 20.0)
    assert rounds.ticked(state, RULES, 109.9)[1] == ()
    assert rounds.ticked(state, RULES, 110.0)[1] == (Aggregate(1, frozenset("a")),)


def test_a_fault_does_not_hold_the_round():
    state, _ = rounds.returned(collecting("a", "b"), RULES, "a", 20.0)
    _, actions = rounds.failed(state, RULES, "b", 21.0)
    assert actions == (Aggregate(1, frozenset("a")),)


@pytest.mark.parametrize("rules", [RULES, CohortConfig(min_devices=2, max_devices=2, wait_s=10)])
def test_a_round_in_which_all_fail_is_formed_again_after_a_pause(rules):
    state, _ = rounds.failed(collecting("a", "b"), rules, "a", 20.0)
    state, actions = rounds.failed(state, rules, "b", 21.0)
    assert actions == ()
    assert rounds.ticked(state, rules, 22.0)[1] == ()
    assert rounds.ticked(state, rules, 31.0)[1] == (Open(1, frozenset("ab")),)


def failing(state: RoundState, rules: CohortConfig, now_s: float) -> tuple[RoundState, tuple]:
    """Every device of the open round fails."""
    for device in sorted(state.cohort):
        state, actions = rounds.failed(state, rules, device, now_s)
    return state, actions


def test_the_run_gives_up_after_three_rounds_in_which_all_failed():
    state = collecting("a", "b")
    for now_s in (20.0, 40.0):
        state, actions = failing(state, RULES, now_s)
        assert actions == ()
        state, actions = rounds.ticked(state, RULES, now_s + 15)
        assert actions == (Open(1, frozenset("ab")),)
    assert failing(state, RULES, 60.0)[1] == (GiveUp(1),)


def test_a_round_that_is_closed_and_a_silent_one_do_not_count_as_failed():
    state, _ = failing(collecting("a", "b"), RULES, 20.0)
    state, _ = rounds.ticked(state, RULES, 40.0)
    state, _ = rounds.failed(state, RULES, "a", 50.0)
    state, actions = rounds.ticked(state, RULES, 140.0)  # b never answered
    assert (state.retries, state.fruitless, actions) == (2, 0, ())
    state, _ = rounds.ticked(state, RULES, 160.0)
    for device in "ab":
        state, _ = rounds.returned(state, RULES, device, 170.0)
    assert rounds.aggregated(state, RULES, 180.0)[0].fruitless == 0


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("silent", [False, True])
def test_further_attempts_ask_devices_that_were_not_asked_before(seed, silent):
    rules = CohortConfig(min_devices=2, max_devices=2, wait_s=10.0, deadline_s=100.0)
    state, asked = (
        replace(RoundState(rounds=1, seed=seed), live={f"d{i}": Session(1) for i in range(7)}),
        [],
    )
    for attempt in range(4):
        state, actions = rounds.ticked(state, rules, 1000.0 * attempt)
        assert actions == (Open(1, state.cohort),)
        asked += sorted(state.cohort)
        if silent:
            state, actions = rounds.ticked(state, rules, 1000.0 * attempt + 100)
        else:
            state, actions = failing(state, rules, 1000.0 * attempt + 20)
    assert len(set(asked[:6])) == 6
    assert set(asked) == set(state.live)
    assert actions == (() if silent else (GiveUp(1),))


def test_one_bad_device_among_good_ones_does_not_end_the_run():
    rules = CohortConfig(min_devices=1, max_devices=1, wait_s=0.0)
    for seed in range(50):
        state, now_s = (
            replace(RoundState(rounds=1, seed=seed), live={"bad": Session(1), "good": Session(1)}),
            0.0,
        )
        while state.phase is not Phase.AGGREGATING:
            now_s += 20
            state, actions = rounds.ticked(state, rules, now_s)
            assert actions == (Open(1, state.cohort),)
            end = rounds.failed if "bad" in state.cohort else rounds.returned
            state, actions = end(state, rules, *state.cohort, now_s + 1)
            assert GiveUp(1) not in actions


def test_a_name_that_was_not_asked_closes_no_round():
    state = collecting("a", "b")
    for stranger in ("c", "d"):
        assert rounds.failed(state, RULES, stranger, 20.0) == (state, ())
        assert rounds.returned(state, RULES, stranger, 20.0) == (state, ())


def test_a_device_that_comes_back_gets_its_order_again_unless_it_has_returned():
    state = collecting("a", "b")
    state, _ = rounds.died(state, "a", Session(1))
    assert "a" not in state.live
    state, actions = rounds.born(state, RULES, "a", Session(2), 30.0)
    assert actions == (Remind("a"),)
    state, _ = rounds.returned(state, RULES, "a", 31.0)
    assert rounds.born(state, RULES, "a", Session(3), 32.0)[1] == ()


def test_the_will_of_an_old_session_does_not_end_a_new_one():
    state, _ = rounds.born(collecting("a", "b"), RULES, "a", Session(7), 20.0)
    assert rounds.died(state, "a", Session(6)) == (state, ())
    late, actions = rounds.born(state, RULES, "a", Session(5), 21.0)
    assert (late, actions) == (state, ())
    assert "a" not in rounds.died(state, "a", Session(7))[0].live


def test_a_device_with_an_empty_card_is_in_a_newer_life_and_gets_its_order_again():
    state, _ = rounds.born(collecting("a", "b"), RULES, "a", Session(900, "ab"), 20.0)
    state, actions = rounds.born(state, RULES, "a", Session(1, "cd"), 30.0)
    assert actions == (Remind("a"),)
    assert rounds.died(state, "a", Session(900, "ab")) == (state, ())  # the old life's will
    assert rounds.died(state, "a", Session(1, "ef")) == (state, ())
    state, _ = rounds.born(state, RULES, "a", Session(7, "cd"), 40.0)
    assert rounds.born(state, RULES, "a", Session(6, "cd"), 41.0) == (state, ())  # late
    assert "a" not in rounds.died(state, "a", Session(7, "cd"))[0].live


def test_agents_that_name_no_state_folder_are_judged_by_their_numbers_as_ever():
    state, _ = rounds.born(collecting("a", "b"), RULES, "a", Session(7), 20.0)
    assert rounds.born(state, RULES, "a", Session(6), 21.0) == (state, ())
    state, actions = rounds.born(state, RULES, "a", Session(1, "ab"), 22.0)  # it was updated
    assert actions == (Remind("a"),)
    assert rounds.born(state, RULES, "a", Session(8), 23.0)[1] == (Remind("a"),)  # rolled back


def test_a_newcomer_waits_for_the_next_round():
    state, actions = rounds.born(collecting("a", "b"), RULES, "c", Session(1), 20.0)
    assert actions == ()
    for device in "ab":
        state, _ = rounds.returned(state, RULES, device, 30.0)
    _, actions = rounds.aggregated(state, RULES, 40.0)
    assert actions == (Open(2, frozenset("abc")),)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["born", "died", "returned", "failed", "tick", "aggregated"]),
        st.sampled_from("abcd"),
        st.integers(1, 3),
        st.floats(0, 60),
    ),
    max_size=80,
)


@given(EVENTS, st.sampled_from([RULES, replace(RULES, quorum=0.5, carry_rounds=2)]))
def test_whatever_happens_rounds_go_up_by_one_and_close_only_with_results(events, rules):
    state, now, opened, closed = RoundState(rounds=3, seed=0), 0.0, 0, 0
    for kind, device, session, pause in events:
        now += pause
        if kind in ("returned", "failed") and (
            state.phase is not Phase.COLLECTING
            or device not in state.cohort - state.returned - state.failed
        ):
            continue  # the coordinator never passes such events on
        if kind == "aggregated" and state.phase is not Phase.AGGREGATING:
            continue
        state, actions = {
            "born": lambda s, d=device, n=session, t=now: rounds.born(s, rules, d, Session(n), t),
            "died": lambda s, d=device, n=session: rounds.died(s, d, Session(n)),
            "returned": lambda s, d=device, t=now: rounds.returned(s, rules, d, t),
            "failed": lambda s, d=device, t=now: rounds.failed(s, rules, d, t),
            "tick": lambda s, t=now: rounds.ticked(s, rules, t),
            "aggregated": lambda s, t=now: rounds.aggregated(s, rules, t),
        }[kind](state)
        for action in actions:
            if isinstance(action, Open):
                opened = action.round
                assert opened == closed + 1
                assert len(action.cohort) >= rules.min_devices
            if isinstance(action, Aggregate):
                closed = action.round
                assert closed == opened
                assert action.returned
                assert action.returned <= state.cohort
                assert state.ages.keys() <= state.cohort - state.returned - state.failed
                assert max(state.ages.values(), default=0) <= rules.carry_rounds


ASYNC = CohortConfig(min_devices=2, wait_s=10.0, quorum=0.6, deadline_s=100.0, carry_rounds=1)


def test_a_late_device_keeps_its_order_and_counts_in_the_round_after():
    state = collecting("a", "b", "c", rules=ASYNC, last=3)
    state, _ = rounds.returned(state, ASYNC, "a", 1.0)
    state, actions = rounds.returned(state, ASYNC, "b", 2.0)
    assert actions == (Aggregate(1, frozenset("ab")),)
    assert state.ages == {"c": 1}
    state, actions = rounds.aggregated(state, ASYNC, 3.0)
    assert actions == (Open(2, frozenset("abc")),)
    # At its new birth it is reminded of its order, and its answer closes the round.
    state, actions = rounds.born(state, ASYNC, "c", Session(2), 4.0)
    assert actions == (Remind("c"),)
    state, _ = rounds.returned(state, ASYNC, "c", 5.0)
    state, actions = rounds.returned(state, ASYNC, "a", 6.0)
    assert actions == (Aggregate(2, frozenset("ac")),)
    assert state.ages == {"b": 1}


def test_an_order_is_carried_no_longer_than_the_rules_say():
    state = collecting("a", "b", "c", rules=ASYNC, last=9)
    for number in (1, 2):
        for device in "ab":
            state, actions = rounds.returned(state, ASYNC, device, 20.0)
        assert actions == (Aggregate(number, frozenset("ab")),)
        assert state.ages == ({"c": 1} if number == 1 else {})
        state, _ = rounds.aggregated(state, ASYNC, 21.0)
    assert state.cohort == frozenset("abc")  # it is given a new order


def test_carried_devices_take_the_places_of_new_ones():
    rules = replace(ASYNC, max_devices=2, quorum=0.5)
    state = replace(
        RoundState(rounds=9, seed=0), live=dict.fromkeys("abcde", Session(1)), ready_at_s=0.0
    )
    state, actions = rounds.ticked(state, rules, 1.0)
    (opened,) = actions
    first, second = sorted(opened.cohort)
    state, _ = rounds.returned(state, rules, first, 2.0)
    state, actions = rounds.aggregated(state, rules, 3.0)
    (opened,) = actions
    assert len(opened.cohort) == 2
    assert second in opened.cohort


def test_a_device_that_is_gone_with_an_earlier_order_is_not_waited_for():
    rules = replace(ASYNC, quorum=1.0, carry_rounds=3)
    state = collecting("a", "b", "c", rules=rules, last=9)
    state, _ = rounds.died(state, "c", Session(1))
    for device in "ab":
        state, _ = rounds.returned(state, rules, device, 20.0)
    state, actions = rounds.ticked(state, rules, 110.0)  # the first time, it may still come back
    assert actions == (Aggregate(1, frozenset("ab")),)
    state, _ = rounds.aggregated(state, rules, 111.0)
    for device in "ab":
        state, actions = rounds.returned(state, rules, device, 112.0)
    assert actions == (Aggregate(2, frozenset("ab")),)
    assert state.ages == {"c": 2}
    # And if all others fail, the run gives up.
    state, actions = rounds.aggregated(state, rules, 113.0)
    for now in (120.0, 140.0, 160.0):
        assert actions == (Open(3, state.cohort),)
        for device in "ab":
            state, actions = rounds.failed(state, rules, device, now)
        if now < 160:
            assert actions == ()
            state, actions = rounds.ticked(state, rules, now + 11)
    assert actions == (GiveUp(3),)


def test_a_failed_order_is_not_carried():
    state = collecting("a", "b", "c", rules=ASYNC, last=9)
    state, _ = rounds.failed(state, ASYNC, "c", 19.0)
    for device in "ab":
        state, _ = rounds.returned(state, ASYNC, device, 20.0)
    assert state.ages == {}


def test_an_order_that_was_carried_is_not_waited_for_when_its_device_lost_it():
    """Between two rounds the order is not sent again; the device is free for the next round's."""
    state = replace(
        RoundState(rounds=9, seed=0, round=1),
        live={name: Session(5, "ab") for name in "abc"},
        state_ids=dict.fromkeys("abc", "ab"),
        ages={"c": 1},
        ready_at_s=1e9,
    )
    same, _ = rounds.born(state, ASYNC, "c", Session(6, "ab"), 1.0)
    assert same.ages == {"c": 1}
    anew, _ = rounds.born(state, ASYNC, "c", Session(1, "cd"), 1.0)
    assert anew.ages == {}


def test_a_round_whose_devices_are_all_gone_is_not_one_in_which_all_failed():
    rules = CohortConfig(min_devices=1, max_devices=1, wait_s=0.0, carry_rounds=9)
    state = replace(
        RoundState(rounds=9, seed=0, round=1, phase=Phase.COLLECTING, fruitless=2),
        cohort=frozenset("a"),
        ages={"a": 1},
        state_ids={"a": "ab"},
        deadline_s=100.0,
    )
    state, actions = rounds.ticked(state, rules, 1.0)
    assert (state.phase, state.fruitless, actions) == (Phase.FORMING, 0, ())


def test_after_a_restart_the_devices_with_earlier_orders_are_waited_for_until_they_are_heard():
    rules = replace(ASYNC, quorum=1.0, carry_rounds=3)
    state = replace(
        RoundState(rounds=9, seed=0, round=2, phase=Phase.COLLECTING),
        cohort=frozenset("abc"),
        ages={"c": 1},
        returned=frozenset("ab"),
        deadline_s=100.0,
    )
    assert rounds.ticked(state, rules, 1.0)[1] == (), "nobody has been heard yet"
    assert rounds.ticked(state, rules, 100.0)[1] == (Aggregate(2, frozenset("ab")),)
    state, actions = rounds.born(state, rules, "c", Session(1), 2.0)
    assert actions == (Remind("c"),)
    state, _ = rounds.died(state, "c", Session(1))
    assert rounds.ticked(state, rules, 3.0)[1] == (Aggregate(2, frozenset("ab")),)
