"""Root's first half of an update, `python -m edge_agent.update`: may this be installed at all?

It takes the staged files into its own folder, and believes what is there then: the signature by the
key of /etc/stillhouse/agent.toml, the digest, the control fields. It keeps the installed package,
and hands over to the copy of `install.py`.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from edge_agent import config
from edge_agent.config import AgentConfig
from edge_agent.update import install
from edge_agent.update.install import CACHE, ENVIRONMENT, PACKAGE, READY, RELEASE, STAGED, Update
from edge_agent.update.repack import repack
from wire import release
from wire.errors import ReleaseError, SettingsError, StillhouseError
from wire.release import Build, Package

SETTINGS = Path("/etc/stillhouse/agent.toml")
MAX_RELEASE_BYTES = 1 << 16
_PIECE = 1 << 20


def prepare(settings: Path, cache: Path, staged: Path) -> None:
    """Note the staged update for `install.resume`.

    Raises:
        StillhouseError: it is not to be installed.
        OSError: a staged file is not there, or is none.
    """
    chosen = trusted(settings)
    own = Build(*install.installed(), python=f"{sys.version_info.major}.{sys.version_info.minor}")
    with install.open_staged(staged, RELEASE) as file:
        told = release.parse(file.read(MAX_RELEASE_BYTES), str(staged / RELEASE))
    release.check(told, own, key=chosen.release_key, refused=install.refused(cache))
    package = told.package
    take(staged, package, cache / "new.deb")
    try:
        _check_fields(cache / "new.deb", package)
        repack(release.NAME, cache / "old.deb")
    except ReleaseError as fault:
        # It was released and came whole: it will be no better the next time.
        install.refuse(cache, package.version, str(fault))
        raise
    install.begin(Update(package.version, own.version, chosen.update_minutes), cache)


def trusted(path: Path) -> AgentConfig:
    """The agent's settings, if root alone can have written them.

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
    return config.load(path)


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


def _check_fields(deb: Path, package: Package) -> None:
    for field in ("Package", "Version", "Architecture"):
        done = subprocess.run(
            ["dpkg-deb", "--field", str(deb), field],
            env=ENVIRONMENT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        expected = package.name if field == "Package" else getattr(package, field.lower())
        if done.stdout.strip() != expected:
            raise ReleaseError(
                f"released as {field} {expected}, and is {done.stdout.strip() or done.stderr!r:.80}"
            )


def main() -> int:
    """Prepare what is staged; 0, or 1 with one line on why it is not installed."""
    CACHE.mkdir(mode=0o755, exist_ok=True)
    try:
        prepare(SETTINGS, CACHE, STAGED)
    except (StillhouseError, OSError) as fault:
        print(f"update: {fault}", file=sys.stderr)
        return 1
    finally:
        # systemd would start this again and again while it is there.
        install.remove_staged(STAGED, READY, RELEASE, PACKAGE)
    return 0


if __name__ == "__main__":
    if main():
        sys.exit(1)
    copy = [sys.executable, "-I", "-S", str(CACHE / "install.py")]
    os.execv(sys.executable, copy)  # noqa: S606 - fixed arguments
