"""Updates of the devices' package, as pure rules: who is told of which release, and when.

A device is told once a session, with a package of its architecture and Python that is newer than
its own. Where there are canaries, the others are told only when each of these has been there with
the newest version that is meant for it for `settle_s`; a version that is rolled back begins anew.

Nothing but `read` touches the disk; times are monotonic seconds, passed in.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from orchestrator.config import ReleaseConfig
from wire import release
from wire.blobs import BlobStore
from wire.errors import ReleaseError
from wire.messages import Birth, Update
from wire.release import Build


class Seen(NamedTuple):
    """A device that is there: since when with this package, and whether this session was told."""

    session: int
    package: Build
    since_s: float
    told: bool


@dataclass(frozen=True)
class Rollout:
    """Releases on their way to the fleet; `seen` are devices that are there with a package."""

    updates: tuple[Update, ...] = ()
    canary: frozenset[str] = frozenset()
    settle_s: float = 0.0
    seen: Mapping[str, Seen] = field(default_factory=dict)


def read(config: ReleaseConfig, blobs: BlobStore) -> Rollout:
    """The packages of the configuration, in the blobs that devices pull.

    Raises:
        ReleaseError: a file is missing, or not what was released.
        SignatureError: a release is not signed by `config.key`.
    """
    updates = []
    for deb in config.packages:
        path = release.beside(deb)
        try:
            told = release.parse(path.read_bytes(), str(path))
            content = deb.read_bytes()
        except OSError as fault:
            raise ReleaseError(
                f"{fault.filename}: {fault.strerror}; sign the package: "
                f"python -m hardware.release {deb} --key KEY.pem"
            ) from fault
        release.verify(told, config.key)
        digest = hashlib.sha256(content).hexdigest()
        if digest != told.package.sha256:
            raise ReleaseError(
                f"{deb}: expected the SHA-256 {told.package.sha256} of its release, got {digest}; "
                "sign it again"
            )
        ref = blobs.ref(digest) if blobs.has(digest) else blobs.put(content)
        updates.append(Update(told, ref.chunk_bytes))
    canary = frozenset(config.canary)
    return Rollout(tuple(updates), canary, 60 * config.settle_minutes)


def born(state: Rollout, device: str, birth: Birth, now_s: float) -> Rollout:
    """A device is there, with or without a package; it may have said so before."""
    known = state.seen.get(device)
    if known and birth.session < known.session:
        return state
    others = {name: seen for name, seen in state.seen.items() if name != device}
    if birth.package is None:
        return replace(state, seen=others)
    same = known is not None and known.package == birth.package
    since_s = known.since_s if known and same else now_s
    told = known is not None and known.told and known.session == birth.session
    seen = Seen(birth.session, birth.package, since_s, told)
    return replace(state, seen={**others, device: seen})


def died(state: Rollout, device: str, session: int) -> Rollout:
    """A connection ended; the will of an older session does not end a newer one."""
    known = state.seen.get(device)
    if known is None or known.session != session:
        return state
    return replace(state, seen={n: seen for n, seen in state.seen.items() if n != device})


def ticked(state: Rollout, now_s: float) -> tuple[Rollout, tuple[tuple[str, Update], ...]]:
    """Time passed: whom to tell of what now."""
    settled = all(_settled(state, name, now_s) for name in state.canary)
    tell = {}
    for device, seen in state.seen.items():
        if (settled or device in state.canary) and not seen.told:
            update = _newest(state, seen.package)
            if update and release.newer(update.release.package.version, seen.package.version):
                tell[device] = update
    told = {name: state.seen[name]._replace(told=True) for name in tell}
    return replace(state, seen={**state.seen, **told}), tuple(tell.items())


def _newest(state: Rollout, own: Build) -> Update | None:
    """The newest release for a device's architecture and Python."""
    newest: Update | None = None
    for update in state.updates:
        package = update.release.package
        if (package.architecture, package.python) == (own.architecture, own.python) and (
            newest is None or release.newer(package.version, newest.release.package.version)
        ):
            newest = update
    return newest


def _settled(state: Rollout, device: str, now_s: float) -> bool:
    seen = state.seen.get(device)
    if seen is None or now_s - seen.since_s < state.settle_s:
        return False
    newest = _newest(state, seen.package)
    return newest is None or not release.newer(newest.release.package.version, seen.package.version)
