"""What is to be done after an event of a round: decided by `open_round`, done by the coordinator.

First the journal is given its verdicts (`Note`). If it has no room, nothing else happens and the
round stands as before: the device offers its result again. Then the round is as decided, and the
other effects are carried out in the order in which they come: what devices are told (`Send`), what
people are shown (`Show`, `Warn`), and the work that begins.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.rules.attempt import Attempt, Verdict
from wire.errors import StillhouseError
from wire.messages import Order, Receipt, Result


@dataclass(frozen=True)
class Note:
    """Write a verdict into the journal."""

    sequence: int
    verdict: Verdict


@dataclass(frozen=True)
class Send:
    """Tell a device its order, or what became of its result."""

    device: str
    message: Order | Receipt


@dataclass(frozen=True)
class Show:
    """Show people a verdict; `fault`: why it is a refusal, in full."""

    verdict: Verdict
    fault: StillhouseError | None


@dataclass(frozen=True)
class Warn:
    """Show people that a result was refused which concerns no open order."""

    device: str
    fault: StillhouseError


@dataclass(frozen=True)
class Pull:
    """Pull the payloads of a result, which comes to `decided`."""

    result: Result


@dataclass(frozen=True)
class Begin:
    """Open a round: carried orders stand, and `devices` get new ones; comes to `begun`."""

    round: int
    carried: Mapping[str, Order]
    devices: frozenset[str]


@dataclass(frozen=True)
class Aggregate:
    """Aggregate the accepted results; comes to `aggregated`."""

    attempt: Attempt
    results: tuple[Result, ...]


@dataclass(frozen=True)
class End:
    """End the run: finished, or given up for a reason."""

    reason: str = ""


Effect = Note | Send | Show | Warn | Pull | Begin | Aggregate | End
