"""Root's first half of an update, `python -m edge_agent.update`: may this be installed at all?

It takes the staged files into its own folder, and believes what is there then: the signature by the
key of /etc/stillhouse/agent.toml, the digest, the control fields. It keeps the installed package,
and hands over to the copy of `install.py`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from edge_agent.update import install
from edge_agent.update.install import CACHE, ENVIRONMENT, PACKAGE, READY, RELEASE, STAGED, Update
from edge_agent.update.repack import repack
from wire import records, release
from wire.errors import ReleaseError, SettingsError, StillhouseError
from wire.release import Build, Package, Release

SETTINGS = Path("/etc/stillhouse/agent.toml")
MAX_RELEASE_BYTES = 1 << 16
MARGIN_BYTES = 64 << 20  # that stay free
_PIECE = 1 << 20


@dataclass(frozen=True)
class Trusted:
    """What root takes from agent.toml, which says what each is; the rest is the agent's affair."""

    release_key: str = ""
    update_minutes: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.update_minutes <= 24 * 60:
            raise ValueError(f"update_minutes: expected over 0 to a day, got {self.update_minutes}")


def prepare(told: Release, settings: Path, cache: Path, staged: Path) -> None:
    """Note a staged update for `install.resume`; dpkg's lock is held.

    Raises:
        StillhouseError: it is not to be installed.
        OSError: there is no room, a staged file is not there or is none, or a tool fails.
    """
    chosen, package = trusted(settings), told.package
    version, architecture = install.installed()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    table = {"version": version, "architecture": architecture, "python": python}
    own = records.build(Build, table, where="the installed package", error=ReleaseError)
    release.check(told, own, key=chosen.release_key, refused=install.refused(cache))
    # Beside each other: what is packed up, its copy, and what is unpacked, which may be as long.
    needed = package.size + 3 * _installed_bytes() + MARGIN_BYTES
    for folder in (cache, Path(sys.prefix)):
        check_room(folder, needed)
    try:
        take(staged, package, cache / "new.deb")
        check_fields(cache / "new.deb", package, cache)
        repack(release.NAME, cache / "old.deb")
        install.begin(Update(package.version, own.version, chosen.update_minutes), cache)
    except (StillhouseError, OSError):
        (cache / "new.deb").unlink(missing_ok=True)
        raise


def trusted(path: Path) -> Trusted:
    """What the agent's settings say of updates, if root alone can have written them.

    Raises:
        SettingsError: someone else may write the file or its folder; or they are wrong.
    """
    path = path.resolve()
    for each in (path, path.parent):
        try:
            found = each.stat()
        except OSError as fault:
            raise SettingsError(f"{each}: {fault.strerror}; there is no release key") from fault
        if found.st_uid != 0 or found.st_mode & 0o022:
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
        OSError: it has not.
    """
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(
            f"{folder}: an update needs {needed >> 20} MiB free, there are {free >> 20}; make room"
        )


def _installed_bytes() -> int:
    done = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${Installed-Size}", release.NAME],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return 1024 * int(done.stdout) if done.stdout.isdecimal() else 0


def take(staged: Path, package: Package, path: Path) -> None:
    """Copy the staged package file, as far as it may be long.

    Raises:
        ReleaseError: it is not the file that was released.
        OSError: it is not there, or no file, or there is no room.
    """
    partial, digest, left = path.with_name(path.name + ".part"), hashlib.sha256(), package.size + 1
    try:
        with install.open_staged(staged, PACKAGE) as source, partial.open("wb") as target:
            os.fchmod(target.fileno(), 0o600)
            while piece := source.read(min(_PIECE, left)):
                left -= len(piece)
                digest.update(piece)
                target.write(piece)
            target.flush()
            os.fsync(target.fileno())
        if (got := package.size + 1 - left) != package.size:
            more = "more" if left == 0 else f"{got}"
            raise ReleaseError(f"{PACKAGE}: expected {package.size} bytes, got {more}")
        if digest.hexdigest() != package.sha256:
            raise ReleaseError(
                f"{PACKAGE}: expected SHA-256 {package.sha256}, got {digest.hexdigest()}"
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_fields(deb: Path, package: Package, cache: Path) -> None:
    """Return if a package file is what it was released as; else it is refused for good.

    Raises:
        ReleaseError: a control field differs.
        OSError: dpkg-deb does not read it.
    """
    for field in ("Package", "Version", "Architecture"):
        done = subprocess.run(
            ["dpkg-deb", "--field", str(deb), field],
            env=ENVIRONMENT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise OSError(f"dpkg-deb failed: {done.stderr.strip()[-400:]}")
        expected = package.name if field == "Package" else getattr(package, field.lower())
        if done.stdout.strip() != expected:
            reason = f"released as {field} {expected}, and is {done.stdout.strip()!r:.80}"
            # It was released and came whole: it will be no better the next time.
            install.refuse(cache, package.version, reason)
            raise ReleaseError(reason)


def main(settings: Path = SETTINGS, cache: Path = CACHE, staged: Path = STAGED) -> int:
    """Prepare what is staged; 0, or 1 with one line on why it is not installed."""
    version = ""
    try:
        cache.mkdir(mode=0o755, exist_ok=True)
        with install.open_staged(staged, RELEASE) as file:
            told = release.parse(file.read(MAX_RELEASE_BYTES), str(staged / RELEASE))
        version = told.package.version
        with install.dpkg_to_ourselves():
            prepare(told, settings, cache, staged)
    except (StillhouseError, OSError) as fault:
        install.fail(cache, version, str(fault))
        return 1
    finally:
        # systemd would start this again and again while it is there.
        install.remove_staged(staged, READY, RELEASE, PACKAGE)
    return 0


if __name__ == "__main__":
    if main():
        sys.exit(1)
    copy = [sys.executable, "-I", "-S", str(CACHE / "install.py")]
    os.execv(sys.executable, copy)  # noqa: S606 - fixed arguments
