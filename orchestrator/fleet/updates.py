"""Updates of the devices' package, as pure rules: which device is offered which release, and when.

A device is offered the newest package for its architecture and Python, if that is newer than its
own. The package is chosen at the device's birth, and offered when a session begins and every
`AGAIN_S` in it. If there are canaries, the others wait until each canary has run the newest version
meant for it for `settle_s`; if it is rolled back, that time begins again.

Only `read` touches the disk. Times are monotonic seconds, passed in.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from orchestrator.config import ReleaseConfig
from wire import __version__, release
from wire.blobs import BlobStore
from wire.errors import ReleaseError, SettingsError
from wire.messages import Birth, Update
from wire.release import Build

AGAIN_S = 3600.0
LOOK_S = 1.0  # how often the canaries are checked


class Seen(NamedTuple):
    """A device that is there: since when it has this package, and what to offer it."""

    session: int
    state_id: str
    package: Build
    since_s: float
    wanted: Update | None

    def of(self, session: int, state_id: str) -> bool:
        """Whether this is the session that is there."""
        return (self.session, self.state_id) == (session, state_id)


@dataclass(frozen=True)
class Rollout:
    """Releases on their way to the fleet.

    Attributes:
        updates: all releases.
        canary: devices that are told first.
        settle_s: how long a canary must have run the newest version before others are told.
        seen: devices that are there, if a package installed their agent.
        tell_s: when to tell each device that wants an update next.
        look_s: nothing needs to be done before this time.
        held_by: the canary that the others wait for; "" if they do not wait.
    """

    updates: tuple[Update, ...] = ()
    canary: frozenset[str] = frozenset()
    settle_s: float = 0.0
    seen: Mapping[str, Seen] = field(default_factory=dict)
    tell_s: Mapping[str, float] = field(default_factory=dict)
    look_s: float = math.inf
    held_by: str = ""


def read(
    config: ReleaseConfig, blobs: BlobStore, *, enrolled: frozenset[str] | None = None
) -> Rollout:
    """The rollout of the configured packages, which are put among the blobs that devices pull.

    Args:
        config: the settings of the releases.
        blobs: the run's.
        enrolled: names that may take part; None allows any.

    Raises:
        SettingsError: a canary may not take part, and would hold up the others for ever.
        ReleaseError: a file is missing, not what was released, or newer than this orchestrator.
        SignatureError: a release is not signed by `config.key`.
    """
    if enrolled is not None and (strangers := sorted({*config.canary} - enrolled)):
        raise SettingsError(
            f"release.canary: {strangers[0]!r} is not enrolled; take it out, or run: "
            f"orchestrator enroll {strangers[0]}"
        )
    updates = []
    for deb in config.packages:
        path = release.beside(deb)
        try:
            signed = release.parse(path.read_bytes(), str(path))
            content = deb.read_bytes()
        except OSError as fault:
            raise ReleaseError(
                f"{fault.filename}: {fault.strerror}; sign the package: "
                f"python -m hardware.release {deb} --key KEY.pem"
            ) from fault
        release.verify(signed, config.key)
        if release.newer(signed.package.version.partition("+py")[0], __version__):
            raise ReleaseError(
                f"{deb}: {signed.package.version} is newer than this orchestrator, {__version__}, "
                "and was never tried with it; update the orchestrator first"
            )
        digest = hashlib.sha256(content).hexdigest()
        if digest != signed.package.sha256:
            raise ReleaseError(
                f"{deb}: expected the SHA-256 {signed.package.sha256} of its release, got "
                f"{digest}; sign it again"
            )
        ref = blobs.ref(digest) if blobs.has(digest) else blobs.put(content)
        updates.append(Update(signed, ref.chunk_bytes))
    canary = frozenset(config.canary)
    return Rollout(tuple(updates), canary, 60 * config.settle_minutes)


def born(state: Rollout, device: str, birth: Birth, now_s: float) -> Rollout:
    """The state after a birth, which may repeat an earlier one."""
    known = state.seen.get(device)
    if known and birth.state_id == known.state_id and birth.session < known.session:
        return state
    if birth.package is None:
        return _without(state, device)
    if known and known.of(birth.session, birth.state_id) and known.package == birth.package:
        return state
    since_s = known.since_s if known and known.package == birth.package else now_s
    wanted = _newest(state, birth.package)
    seen = Seen(birth.session, birth.state_id, birth.package, since_s, wanted)
    state = _without(state, device)
    state = replace(state, seen={**state.seen, device: seen})
    if wanted is None:
        return state
    return replace(state, tell_s={**state.tell_s, device: now_s}, look_s=now_s)


def died(state: Rollout, device: str, session: int, state_id: str = "") -> Rollout:
    """The state after a connection has ended; only the will of the current session counts."""
    known = state.seen.get(device)
    return _without(state, device) if known and known.of(session, state_id) else state


def ticked(state: Rollout, now_s: float) -> tuple[Rollout, tuple[tuple[str, Update], ...]]:
    """The state after time has passed, and the devices to tell now, each with its update."""
    if now_s < state.look_s:
        return state, ()
    canary = next((n for n in sorted(state.canary) if not _settled(state, n, now_s)), "")
    waiting = [n for n in state.tell_s if n not in state.canary] if canary else []
    due = {n for n, at_s in state.tell_s.items() if at_s <= now_s}.difference(waiting)
    tell_s = {n: now_s + AGAIN_S if n in due else at_s for n, at_s in state.tell_s.items()}
    look_s = now_s + LOOK_S if waiting else min(tell_s.values(), default=math.inf)
    tell = tuple((n, wanted) for n in tell_s if n in due and (wanted := state.seen[n].wanted))
    state = replace(state, tell_s=tell_s, look_s=look_s, held_by=canary if waiting else "")
    return state, tell


def _without(state: Rollout, device: str) -> Rollout:
    return replace(
        state,
        seen={name: seen for name, seen in state.seen.items() if name != device},
        tell_s={name: at_s for name, at_s in state.tell_s.items() if name != device},
    )


def _newest(state: Rollout, installed: Build) -> Update | None:
    """The newest release for a device, if it is newer than the installed package."""
    newest, version = None, installed.version
    for update in state.updates:
        package = update.release.package
        fits = (package.architecture, package.python) == (installed.architecture, installed.python)
        if fits and release.newer(package.version, version):
            newest, version = update, package.version
    return newest


def _settled(state: Rollout, device: str, now_s: float) -> bool:
    seen = state.seen.get(device)
    return seen is not None and seen.wanted is None and now_s - seen.since_s >= state.settle_s
