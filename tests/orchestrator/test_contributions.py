"""A payload is decoded once if memory allows; otherwise twice, with the same result."""

from dataclasses import dataclass, replace

import pytest

from orchestrator.loop import contributions
from orchestrator.loop.contributions import Contributions
from wire.errors import AdmissionError
from wire.messages import BlobRef, Order, Result

ORDERS = {n: Order("run", 3, 1, BlobRef("ab" * 32, 9, 1024), 1, 0.1, 7, {}) for n in "abc"}
RESULTS = [Result(name, "run", 3, 1, 10) for name in "abc"]


@dataclass(frozen=True)
class Sized:
    device: str
    nbytes: int = 40


class Counting:
    """A strategy that records its calls, in order."""

    def __init__(self):
        self.log = []

    def admit(self, state, order, result):
        del state, order
        self.log.append(f"admit {result.device}")
        if result.fault:
            raise AdmissionError(result.fault)
        return Sized(result.device)

    def aggregate(self, state, round_, results, contributions):
        del round_
        for result, each in zip(results, contributions, strict=True):
            assert each.device == result.device
            self.log.append(f"add {each.device}")
        return state, {}


def aggregated(strategy, round_of):
    del strategy.log[:]
    round_of.aggregate("state", 1, ORDERS, RESULTS)
    return strategy.log


@pytest.fixture
def strategy():
    return Counting()


def test_what_was_admitted_is_not_decoded_again(strategy):
    kept = Contributions(strategy)
    for result in reversed(RESULTS):
        kept.admit("state", ORDERS[result.device], result)
    assert aggregated(strategy, kept) == ["add a", "add b", "add c"]


def test_what_does_not_fit_is_decoded_when_its_turn_comes(strategy, monkeypatch):
    monkeypatch.setattr(contributions, "KEPT_BYTES", 100)
    kept = Contributions(strategy)
    for result in RESULTS:
        kept.admit("state", ORDERS[result.device], result)
    assert aggregated(strategy, kept) == ["add a", "add b", "admit c", "add c"]


def test_after_a_restart_all_are_decoded_one_by_one(strategy):
    log = aggregated(strategy, Contributions(strategy))
    assert log == ["admit a", "add a", "admit b", "add b", "admit c", "add c"]


def test_what_does_not_count_makes_room_for_what_does(strategy, monkeypatch):
    monkeypatch.setattr(contributions, "KEPT_BYTES", 80)
    kept = Contributions(strategy)
    for name in ("gone", "given-up"):
        kept.admit("state", ORDERS["a"], Result(name, "run", 2, 1, 10))
    kept.forget("gone")
    kept.admit("state", ORDERS["a"], RESULTS[0])
    kept.clear()
    for result in RESULTS[1:]:
        kept.admit("state", ORDERS[result.device], result)
    assert aggregated(strategy, kept) == ["admit a", "add a", "add b", "add c"]


def test_a_refused_or_replaced_result_leaves_nothing_behind(strategy):
    kept = Contributions(strategy)
    other = replace(RESULTS[0], data_digest="ef" * 32)  # from an attempt that was given up
    kept.admit("state", ORDERS["a"], other)
    kept.admit("state", ORDERS["b"], RESULTS[1])
    with pytest.raises(AdmissionError):
        kept.admit("state", ORDERS["b"], replace(RESULTS[1], fault="no"))
    log = aggregated(strategy, kept)
    assert log == ["admit a", "add a", "admit b", "add b", "admit c", "add c"]
    kept.admit("state", ORDERS["a"], RESULTS[0])
    aggregated(strategy, kept)
    assert aggregated(strategy, kept)[0] == "admit a"  # contributions are dropped with their round
