"""The devices that are there: their births, measurements, and the package each should have."""

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from orchestrator.config import RunConfig
from orchestrator.fleet import devices, enrolment, updates
from orchestrator.fleet.classes import resolve, write
from orchestrator.fleet.updates import Rollout
from orchestrator.rules.attempt import MAX_REASON
from wire.classes import listed
from wire.errors import RunError, StillhouseError
from wire.messages import Birth, Hello, Measured, Receipt, Update

log = logging.getLogger("orchestrator")

MEASURED_S = 0.25  # least time between a device's reports: checking one takes tens of milliseconds
REFUSED = 1000  # most refused devices that are remembered
MAX_STATES = 4  # state folders to remember for each device

Tell = Callable[[str, Receipt | Update | Hello], None]  # sends a device a message


class Roster:
    """The devices of a run.

    Args:
        config: the run's settings.
        enrolled: names that may take part; None allows any. Devices that are enrolled or revoked
            later are found within a second (`revoked`).
        rollout: packages to offer to devices.
        tell: sends a device a message on its `order` topic.

    Attributes:
        births: the last birth of each device that may take part.
        refused: why other devices may not, the newest last.
        classes: the run's classes; if nobody named them, those of the first device.

    Raises:
        RunError: the file with the settled classes is damaged.
    """

    def __init__(
        self, config: RunConfig, enrolled: frozenset[str] | None, rollout: Rollout, tell: Tell
    ) -> None:
        self.births: dict[str, Birth] = {}
        self._config, self._enrolled, self._tell = config, enrolled, tell
        self._stamp: tuple[int, int] | None = None  # of the list of enrolled devices, as read
        self._rollout = rollout
        self._measured_at: dict[str, float] = {}
        self._settled = resolve(config)
        self.classes = self._settled
        # Births of all devices that are there and name classes, even refused ones, in order of
        # arrival: the first decides.
        self._naming: dict[str, Birth] = {}
        self.refused: dict[str, str] = {}
        self._state_ids: dict[str, list[str]] = {}  # by device, newest last

    def born(self, device: str, birth: Birth, now_s: float) -> Birth | None:
        """Note a birth from a device's topic; return it, safe to show, or None if refused."""
        if birth.device != device:
            log.warning("dropped: birth message of %r on the topic of %r", birth.device, device)
            return None
        if not (reason := self._stranger(device)):
            if birth.classes or birth.classes_digest:
                self._naming[device] = birth
            else:
                self._naming.pop(device, None)
            self._decide(but=device)
            if reason := self.classes.refusal(birth.classes, birth.classes_digest):
                reason = f"device {device!r}: {reason}"
        if reason:
            self._refuse(device, reason)
            return None
        self.refused.pop(device, None)
        update = "".join(c if c.isprintable() else " " for c in birth.update[:MAX_REASON])
        birth = replace(birth, update=update)
        before = self.births.get(device)
        if birth.update and (before is None or before.update != birth.update):
            log.warning("%s: update: %s", device, birth.update)
        if birth.state_id:
            self._note_state(device, birth.state_id)
        devices.born(self._config.runs, self._config.fleet, birth)
        self.births[device] = birth
        self._rollout = updates.born(self._rollout, device, birth, now_s)
        return birth

    def died(self, device: str, session: int, state_id: str) -> None:
        """Note that a device's connection has ended."""
        self._rollout = updates.died(self._rollout, device, session, state_id)
        naming = self._naming.get(device)
        if naming and (naming.session, naming.state_id) == (session, state_id):
            del self._naming[device]
            self._decide(but=device)

    def opened(self) -> None:
        """A round is about to be opened: settle the names of the classes for the whole run."""
        if self.classes != self._settled:
            write(self._config.folder, self.classes)
            self._settled = self.classes
            log.info("classes, by %s: %s", self.classes.by, listed(self.classes.names))

    def _decide(self, *, but: str) -> None:
        """Let the first device that is there name the classes.

        If that changes the names, ask all devices but one for a new birth.
        """
        before, self.classes = self.classes, self._settled
        for device, birth in self._naming.items():
            self.classes = self.classes.named_by(device, birth.classes, birth.classes_digest)
        if before.by and replace(before, by="") != replace(self.classes, by=""):
            for device in self._naming.keys() - {but}:
                self._tell(device, Hello(boot=""))

    def _refuse(self, device: str, reason: str) -> None:
        self.births.pop(device, None)
        if self.refused.get(device) != reason:  # a birth comes with every connection: log it once
            self.refused.pop(device, None)
            self.refused[device] = reason
            if len(self.refused) > REFUSED:  # strangers can come with any number of names
                self.refused.pop(next(iter(self.refused)))
            log.warning("refused: %s", reason)
        self._tell(device, Receipt("birth", accepted=False, reason=reason))

    def turn_away(self, device: str, reason: str) -> None:
        """Refuse a device that is there."""
        self._naming.pop(device, None)
        self._refuse(device, reason)

    def measured(self, device: str, message: Measured, body: bytes, now_s: float) -> None:
        """Keep a measurement, and send the device its receipt."""
        reason = self._stranger(device)
        if not reason and now_s - self._measured_at.get(device, -math.inf) < MEASURED_S:
            reason = "a report came a moment ago; measure again"
        if not reason:
            self._measured_at[device] = now_s
            try:
                devices.take(self._config.runs, self._config.fleet, device, body)
            except (StillhouseError, OSError) as fault:
                reason = str(fault)[:MAX_REASON]
        log.info("measurement of %s: %s", device, reason or "kept")
        receipt = Receipt("measured", accepted=not reason, run=message.digest, reason=reason)
        self._tell(device, receipt)

    def ticked(self, now_s: float) -> None:
        """Offer newer packages to the devices whose turn it is."""
        held_by = self._rollout.held_by
        self._rollout, tell = updates.ticked(self._rollout, now_s)
        if self._rollout.held_by not in ("", held_by):
            log.info("updates of the others wait for the canary %s", self._rollout.held_by)
        for device, update in tell:
            log.info("%s is told of %s", device, update.release.package.version)
            self._tell(device, update)

    def _note_state(self, device: str, state_id: str) -> None:
        """Warn if two agents take turns: a device is back with a state folder from before."""
        seen = self._state_ids.setdefault(device, [])
        if state_id in seen[:-1]:
            log.warning(
                "%s: two agents of this name take turns; end one of them, or give it another name "
                "(orchestrator enroll)",
                device,
            )
        seen[:] = [*(known for known in seen if known != state_id), state_id][-MAX_STATES:]

    def _stranger(self, device: str) -> str:
        """Why a device may not take part; "" if it may."""
        if self._enrolled is None or device in self._enrolled:
            return ""
        self._look()
        return "" if device in self._enrolled else self._not_enrolled(device)

    def revoked(self) -> dict[str, str]:
        """The devices that are there and are no longer enrolled, with the reason to tell them."""
        if self._enrolled is None:
            return {}
        self._look()
        return {name: self._not_enrolled(name) for name in self.births.keys() - self._enrolled}

    def _look(self) -> None:
        """Read who is enrolled, if that changed; a list that cannot be read changes nothing."""
        path = enrolment.path(self._config.runs, self._config.fleet)
        with suppress(RunError, OSError):
            stamp = path.stat().st_mtime_ns, path.stat().st_ino
            if stamp != self._stamp:
                self._enrolled = enrolment.enrolled(self._config.runs, self._config.fleet)
                self._stamp = stamp

    def _not_enrolled(self, device: str) -> str:
        return (
            f"device {device!r} is not enrolled in fleet {self._config.fleet!r}; "
            f"run: orchestrator enroll {device}"
        )
