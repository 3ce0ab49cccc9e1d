"""A result is journalled before its receipt, its first verdict stands, and no order is lost."""

from dataclasses import replace

import pytest

from orchestrator.config import CohortConfig
from orchestrator.rules import open_round, rounds
from orchestrator.rules.attempt import MAX_REASON, Attempt, Verdict
from orchestrator.rules.effects import Note, Pull, Send, Show, Warn
from orchestrator.rules.open_round import Offer, OpenRound
from orchestrator.rules.rounds import (
    Aggregate,
    Finish,
    GiveUp,
    Open,
    Phase,
    RoundState,
    Session,
)
from wire.errors import AdmissionError
from wire.messages import BlobRef, Order, Receipt, Result

RULES = CohortConfig(min_devices=2, wait_s=0.0, quorum=1.0, deadline_s=100.0, carry_rounds=1)
REF = BlobRef("ab" * 32, 1000, 1024)
LIMITS = {"update": 2000}
FRESH = RoundState(rounds=3, seed=0)
BAD = AdmissionError("norm 1e9, limit 100; training diverged")


def order(sequence: int, round_: int | None = None) -> Order:
    return Order("run", sequence, round_ or sequence, REF, 1, 0.1, 7, {"update": "float32"}, REF)


def result(device: str, sequence: int = 1, **more) -> Result:
    return Result(device, "run", sequence, sequence, 10, blobs={"update": REF}, **more)


def offer(result: Result, device: str | None = None) -> Offer:
    return Offer(device or result.device, result, 10, LIMITS)


def collecting(*devices: str) -> OpenRound:
    """A round 1 that is open, in which each device has its order."""
    now = OpenRound(replace(FRESH, live=dict.fromkeys(devices, Session(1)), ready_at_s=0.0))
    now, effects = open_round.follow(now, rounds.ticked(now.state, RULES, 0.0))
    assert effects == (Open(1, frozenset(devices)),)
    orders = {device: order(1) for device in devices}
    now, effects = open_round.begun(now, Attempt(1, 1, orders, {}), RULES, 0.0)
    assert effects == tuple(Send(device, order(1)) for device in devices)
    return now


def accept(now: OpenRound, *devices: str, sequence: int = 1) -> open_round.Transition:
    effects = ()
    for device in devices:
        now, effects = open_round.decided(now, result(device, sequence), None, RULES, 1.0)
    return now, effects


def test_a_result_that_answers_the_open_order_is_pulled_and_nothing_is_said_yet():
    now = collecting("a", "b")
    assert open_round.offered(now, offer(result("a")), RULES, 1.0) == (now, (Pull(result("a")),))


def test_a_verdict_is_in_the_journal_before_the_device_is_told_and_people_see_it():
    now, effects = open_round.decided(collecting("a", "b"), result("a"), None, RULES, 1.0)
    verdict = Verdict("a", accepted=True, reason="", result=result("a"))
    receipt = Receipt("result", accepted=True, run="run", sequence=1)
    assert effects == (Note(1, verdict), Send("a", receipt), Show(verdict, None))
    assert now.state.returned == {"a"}
    assert now.attempt.verdicts == {"a": verdict}


def test_the_last_result_is_noted_and_receipted_before_the_round_is_aggregated():
    now, effects = accept(collecting("a", "b"), "b", "a")
    assert [type(effect) for effect in effects] == [Note, Send, Show, Aggregate]
    assert effects[-1] == Aggregate(1, frozenset("ab"))
    assert now.accepted == (result("a"), result("b"))
    assert now.state.phase is Phase.AGGREGATING


def test_a_result_with_a_fault_is_refused_with_its_reason_and_the_round_goes_on():
    faulty = replace(result("a"), blobs={}, fault="no memory" + "!" * 2 * MAX_REASON)
    now, effects = open_round.offered(collecting("a", "b"), offer(faulty), RULES, 1.0)
    note, told, shown = effects
    assert not note.verdict.accepted
    assert note.verdict.reason.startswith("the device could not do it: no memory")
    assert len(told.message.reason) == MAX_REASON, "the journal and the receipt have room for this"
    assert len(str(shown.fault)) > MAX_REASON, "people see all of it"
    assert now.state.failed == {"a"}
    assert accept(now, "b")[1][-1] == Aggregate(1, frozenset("b"))


@pytest.mark.parametrize("second", [None, BAD])
def test_the_first_word_on_a_result_stands(second):
    first, _ = open_round.decided(collecting("a", "b"), result("a"), None, RULES, 1.0)
    now, effects = open_round.decided(first, result("a"), second, RULES, 2.0)
    assert now == first
    assert effects == (Send("a", Receipt("result", accepted=True, run="run", sequence=1)),)


@pytest.mark.parametrize(
    ("came", "device"),
    [(result("a", sequence=7), "a"), (result("a"), "b"), (result("b"), "stranger"),
     (replace(result("a"), run="another"), "a")],
)  # fmt: skip
def test_a_result_of_no_open_order_or_in_anothers_name_is_told_so_and_fails_nobody(came, device):
    now = collecting("a", "b")
    after, (told, warned) = open_round.offered(now, offer(came, device), RULES, 1.0)
    assert after == now
    assert (told.device, told.message.accepted) == (device, False)
    assert isinstance(warned, Warn)


def test_what_was_looked_over_when_its_round_had_closed_is_left_until_it_is_offered_again():
    closed, _ = accept(collecting("a", "b"), "a", "b")
    assert open_round.decided(closed, result("a"), BAD, RULES, 2.0) == (closed, ())
    newer = replace(collecting("a", "b"), attempt=Attempt(2, 1, {"a": order(2)}, {}))
    assert open_round.decided(newer, result("a"), None, RULES, 2.0) == (newer, ())


def test_a_device_whose_payloads_are_lost_is_refused_and_one_without_an_order_is_not():
    now = collecting("a", "b")
    after, (note, told, _) = open_round.lost(now, "a", OSError("blob is gone"), RULES, 1.0)
    assert (note.verdict.reason, told.message.sequence) == ("blob is gone", 1)
    assert after.state.failed == {"a"}
    assert open_round.lost(now, "c", BAD, RULES, 1.0) == (now, ())


def test_a_result_counts_if_it_was_accepted_in_the_round_that_is_open():
    now = collecting("a", "b", "c")
    assert not now.counts(result("a")), "it was looked over, and its verdict found no room"
    now, _ = accept(now, "a")
    now, _ = open_round.lost(now, "b", BAD, RULES, 1.0)
    now, _ = open_round.decided(now, result("b"), None, RULES, 2.0)
    assert now.counts(result("a"))
    assert not now.counts(result("b")), "its device was refused while it was looked over"
    assert not now.counts(result("a", 2))


def test_the_deadline_counts_from_when_the_orders_are_given():
    """Making the orders takes a while: sub-models are cut, and blobs written."""
    now = collecting("a", "b")
    now, _ = open_round.begun(now, now.attempt, RULES, 250.0)
    assert now.state.deadline_s == 350.0


def test_a_device_that_comes_back_is_sent_the_order_that_it_has():
    now = collecting("a", "b")
    born = rounds.born(now.state, RULES, "a", Session(2), 5.0)
    assert open_round.follow(now, born)[1] == (Send("a", order(1)),)


def late() -> OpenRound:
    """Round 1 has been aggregated, and c still has its order of that round."""
    now, _ = accept(collecting("a", "b", "c"), "a", "b")
    now, effects = open_round.follow(now, rounds.ticked(now.state, RULES, 1000.0))
    assert effects == (Aggregate(1, frozenset("ab")),)
    assert now.carried == {"c": order(1)}
    return now


def test_an_order_that_is_carried_stands_in_the_next_round_and_is_sent_again():
    now, effects = open_round.aggregated(late(), RULES, 1001.0)
    assert effects == (Open(2, frozenset("abc")),)
    assert now.attempt.verdicts == {}
    orders = {**now.carried, "a": order(2), "b": order(2)}
    now, effects = open_round.begun(now, Attempt(2, 2, orders, {}), RULES, 0.0)
    assert effects == (Send("c", order(1)), Send("a", order(2)), Send("b", order(2)))
    now, effects = open_round.decided(now, result("c"), None, RULES, 1002.0)
    assert effects[0].sequence == 2, "it counts in the round that is open"
    assert effects[1].message.sequence == 1, "the device knows it by its order"


def test_a_late_result_between_two_rounds_gets_no_word_and_is_offered_again_in_the_next():
    now = late()
    assert open_round.offered(now, offer(result("c")), RULES, 1000.5) == (now, ())
    waits = replace(RULES, min_devices=9)
    forming, effects = open_round.aggregated(now, waits, 1001.0)
    assert effects == ()
    assert open_round.offered(forming, offer(result("c")), waits, 1002.0) == (forming, ())


def test_a_round_of_which_nobody_returned_keeps_carried_orders_for_its_next_attempt():
    now, _ = open_round.aggregated(late(), replace(RULES, carry_rounds=3), 1001.0)
    orders = {**now.carried, "a": order(2), "b": order(2)}
    now, _ = open_round.begun(now, Attempt(2, 2, orders, {}), RULES, 0.0)
    rules = replace(RULES, carry_rounds=3)
    now, effects = open_round.follow(now, rounds.ticked(now.state, rules, 2000.0))
    assert (now.state.phase, effects) == (Phase.FORMING, ())
    now, effects = open_round.follow(now, rounds.ticked(now.state, rules, 2100.0))
    assert (effects, now.carried) == ((Open(2, frozenset("abc")),), {"c": order(1)})


def test_a_run_that_gives_up_names_a_device_and_what_it_said():
    now = collecting("a", "b")
    now = replace(now, state=replace(now.state, fruitless=rounds.FRUITLESS - 1))
    for device in "ba":
        now, effects = open_round.decided(now, result(device), BAD, RULES, 1.0)
    assert effects[-1] == GiveUp(1)
    assert "round 1: every device that was asked failed, 3 times in a row" in now.hopeless
    assert f"a says: {BAD}" in now.hopeless


def test_the_last_round_ends_the_run():
    now, _ = accept(collecting("a", "b"), "a", "b")
    now = replace(now, state=replace(now.state, rounds=1))
    after, effects = open_round.aggregated(now, RULES, 2.0)
    assert (after.state.phase, effects) == (Phase.FINISHED, (Finish(),))


def restored(last: Attempt | None) -> OpenRound:
    return open_round.restored(last, FRESH, RULES, 500.0)


def test_a_run_that_never_opened_a_round_begins_with_the_first():
    assert restored(None) == OpenRound(FRESH)


def test_a_restart_goes_on_with_the_round_that_is_open_its_verdicts_and_its_carried_orders():
    orders = {"a": order(2), "b": order(2), "c": order(1)}
    told = {
        "a": Verdict("a", accepted=True, reason="", result=result("a", 2)),
        "b": Verdict("b", accepted=False, reason="no", result=result("b", 2)),
    }
    now = restored(Attempt(2, 2, orders, told))
    state = now.state
    assert (state.round, state.phase, state.deadline_s) == (2, Phase.COLLECTING, 600.0)
    assert (state.cohort, state.returned, state.failed) == (frozenset("abc"), {"a"}, {"b"})
    assert (state.ages, now.carried) == ({"c": 1}, {"c": order(1)})
    now, effects = open_round.decided(now, result("c"), None, RULES, 501.0)
    assert effects[-1] == Aggregate(2, frozenset("ac"))
    assert now.accepted == (result("a", 2), result("c"))


def test_a_restart_between_two_rounds_keeps_the_orders_that_are_carried():
    done = {"a": Verdict("a", accepted=True, reason="", result=result("a"))}
    now = restored(Attempt(1, 1, {"a": order(1), "c": order(1)}, done, closed=True))
    assert (now.state.round, now.state.phase) == (1, Phase.FORMING)
    assert (now.state.ages, now.carried) == ({"c": 1}, {"c": order(1)})
    assert now.attempt.verdicts == {}, "Ctrl-C tells of no results of the next round"
    too_old = Attempt(2, 2, {"c": order(1)}, {}, closed=True)
    assert restored(too_old).carried == {}


def test_a_restart_counts_how_many_attempts_an_order_has_outlived():
    """Nobody returned in two attempts at round 2, sequences 2 and 3; the third is open."""
    rules = replace(RULES, carry_rounds=3)
    orders = {"a": order(4, 2), "c": order(1)}
    now = open_round.restored(Attempt(4, 2, orders, {}), FRESH, rules, 500.0)
    assert now.state.ages == {"c": 3}
    done = Attempt(4, 2, orders, {}, closed=True)
    now = open_round.restored(done, FRESH, rules, 500.0)
    assert now.state.ages == {"a": 1}, "c has had its three rounds"


def test_a_restart_of_a_run_whose_rounds_are_done_has_nothing_to_do():
    assert restored(Attempt(3, 3, {}, {}, closed=True)).state.phase is Phase.FINISHED


def test_a_result_that_is_being_looked_over_at_the_deadline_counts():
    now, _ = accept(collecting("a", "b", "c"), "a")
    now = open_round.held_open(now, 1.0)
    assert now.state.deadline_s == 100.0, "the deadline is far"
    now = open_round.held_open(now, 101.0)
    assert open_round.follow(now, rounds.ticked(now.state, RULES, 100.5))[1] == ()
    now, effects = open_round.decided(now, result("b"), None, RULES, 100.5)
    assert Aggregate not in map(type, effects)
    _, effects = open_round.follow(now, rounds.ticked(now.state, RULES, 101.0))
    assert effects == (Aggregate(1, frozenset("ab")),)
