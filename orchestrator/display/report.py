"""What a run has done so far, for the live view, `orchestrator status` and report.json.

Bytes are those of MQTT payloads sent and received, with framing and repetitions. The time left is
the mean time of the newest `NEWEST` rounds, times the number of rounds to go, minus the time that
the open round has taken. FedGKT's server training is counted by its epochs.
"""

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.display import words
from orchestrator.fleet import classes
from orchestrator.rules.attempt import Attempt, Verdict
from orchestrator.rules.rounds import PAUSE_S, Phase, RoundState
from orchestrator.run_folder.store import Store, as_written
from wire import records, stopping
from wire.errors import StalledError
from wire.messages import Birth, Telemetry
from wire.names import written

log = logging.getLogger("orchestrator")

WRITE_S = 0.5
LOGGED_S = 5.0  # least time between two log lines about who is awaited
NEWEST = 5  # rounds from which the time left is estimated
NAMED = 8  # most devices that a line names
REFUSED = 100  # most refused devices that are shown: strangers can come with any number of names


class Report:
    """Collects what happens in a run; `snapshot` is for people, `closed` makes a round's entry.

    Args:
        config: the run's settings.
        store: the run's folder.
        sources: digests of the source files of each network that is a user's own.
        enrolled: the devices that may take part; None allows any.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        sources: Mapping[str, Mapping[str, str]] | None = None,
        enrolled: frozenset[str] | None = None,
    ) -> None:
        self._config, self._store, self._sources = config, store, sources or {}
        self._enrolled = enrolled or frozenset()
        traffic = store.traffic()  # what an earlier orchestrator counted in the open round
        self._up = Counter({device: up for device, (up, _) in traffic.items()})
        self._down = Counter({device: down for device, (_, down) in traffic.items()})
        self._births: dict[str, Birth] = {}
        self._telemetry: dict[str, Telemetry] = {}
        self._state = RoundState(config.rounds, config.seed)
        self._work = ("", 0, 0)
        self._faults: dict[str, str] = {}
        self._refused: dict[str, str] = {}  # devices that may not take part, and why
        self._awaited = ""
        self._logged = "", -math.inf
        self._opened_at: float | None = None
        self._next_write = 0.0
        self.entries = store.closed_rounds()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._config.folder

    def received(self, device: str, count: int) -> None:
        """Count bytes that came from a device."""
        self._up[device] += count
        self._store.count(device, up=count)

    def sent(self, device: str, count: int) -> None:
        """Count bytes that went to a device."""
        self._down[device] += count
        self._store.count(device, down=count)

    def born(self, device: str, birth: Birth) -> None:
        """Note a device that is there."""
        self._births[device] = birth
        self._refused.pop(device, None)

    def turned_away(self, device: str, reason: str) -> None:
        """Note a device that is there but may not take part."""
        if device in self._refused or len(self._refused) < REFUSED:
            self._refused[device] = reason

    def telemetry(self, device: str, message: Telemetry) -> None:
        """Note how far a device is."""
        self._telemetry[device] = message

    def decided(self, verdict: Verdict) -> None:
        """Note whether a device's result was accepted or refused."""
        if verdict.accepted:
            self._faults.pop(verdict.device, None)
        else:
            self._faults[verdict.device] = verdict.reason

    def rounds(self, state: RoundState) -> None:
        """Note the new state of the rules, and log who is awaited now."""
        self._state = state
        self._awaited = self._awaits()
        now = time.monotonic()
        if self._awaited in ("", self._logged[0]) or now - self._logged[1] < LOGGED_S:
            return
        self._logged = self._awaited, now
        log.info("%s", self._awaited)

    def opened(self) -> None:
        """A round has begun: count its bytes and seconds from here."""
        self._up.clear()
        self._down.clear()
        self._opened_at = time.monotonic()

    def progress(self, what: str, done: int, total: int) -> None:
        """Note how far the worker thread is with its work."""
        self._work = (what, done, total)

    def closed(
        self, attempt: Attempt, metrics: Mapping[str, Any], seconds: float
    ) -> dict[str, Any]:
        """The entry of an aggregated round; `kept` then adds it to the report."""
        devices = {
            device: {
                **(verdict.result.metrics if verdict.accepted else {}),
                "samples": verdict.result.samples,
                "accepted": verdict.accepted,
                "reason": verdict.reason,
                "bytes_up": self._up[device],
                "bytes_down": self._down[device],
            }
            for device, verdict in sorted(attempt.verdicts.items())
        }
        for device, more in metrics.get("devices", {}).items():
            devices.setdefault(device, {}).update(more)
        return {
            "round": attempt.round,
            "seconds": seconds,
            "cohort": sorted(attempt.orders),
            **{key: value for key, value in metrics.items() if key != "devices"},
            "devices": devices,
        }

    def kept(self, entry: dict[str, Any]) -> None:
        """Add a round's entry, which is in the journal now."""
        self.entries.append(entry)
        self._opened_at = None

    def last_round(self) -> str:
        """A line about the last closed round, with the time left."""
        entry, more = self.entries[-1], words.time_left(self.snapshot())
        scores = [
            f"{key.removesuffix('_accuracy')} {words.percent(value)}"
            for key, value in entry.items()
            if key.endswith("accuracy")
        ]
        what = ", ".join([*(scores or ["not evaluated"]), f"{entry['seconds']:.1f} s"])
        return f"round {entry['round']} of {self._config.rounds}: {what}" + (more and f"; {more}")

    def snapshot(self) -> dict[str, Any]:
        """The state of the run now, as JSON values."""
        work, state = self._work, self._state  # another thread may replace `_work`
        names = sorted(
            {*state.live, *state.cohort, *self._telemetry, *self._enrolled, *self._refused}
        )
        left_s, left_by = self._time_left()
        return {
            "run": self._config.name,
            "strategy": written(self._config.strategy),
            "phase": state.phase.value,
            "round": state.round,
            "rounds": self._config.rounds,
            "awaited": self._awaited,
            "left_s": left_s,
            "left_by": left_by,
            "work": work if state.phase is Phase.AGGREGATING else ("", 0, 0),
            "updated": time.time(),
            "devices": {name: self._device(name) for name in names},
            "history": self.entries,
        }

    def save(self, *, final: bool = False) -> None:
        """Write status.json now and then, and report.json at the end.

        The file grows with the rounds. The wait for the next write grows with the time that the
        last one took, so that writing never takes more than a tenth of the run's time.
        """
        began = time.monotonic()
        if final or began >= self._next_write:
            with contextlib.suppress(StalledError):  # a full disk is reported where it matters more
                self._store.write_json("status.json", self.snapshot())
            now = time.monotonic()
            self._next_write = now + max(WRITE_S, 9 * (now - began))
        if final:
            config = self._config
            settled = classes.read(config.folder)
            whole = {
                "run": config.name,
                "classes": list(settled.names) if settled else [],
                "config": {**as_written(records.plain(config)), "broker": config.broker.kind},
                "sources": self._sources,
                "rounds": self.entries,
            }
            store = self._store
            store.patience.attempt(lambda: store.write_json("report.json", whole))

    def _time_left(self) -> tuple[float | None, int]:
        """About how many seconds the run still takes, and how many rounds that is based on."""
        newest = self.entries[-NEWEST:]
        if not newest:
            return None, 0
        # Rounds differ in their epochs of server training.
        epochs, ended = self._config.server.epochs_in, len(self.entries)
        trained = sum(entry.get("server_train_s", 0.0) for entry in newest)
        rest = (sum(entry["seconds"] for entry in newest) - trained) / len(newest)
        passes = sum(epochs(entry["round"]) for entry in newest if "server_train_s" in entry)
        each = trained / max(passes, 1)
        ahead = [rest + epochs(n) * each for n in range(ended + 1, self._config.rounds + 1)]
        opened_at = self._opened_at
        if ahead and opened_at is not None:
            ahead[0] = max(ahead[0] - (time.monotonic() - opened_at), 0.0)
        return sum(ahead), len(newest)

    def _awaits(self) -> str:
        """Who keeps the run waiting, in words; "" for nobody.

        The words change only when those who are awaited change, so that each is logged once.
        """
        state, rules = self._state, self._config.cohort
        if state.phase is Phase.COLLECTING:
            open_ = state.cohort - state.returned - state.failed
            if not open_ or open_ & state.live.keys():
                return ""
            return (
                f"round {state.round}: waiting for devices that are away: {names_of(open_)}; "
                f"it ends without them {rules.deadline_s:g} s after its start"
            )
        if state.phase is not Phase.FORMING:
            return ""
        if len(state.live) < rules.min_devices:
            here = f" ({names_of(state.live)})" if state.live else ""
            missing = self._enrolled - state.live.keys()
            return (
                f"waiting for devices: {len(state.live)} of at least {rules.min_devices} here{here}"
            ) + (f"; enrolled and not here: {names_of(missing)}" if missing else "")
        if state.retries and not state.returned:
            return f"no device returned a result; trying again in {PAUSE_S:g} s"
        if rules.wait_s:
            return f"{len(state.live)} devices are here; waiting {rules.wait_s:g} s for more"
        return ""

    def _device(self, name: str) -> dict[str, Any]:
        state, last, birth = self._state, self._telemetry.get(name), self._births.get(name)
        if name in self._refused:
            stand = "refused"
        elif name in state.returned:
            stand = "returned"
        elif name in state.failed:
            stand = "failed"
        elif name in state.cohort:
            stand = last.phase if last and last.round == state.round else "ordered"
        else:
            stand = "waiting"
        return {
            "live": name in state.live or name in self._refused,
            "stand": stand,
            "done": last.done if last else 0,
            "total": last.total if last else 0,
            "memory_bytes": last.memory_bytes if last else 0,
            "bytes_up": self._up[name],
            "bytes_down": self._down[name],
            "package": birth.package.version if birth and birth.package else "",
            "update": birth.update if birth else "",
            "fault": self._refused.get(name) or self._faults.get(name, ""),
        }


def names_of(devices: Iterable[str]) -> str:
    """Sorted names, at most `NAMED` of them: "pi-1, pi-2 and 38 more"."""
    names = sorted(devices)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def said(report: Report, more: str, again: str | None = None) -> str:
    """The answer to Ctrl-C: what is kept of a run, and how to go on.

    Args:
        report: the run's report.
        more: what becomes of the open round.
        again: the command to go on with; None: the current one, "": there is none.
    """
    closed = len(report.entries)
    kept = f"kept: {closed} closed round{'' if closed == 1 else 's'} in {report.folder}; {more}"
    again = stopping.command() if again is None else again
    return f"stopping; {kept}" + (f"; go on with: {again}" if again else "")
