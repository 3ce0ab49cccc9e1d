"""The half of an update that must survive what it does: install, wait for health, or roll back.

Root runs a copy of this file in /var/cache/stillhouse, with the standard library alone: meanwhile
dpkg replaces what lies under /opt/stillhouse, and a power cut may leave it of two versions. There
lie as well

    new.deb, old.deb    what is installed, and what was before
    update.json         the update under way: each step is noted before it is done, may be done
                        again, and is where the next start goes on
    refused.json        versions that are not tried again, and why; all may read it

An update is well when the agent has written its version to the file `healthy` in its own folder.
"""

import fcntl
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

NAME = "stillhouse-edge-agent"
CACHE = Path("/var/cache/stillhouse")
STAGED = Path("/var/lib/stillhouse/update")
READY, PACKAGE, RELEASE, HEALTHY = "ready", "package.deb", "release.json", "healthy"
RUNS = 3  # an update that was interrupted so often is given up
POLL_S = 1.0
DPKG_LOCK = Path("/var/lib/dpkg/lock-frontend")
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "DEBIAN_FRONTEND": "noninteractive",
    "LC_ALL": "C.UTF-8",
}


@dataclass(frozen=True)
class Update:
    """An update under way.

    Attributes:
        version: that is installed.
        before: the version that it replaces.
        minutes: that the agent has to say that it is well.
        step: what comes next.
        runs: how often this was begun.
        reason: why it is rolled back.
    """

    version: str
    before: str
    minutes: float
    step: Literal["install", "wait", "rollback"] = "install"
    runs: int = 0
    reason: str = ""


def begin(update: Update, cache: Path) -> None:
    """Note an update whose packages lie in the cache; from here on a power cut ends in `resume`."""
    write(cache / "install.py", Path(__file__).read_bytes())
    _note(update, cache)


def resume(cache: Path = CACHE, staged: Path = STAGED) -> int:
    """Finish the update that is noted; 0, or 1 where what was before cannot be installed again."""
    update = Update(**json.loads((cache / "update.json").read_text()))
    update = _note(replace(update, runs=update.runs + 1), cache)
    if update.step != "rollback" and update.runs > RUNS:
        update = _give_up(update, f"interrupted {RUNS} times", cache)
    if update.step == "install":
        update = _install(update, cache, staged)
    if update.step == "wait":
        update = _wait(update, cache, staged)
    if update.step == "rollback":
        refuse(cache, update.version, update.reason)
        if fault := _dpkg(cache / "old.deb"):
            _say(f"{update.before} cannot be installed again: {fault}")
            return 1
        _say(f"{update.before} is back: {update.reason}")
    (cache / "new.deb").unlink(missing_ok=True)
    (cache / "update.json").unlink()
    return 0


def _install(update: Update, cache: Path, staged: Path) -> Update:
    remove_staged(staged, HEALTHY)
    _say(f"installing {update.version} over {update.before}")
    if fault := _dpkg(cache / "new.deb"):
        return _give_up(update, f"cannot be installed: {fault}", cache)
    return _note(replace(update, step="wait"), cache)


def _wait(update: Update, cache: Path, staged: Path) -> Update:
    deadline = time.monotonic() + 60 * update.minutes
    while time.monotonic() < deadline:
        if _healthy(staged) == update.version:
            _say(f"{update.version} is well")
            return update
        time.sleep(POLL_S)
    if (now := installed()[0]) != update.version:
        _say(f"{now} was installed meanwhile; it is left alone")
        return update
    return _give_up(update, f"not healthy in {update.minutes:g} minutes", cache)


def _give_up(update: Update, reason: str, cache: Path) -> Update:
    return _note(replace(update, step="rollback", reason=reason), cache)


def _healthy(staged: Path) -> str:
    """The version that the agent says to be well with."""
    try:
        with open_staged(staged, HEALTHY) as file:
            return str(json.loads(file.read(4096))["version"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""


def installed() -> tuple[str, str]:
    """Version and architecture of the package as it is installed; "" where there is none."""
    done = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${Version} ${Architecture}", NAME],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    version, _, architecture = done.stdout.partition(" ")
    return version, architecture


def _dpkg(deb: Path) -> str:
    """Install a package file; dpkg's last words where it fails."""
    with _dpkg_to_ourselves():
        done = subprocess.run(
            ["dpkg", "--install", str(deb)],
            env=ENVIRONMENT | {"DPKG_FRONTEND_LOCKED": "true"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
    return "" if done.returncode == 0 else done.stderr.strip()[-400:] or "dpkg failed"


@contextmanager
def _dpkg_to_ourselves() -> Iterator[None]:
    """Wait until apt and others are done, as they wait for each other."""
    with DPKG_LOCK.open("ab") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def open_staged(folder: Path, name: str) -> BinaryIO:
    """A file of the agent's folder, which may hold anything: regular, and no link is followed.

    Raises:
        OSError: it is not there, or something else.
    """
    at = _folder(folder)
    try:
        # Without NONBLOCK, opening a pipe that nobody writes to would never end.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.fdopen(os.open(name, flags, dir_fd=at), "rb")
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{folder / name}: expected a regular file")
    return file


def remove_staged(folder: Path, *names: str) -> None:
    """Remove files of the agent's folder, or what lies in their place."""
    with suppress(OSError):
        at = _folder(folder)
        try:
            for name in names:
                with suppress(OSError):
                    os.unlink(name, dir_fd=at)
        finally:
            os.close(at)


def _folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def refused(cache: Path) -> dict[str, str]:
    """Versions that are not tried again, and why."""
    try:
        table = json.loads((cache / "refused.json").read_text())
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in table.items()} if isinstance(table, dict) else {}


def refuse(cache: Path, version: str, reason: str) -> None:
    """Do not try a version again."""
    known = {**refused(cache), version: reason}
    write(cache / "refused.json", json.dumps(known, indent=1).encode())


def write(path: Path, content: bytes) -> None:
    """Write a file that all may read, whole or not at all, after a power cut too."""
    partial = path.with_name(path.name + ".new")
    with partial.open("wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _note(update: Update, cache: Path) -> Update:
    write(cache / "update.json", json.dumps(asdict(update)).encode())
    return update


def _say(text: str) -> None:
    print(f"update: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(resume())
