"""The device's rules: every order is done once, every result is offered until it is receipted."""

from dataclasses import replace

from edge_agent import rounds
from edge_agent.rounds import Accept, Fetch, Offer, Phase, RoundState, Settle, Work
from wire.messages import BlobRef, Order, Receipt, Result

REF = BlobRef("ab" * 32, 1000, 1024)
ORDER = Order("run", 3, 1, REF, 1, 0.1, 7, {"features": "float32"})
RESULT = Result("pi", "run", 3, 1, 10)
RECEIPT = Receipt("result", accepted=True, run="run", sequence=3)


def offering() -> RoundState:
    return RoundState(Phase.OFFERING, ORDER, RESULT, offer_at_s=40.0)


def test_an_order_goes_from_idle_to_receipt():
    state, actions = rounds.ordered(RoundState(), ORDER, 0.0, 30.0)
    assert actions == (Accept(ORDER), Fetch(ORDER))
    state, actions = rounds.fetched(state)
    assert actions == (Work(ORDER),)
    state, actions = rounds.worked(state, RESULT, 10.0, 30.0)
    assert actions == (Offer(RESULT),)
    state, actions = rounds.received(state, RECEIPT)
    assert actions == (Settle(RECEIPT),)
    assert state.phase is Phase.IDLE


def test_a_result_is_offered_until_it_is_receipted():
    state = offering()
    assert rounds.ticked(state, 39.9, 30.0) == (state, ())
    state, actions = rounds.ticked(state, 40.0, 30.0)
    assert actions == (Offer(RESULT),)
    assert state.offer_at_s == 70.0
    state, _ = rounds.received(state, RECEIPT)
    assert rounds.ticked(state, 1e9, 30.0)[1] == ()


def test_an_order_that_comes_twice_is_done_once():
    state, _ = rounds.ordered(RoundState(), ORDER, 0.0, 30.0)
    assert rounds.ordered(state, ORDER, 1.0, 30.0) == (state, ())
    state, _ = rounds.fetched(state)
    assert rounds.ordered(state, ORDER, 2.0, 30.0) == (state, ())


def test_an_order_that_is_done_has_its_result_offered_again():
    state, _ = rounds.received(offering(), RECEIPT)
    state, actions = rounds.ordered(state, ORDER, 5.0, 30.0)
    assert actions == (Offer(RESULT),)
    assert state.phase is Phase.OFFERING


def test_a_newer_order_replaces_the_open_one_and_drops_its_late_result():
    newer = replace(ORDER, sequence=4)
    state, _ = rounds.fetched(rounds.ordered(RoundState(), ORDER, 0.0, 30.0)[0])
    state, actions = rounds.ordered(state, newer, 1.0, 30.0)
    assert actions == (Accept(newer), Fetch(newer))
    assert rounds.worked(state, RESULT, 2.0, 30.0) == (state, ())
    assert rounds.ordered(state, ORDER, 3.0, 30.0) == (state, ())


def test_another_run_begins_at_any_sequence():
    other = replace(ORDER, run="other", sequence=1)
    _, actions = rounds.ordered(offering(), other, 0.0, 30.0)
    assert actions == (Accept(other), Fetch(other))


def test_the_receipt_of_another_order_settles_nothing():
    state = offering()
    for receipt in (replace(RECEIPT, sequence=2), replace(RECEIPT, run="other")):
        assert rounds.received(state, receipt) == (state, ())


def test_a_restart_goes_on_where_the_journal_stands():
    assert rounds.restored(ORDER, None, receipted=False)[1] == (Fetch(ORDER),)
    state, _ = rounds.restored(ORDER, RESULT, receipted=False)
    assert rounds.ticked(state, 1.0, 30.0)[1] == (Offer(RESULT),)
    state, _ = rounds.restored(ORDER, RESULT, receipted=True)
    assert rounds.ticked(state, 1.0, 30.0)[1] == ()
