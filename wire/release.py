"""Releases of the agent's package, signed by a key that its operator keeps offline.

A device installs only what was released for its architecture and Python; the word of the
orchestrator or the broker is not enough. The signed bytes are the canonical JSON of `Package` (keys
sorted, no spaces).
"""

import json
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from wire import checks, records, signing
from wire.errors import ReleaseError

CONTEXT = "stillhouse-release/1"
NAME = "stillhouse-edge-agent"
MAX_BYTES = 1 << 30
_VERSION = re.compile(r"[0-9][A-Za-z0-9.+~-]{0,63}")
_PYTHON = re.compile(r"3\.[0-9]{1,2}")
_PLAIN = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


@dataclass(frozen=True)
class Build:
    """A package's version, and what it was built for: "0.1.0+py311", "arm64", "3.11"."""

    version: str
    architecture: str
    python: str

    def __post_init__(self) -> None:
        if not _VERSION.fullmatch(self.version):
            raise ValueError(
                f"version: expected one of Debian without an epoch, got {self.version!r:.80}"
            )
        if not _PLAIN.fullmatch(self.architecture) or not _PYTHON.fullmatch(self.python):
            raise ValueError(
                f"expected an architecture and a Python, got {self.architecture!r:.80} and "
                f"{self.python!r:.80}"
            )


@dataclass(frozen=True)
class Package:
    """A package file: its control fields, size (bytes), SHA-256 (hex), and time of signing."""

    name: str
    version: str
    architecture: str
    python: str
    size: int
    sha256: str
    created: str

    def __post_init__(self) -> None:
        Build(self.version, self.architecture, self.python)
        checks.digest("sha256", self.sha256)
        checks.within("size", self.size, 1, MAX_BYTES, " bytes")


@dataclass(frozen=True)
class Release:
    """A package, and the signature of its operator."""

    package: Package
    signature: str


def sign(key: "signing.PrivateKey", package: Package) -> Release:
    """The release of a package: signs it."""
    return Release(package, signing.sign(key, CONTEXT, records.canonical(package)))


def parse(data: bytes, where: str) -> Release:
    """The release in a file's bytes; its signature is not checked here.

    Raises:
        ReleaseError: the bytes are not a release; the message names `where`.
    """
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as fault:
        raise ReleaseError(f"{where}: not JSON: {fault}; sign the package again") from fault
    return records.build(Release, table, where=where, error=ReleaseError)


def beside(deb: Path) -> Path:
    """The path of a package file's release, beside it."""
    return deb.with_name(f"{deb.name}.release.json")


def dump(release: Release) -> bytes:
    """The bytes of a release file."""
    return json.dumps(records.plain(release), indent=1).encode() + b"\n"


def verify(release: Release, key: str) -> None:
    """Return if the owner of a public key released this.

    Raises:
        SignatureError: somebody else did, or nobody.
    """
    signing.verify(key, CONTEXT, records.canonical(release.package), release.signature)


def check(release: Release, installed: Build, *, key: str, refused: dict[str, str]) -> None:
    """Return if a device may install this release.

    Args:
        release: may come from anywhere.
        installed: the package that is installed now.
        key: the release key in the device's settings; "" for none.
        refused: versions that must not be tried again, and why.

    Raises:
        SignatureError: the release is not signed with the key.
        ReleaseError: it is for other devices, not newer, or was refused before.
    """
    package = release.package
    if not key:
        raise ReleaseError("this device takes no updates: release_key of agent.toml is empty")
    verify(release, key)
    what = f"{package.name} {package.version}"
    if package.name != NAME:
        raise ReleaseError(f"{what}: expected a package {NAME}")
    for field in ("architecture", "python"):
        expected, got = getattr(installed, field), getattr(package, field)
        if expected != got:
            raise ReleaseError(f"{what} is for {field} {got}, this device has {expected}")
    if not newer(package.version, installed.version):
        raise ReleaseError(f"{what} is no newer than {installed.version}, which is installed")
    if package.version in refused:
        raise ReleaseError(f"{what} was refused before: {refused[package.version]}")


def newer(version: str, than: str) -> bool:
    """Whether a version comes after another in Debian's order (deb-version(7)), epochs aside."""
    for ours, theirs in zip(_order(version), _order(than), strict=True):
        for a, b in zip_longest(ours, theirs, fillvalue=_END):  # 1.0-0 is 1.0, and 0~ before 0
            if a != b:
                return a > b
    return False


_END = ([0], 0)


def _order(version: str) -> tuple[list[tuple[list[int], int]], ...]:
    """The sort key of a version: the upstream version, then the revision.

    In each, texts and numbers are compared in turn. In a text, a tilde comes before the end, the
    end before letters, and letters before all else.
    """
    upstream, dash, revision = version.rpartition("-")
    return tuple(map(_turns, (upstream, revision) if dash else (version, "")))


def _turns(part: str) -> list[tuple[list[int], int]]:
    pairs = re.findall(r"([^0-9]*)([0-9]*)", part)
    return [([*map(_weight, text), 0], int(digits or 0)) for text, digits in pairs]


def _weight(character: str) -> int:
    if character == "~":
        return -1
    return ord(character) + (0 if character.isalpha() else 256)
