"""A run's claim on a fleet. One run has it at a time, since devices follow the newest order.

On one machine a lock decides, before a broker runs. Over a broker orchestrators agree by `Hello`
messages on the topic `all/run`:

    newcomer                                the run that has the fleet
      | question (boot) ------------------> |
      | <------------------ claim, retained |   the broker kept it
      | <------------- answer to this boot, retained: the newcomer ends
      | (its own question comes back to it: if no claim came before that, there is none)

A newcomer claims the fleet if it hears no claim, or no answer to its question within `ANSWER_S`
(that run has ended, and its last will was lost). If two have claimed it, after an outage or at the
same moment, the one that began later ends. Nothing here touches the network or the clock.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from wire import locks, messages, storage, topics
from wire.errors import RunError, WireError
from wire.messages import Hello
from wire.storage import Patience

log = logging.getLogger("orchestrator")

ANSWER_S = 10.0
CHANNEL = "run"  # under `all`; only orchestrators write there


class Say(NamedTuple):
    """A message to publish under `all`."""

    channel: str
    hello: Hello
    retain: bool = False


class Claim:
    """One orchestrator's claim on its fleet.

    Args:
        fleet: its name.
        run: the run's id, NAME.RANDOM.
        boot: names this process; a later process has a greater one.

    Attributes:
        held: whether the fleet is ours; before that, devices are told nothing.
        topic: where claims are published; an empty message there ends a claim.
    """

    def __init__(self, fleet: str, run: str, boot: str) -> None:
        self.held = False
        self.topic = topics.topic(fleet, topics.ALL, CHANNEL)
        self._fleet, self._run, self._boot = fleet, run, boot
        self._until_s: float | None = None  # when waiting for an answer ends
        self._rival = ""  # the run whose claim the broker kept

    def connected(self, now_s: float) -> tuple[Say, ...]:
        """The broker is there: ask who has the fleet, or repeat that we have it."""
        if self.held:
            return self._claimed()
        self._until_s, self._rival = now_s + ANSWER_S, ""
        return (Say(CHANNEL, Hello(self._boot)),)

    def arrived(self, payload: bytes) -> tuple[Say, ...]:
        """Bytes came on the topic; see `heard`."""
        if not payload:
            return self.heard(None)
        try:
            message, _ = messages.decode(payload, sender=self.topic)
        except WireError as fault:
            log.warning("message dropped: %s", fault)
            return ()
        return self.heard(message) if isinstance(message, Hello) else ()

    def heard(self, hello: Hello | None) -> tuple[Say, ...]:
        """A message came on the topic. None: the broker no longer keeps a claim.

        Raises:
            RunError: another run has the fleet.
        """
        if hello is None:
            return self._claimed() if self.held or self._rival else ()
        if hello.boot == self._boot:
            asked = not hello.run and self._until_s is not None
            return self._claimed() if asked and not self._rival and not self.held else ()
        if hello.answers == self._boot:
            if not self.held or _order(hello.boot) < _order(self._boot):
                raise RunError(in_use(self._fleet, hello.run))
            return ()
        if not hello.run:  # a question
            answer = Hello(self._boot, self._run, answers=hello.boot)
            return (Say(CHANNEL, answer, retain=True),) if self.held else ()
        if hello.run == self._run:  # from a former process of this run
            return ()
        if self.held:
            return (Say(CHANNEL, Hello(self._boot)),)  # ask whether it is still there
        self._rival = hello.run
        return ()

    def ticked(self, now_s: float) -> tuple[Say, ...]:
        """Time has passed: a run that has not answered by now is gone."""
        if self.held or self._until_s is None or now_s < self._until_s:
            return ()
        if self._rival:
            log.warning("fleet %s was claimed by run %s, which does not answer: taking it",
                        self._fleet, self._rival)  # fmt: skip
        return self._claimed()

    def _claimed(self) -> tuple[Say, ...]:
        self.held, self._rival = True, ""
        hello = Hello(self._boot, self._run)
        return (Say(CHANNEL, hello, retain=True), Say("hello", hello))


def in_use(fleet: str, run: str) -> str:
    """The message to a run that comes second; `run` is the id or name of the first."""
    return (
        f"fleet {fleet!r} is in use by run {run!r}, and devices follow one run at a time; start "
        "this one again when that one is finished or stopped, or give this one another fleet"
    )


def lock_file(runs: Path, fleet: str) -> Path:
    """The lock file by which a run holds a fleet; it stays after the run ends."""
    return runs / f"fleet-{fleet}.lock"


@contextlib.contextmanager
def locked(runs: Path, fleet: str, run: str, patience: Patience) -> Iterator[None]:
    """Hold a fleet against other runs in the same folder `runs`; wait for a full disk.

    Raises:
        RunError: another run has the fleet, or this one is running already.
        StorageError: the folder cannot be written.
    """
    path, is_new = lock_file(runs, fleet), not runs.exists()

    def hold() -> TextIO | None:
        with storage.at(path):
            runs.mkdir(parents=True, exist_ok=True)
            return locks.hold(path, run)

    try:
        lock = patience.attempt(hold)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                runs.rmdir()
        raise
    if lock is None:
        holder = locks.holder(path)
        if holder == run:
            raise RunError(f"run {run!r} of fleet {fleet!r} is running already ({path})")
        raise RunError(f"{in_use(fleet, holder)} ({path})")
    with lock:
        yield


def _order(boot: str) -> tuple[int, str]:
    """Sort key of boots, which are nanoseconds in decimal: a shorter one is earlier."""
    return len(boot), boot
