"""Root's first half of an update, `python -m edge_agent.update`: checks what the agent staged.

It copies the staged files into root's folder, and checks the copies: the signature by the key in
/etc/stillhouse/agent.toml, the digest, the control fields. It keeps the installed package as a
file, and then runs the copy of `install.py`.
"""

import hashlib
import os
import shutil
import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from edge_agent.update import install
from edge_agent.update.install import CACHE, PACKAGE, READY, RELEASE, STAGED, Update
from edge_agent.update.repack import repack, run
from wire import records, release
from wire.errors import ReleaseError, SettingsError, StillhouseError
from wire.release import Build, Package, Release

SETTINGS = Path("/etc/stillhouse/agent.toml")
MAX_RELEASE_BYTES = 1 << 16
MARGIN_BYTES = 64 << 20  # must stay free
_PIECE = 1 << 20


@dataclass(frozen=True)
class Trusted:
    """The settings that root reads from agent.toml, where they are explained."""

    release_key: str = ""
    update_minutes: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.update_minutes <= 24 * 60:
            raise ValueError(f"update_minutes: expected over 0 to a day, got {self.update_minutes}")


def prepare(staged_release: Release, settings: Path, cache: Path, staged: Path) -> None:
    """Check a staged update, and note it for `install.resume`; the caller holds dpkg's lock.

    Raises:
        StillhouseError: it must not be installed.
        OSError: there is no room, a staged file is missing or not a file, or a tool fails.
    """
    chosen, package = trusted(settings), staged_release.package
    version, architecture = install.installed()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    table = {"version": version, "architecture": architecture, "python": python}
    current = records.build(Build, table, where="the installed package", error=ReleaseError)
    refused = install.refused(cache)
    release.check(staged_release, current, key=chosen.release_key, refused=refused)
    # There is room for the new package, the tree and file of the old one, and the unpacked files.
    kib = run("dpkg-query", "--show", "--showformat", "${Installed-Size}", release.NAME)
    needed = package.size + 3 * 1024 * int(kib or 0) + MARGIN_BYTES
    for folder in (cache, Path(sys.prefix)):
        check_room(folder, needed)
    try:
        take(staged, package, cache / "new.deb")
        check_fields(cache / "new.deb", package, cache)
        repack(release.NAME, cache / "old.deb")
        install.begin(Update(package.version, current.version, chosen.update_minutes), cache)
    except (StillhouseError, OSError):
        (cache / "new.deb").unlink(missing_ok=True)
        raise


def trusted(path: Path) -> Trusted:
    """The agent's settings for updates, if only root can have written them.

    Raises:
        SettingsError: others may write the file or its folder, or the settings are wrong.
    """
    path = path.resolve()
    for each in (path, path.parent):
        try:
            status = each.stat()
        except OSError as fault:
            raise SettingsError(f"{each}: {fault.strerror}; there is no release key") from fault
        if status.st_uid != 0 or status.st_mode & 0o022:
            raise SettingsError(
                f"{each} can be written by others than root, and holds the release key: "
                f"chown root {each} && chmod go-w {each}"
            )
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise SettingsError(f"{path}: {fault}; there is no release key") from fault
    table = {each.name: table[each.name] for each in fields(Trusted) if each.name in table}
    return records.build(Trusted, table, where=str(path), error=SettingsError)


def check_room(folder: Path, needed: int) -> None:
    """Return if a folder's disk has so many bytes free.

    Raises:
        OSError: there is less room.
    """
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(
            f"{folder}: an update needs {needed >> 20} MiB free, there are {free >> 20}; make room"
        )


def take(staged: Path, package: Package, path: Path) -> None:
    """Copy the staged package file; read at most one byte more than it should have.

    Raises:
        ReleaseError: it is not the file that was released.
        OSError: it is missing, or not a file, or there is no room.
    """
    partial, digest = path.with_name(path.name + ".part"), hashlib.sha256()
    remaining = package.size + 1
    try:
        with install.open_staged(staged, PACKAGE) as source, partial.open("wb") as target:
            os.fchmod(target.fileno(), 0o600)
            while piece := source.read(min(_PIECE, remaining)):
                remaining -= len(piece)
                digest.update(piece)
                target.write(piece)
            target.flush()
            os.fsync(target.fileno())
        if (size := package.size + 1 - remaining) != package.size:
            got = "more" if remaining == 0 else f"{size}"
            raise ReleaseError(f"{PACKAGE}: expected {package.size} bytes, got {got}")
        if digest.hexdigest() != package.sha256:
            raise ReleaseError(
                f"{PACKAGE}: expected SHA-256 {package.sha256}, got {digest.hexdigest()}"
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_fields(deb: Path, package: Package, cache: Path) -> None:
    """Return if a package file's control fields match its release; else refuse it for good.

    Raises:
        ReleaseError: a control field differs.
        OSError: dpkg-deb cannot read the file.
    """
    for field in ("Package", "Version", "Architecture"):
        found = run("dpkg-deb", "--field", str(deb), field).strip()
        expected = package.name if field == "Package" else getattr(package, field.lower())
        if found != expected:
            reason = f"released as {field} {expected}, and is {found!r:.80}"
            # It was released like this and arrived intact, so trying again would not help.
            install.refuse(cache, package.version, reason)
            raise ReleaseError(reason)


def main(settings: Path = SETTINGS, cache: Path = CACHE, staged: Path = STAGED) -> int:
    """Prepare the staged update; return 0, or 1 after one line on why it is not installed."""
    version = ""
    try:
        cache.mkdir(mode=0o755, exist_ok=True)
        with install.open_staged(staged, RELEASE) as file:
            staged_release = release.parse(file.read(MAX_RELEASE_BYTES), str(staged / RELEASE))
        version = staged_release.package.version
        with install.dpkg_to_ourselves():
            prepare(staged_release, settings, cache, staged)
    except (StillhouseError, OSError) as fault:
        install.fail(cache, version, str(fault))
        return 1
    finally:
        # systemd would start this program again and again while `ready` is there.
        install.remove_staged(staged, READY, RELEASE, PACKAGE)
    return 0


if __name__ == "__main__":
    if main():
        sys.exit(1)
    copy = [sys.executable, "-I", "-S", str(CACHE / "install.py")]
    os.execv(sys.executable, copy)  # noqa: S606 - fixed arguments
