"""What a run has done so far: for the live view, `orchestrator status` and report.json.

Bytes are those of MQTT payloads as they were sent and received, framing and repetitions included.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.rounds import Phase, State
from orchestrator.store import Attempt, Store
from wire import records, stopping
from wire.errors import StalledError
from wire.messages import Birth, Telemetry

WRITE_S = 0.5


class Report:
    """Collects; `snapshot` is what a person sees, `closed` makes a round's entry."""

    def __init__(self, config: RunConfig, store: Store) -> None:
        self._config, self._store = config, store
        traffic = store.traffic()  # what an earlier orchestrator counted in the open round
        self._up = Counter({device: up for device, (up, _) in traffic.items()})
        self._down = Counter({device: down for device, (_, down) in traffic.items()})
        self._births: dict[str, Birth] = {}
        self._telemetry: dict[str, Telemetry] = {}
        self._state = State(config.rounds, config.seed)
        self._work = ("", 0, 0)
        self._lock = threading.Lock()
        self._written = 0.0
        self.entries = store.closed_rounds()

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self._config.folder

    def received(self, device: str, count: int) -> None:
        """So many bytes came from a device."""
        self._up[device] += count
        self._store.count(device, up=count)

    def sent(self, device: str, count: int) -> None:
        """So many bytes went to a device."""
        self._down[device] += count
        self._store.count(device, down=count)

    def born(self, device: str, birth: Birth) -> None:
        """A device is there."""
        self._births[device] = birth

    def telemetry(self, device: str, message: Telemetry) -> None:
        """A device told how far it is."""
        self._telemetry[device] = message

    def rounds(self, state: State) -> None:
        """The rules' state changed."""
        self._state = state

    def opened(self) -> None:
        """A round began: its bytes are counted from here."""
        self._up.clear()
        self._down.clear()

    def progress(self, what: str, done: int, total: int) -> None:
        """The worker thread is so far with something."""
        with self._lock:
            self._work = (what, done, total)

    def closed(
        self, attempt: Attempt, metrics: Mapping[str, Any], seconds: float
    ) -> dict[str, Any]:
        """The entry of a round that was aggregated."""
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
        entry = {
            "round": attempt.round,
            "seconds": seconds,
            "cohort": sorted(attempt.orders),
            **{key: value for key, value in metrics.items() if key != "devices"},
            "devices": devices,
        }
        self.entries.append(entry)
        return entry

    def snapshot(self) -> dict[str, Any]:
        """The run as it stands."""
        with self._lock:
            work = self._work
        state = self._state
        names = sorted({*state.live, *state.cohort, *self._telemetry})
        return {
            "run": self._config.name,
            "strategy": self._config.strategy,
            "phase": state.phase.value,
            "round": state.round,
            "rounds": self._config.rounds,
            "work": work if state.phase is Phase.AGGREGATING else ("", 0, 0),
            "updated": time.time(),
            "devices": {name: self._device(name) for name in names},
            "history": self.entries,
        }

    def save(self, *, final: bool = False) -> None:
        """Write status.json now and then, and report.json at the end."""
        now = time.monotonic()
        if final or now - self._written >= WRITE_S:
            self._written = now
            with contextlib.suppress(StalledError):  # a full disk is said where it holds up more
                self._store.write_json("status.json", self.snapshot())
        if final:
            whole = {
                "run": self._config.name,
                "config": {**records.plain(self._config), "broker": self._config.broker.kind},
                "rounds": self.entries,
            }
            store = self._store
            store.patience.attempt(lambda: store.write_json("report.json", whole))

    def _device(self, name: str) -> dict[str, Any]:
        state, last, birth = self._state, self._telemetry.get(name), self._births.get(name)
        if name in state.returned:
            stand = "returned"
        elif name in state.failed:
            stand = "failed"
        elif name in state.cohort:
            stand = last.phase if last and last.round == state.round else "ordered"
        else:
            stand = "waiting"
        return {
            "live": name in state.live,
            "stand": stand,
            "done": last.done if last else 0,
            "total": last.total if last else 0,
            "memory_bytes": last.memory_bytes if last else 0,
            "bytes_up": self._up[name],
            "bytes_down": self._down[name],
            "package": birth.package.version if birth and birth.package else "",
            "update": birth.update if birth else "",
        }


def said(report: Report, more: str, again: str | None = None) -> str:
    """The answer to Ctrl-C: what is kept of a run, and how to go on.

    Args:
        report: of the run.
        more: of the open round.
        again: the command to go on with; None: this one, "": there is none.
    """
    closed = len(report.entries)
    kept = f"kept: {closed} closed round{'' if closed == 1 else 's'} in {report.folder}; {more}"
    again = stopping.command() if again is None else again
    return f"stopping; {kept}" + (f"; go on with: {again}" if again else "")
