"""Effects of an event on a round: `open_round` decides them, the coordinator carries them out.

Verdicts are written into the journal first (`Note`). If it has no room, nothing else happens and
the round stays as it was: the device offers its result again. Otherwise the round becomes what was
decided, and the other effects are carried out in their order: messages to devices (`Send`), news
for people (`Show`, `Warn`), and work that begins (`Pull`, and the actions of `rounds`). A `Remind`
of `rounds` is no effect: it has become the order's `Send`.
"""

from dataclasses import dataclass

from orchestrator.rules.attempt import Verdict
from orchestrator.rules.rounds import Aggregate, Finish, GiveUp, Open
from wire.errors import StillhouseError
from wire.messages import Order, Receipt, Result


@dataclass(frozen=True)
class Note:
    """Write a verdict into the journal."""

    sequence: int
    verdict: Verdict


@dataclass(frozen=True)
class Send:
    """Send a device its order, or the receipt for its result."""

    device: str
    message: Order | Receipt


@dataclass(frozen=True)
class Show:
    """Show people a verdict; `fault` is the full reason of a refusal."""

    verdict: Verdict
    fault: StillhouseError | None


@dataclass(frozen=True)
class Warn:
    """Show people the refusal of a result that answers no open order."""

    device: str
    fault: StillhouseError


@dataclass(frozen=True)
class Pull:
    """Pull and check a result's payloads; `open_round.decided` takes the outcome."""

    result: Result


Effect = Note | Send | Show | Warn | Pull | Open | Aggregate | GiveUp | Finish
