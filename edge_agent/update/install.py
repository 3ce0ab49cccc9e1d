"""Root's second half of an update: install, wait until the agent is well, or roll back.

It must survive its own work: dpkg replaces the files under /opt/stillhouse meanwhile, and a power
cut may leave a mixture of two versions there. So root runs a copy of this file, which needs only
the standard library, in /var/cache/stillhouse. Beside the copy lie

    new.deb, old.deb    the new package, and the one that it replaces
    update.json         the current update. Each step is noted before it is done and may be
                        repeated; the next start goes on there
    refused.json        versions that are not tried again, and why; all may read it
    last.json           the last failure that was no version's fault; all may read it

An update is well when the agent has written its version to the file `healthy` in the agent's
folder. A file `up` there says only that the agent runs. Then the broker may be away, and the wait
goes on, for a day at most. A version is refused only for its own faults; after any other failure it
is tried again a day later.
"""

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

NAME = "stillhouse-edge-agent"
CACHE = Path("/var/cache/stillhouse")
STAGED = Path("/var/lib/stillhouse/update")
READY, PACKAGE, RELEASE = "ready", "package.deb", "release.json"
UP, HEALTHY = "up", "healthy"
RUNS = 3  # an update is given up after so many interruptions
POLL_S = 1.0
DAY_S = 86400.0
DPKG_S = 1800.0
DPKG_LOCK = Path("/var/lib/dpkg/lock-frontend")
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "DEBIAN_FRONTEND": "noninteractive",
    "LC_ALL": "C.UTF-8",
}


@dataclass(frozen=True)
class Update:
    """The state of an update.

    Attributes:
        version: the version to install.
        before: the version that it replaces.
        minutes: how long the agent has to say that it is well.
        step: what comes next.
        runs: how often the update was started or resumed.
        reason: why it is rolled back.
        refuse: the reason is the version's fault, so the version is not tried again.
    """

    version: str
    before: str
    minutes: float
    step: Literal["install", "wait", "rollback"] = "install"
    runs: int = 0
    reason: str = ""
    refuse: bool = True


class Failure(NamedTuple):
    """Why an update failed; `refuse` says that it is the package's fault."""

    reason: str
    refuse: bool


class Last(NamedTuple):
    """The last failure: version ("" for none in particular), reason, and time (Unix seconds).

    A device asks for that version again after a day.
    """

    version: str
    reason: str
    at: float

    def waits(self, version: str) -> bool:
        """Whether it is too early to try a version again; not if the clock was set back."""
        return version == self.version and 0 <= time.time() - self.at < DAY_S


class _OvertakenError(Exception):
    """Somebody else has installed another version meanwhile."""


def begin(update: Update, cache: Path) -> None:
    """Note an update whose packages lie in the cache; after a power cut `resume` goes on."""
    write(cache / "install.py", Path(__file__).read_bytes())
    write(cache / "update.json", json.dumps(asdict(update)).encode())


def resume(cache: Path = CACHE, staged: Path = STAGED) -> int:
    """Finish the noted update; return 0, or 1 if that fails or the old version cannot come back."""
    try:
        update = Update(**json.loads((cache / "update.json").read_text()))
    except (OSError, ValueError, TypeError) as fault:
        _say(f"update.json: {fault}; if the agent does not run: dpkg -i {cache / 'old.deb'}")
        with suppress(OSError):
            _end(cache)
        return 1
    try:
        return _go_on(update, cache, staged)
    except _OvertakenError as other:
        _say(f"{other} was installed meanwhile; it is left alone")
        _end(cache)
        return 0
    except OSError as fault:
        _say(f"{fault}; tried again")
        return 1


def _go_on(update: Update, cache: Path, staged: Path) -> int:
    update = _note(replace(update, runs=update.runs + 1), cache)
    if update.step != "rollback" and update.runs > RUNS:
        update = _give_up(update, Failure(f"interrupted {RUNS} times", refuse=False), cache)
    if update.step == "install":
        update = _install(update, cache, staged)
    if update.step == "wait":
        update = _wait(update, cache, staged)
    if update.step == "wait":
        (cache / "last.json").unlink(missing_ok=True)
    else:
        # Before the old version's agent starts, because it reads this.
        _record(update, cache)
        if failure := _put(cache / "old.deb", update):
            reason = f"{update.before} cannot be installed again: {failure.reason}"
            fail(cache, "", reason)
            return 1
        if update.refuse:
            (cache / "last.json").unlink(missing_ok=True)
        _say(f"{update.before} is back: {update.reason}")
    _end(cache)
    return 0


def _end(cache: Path) -> None:
    (cache / "new.deb").unlink(missing_ok=True)
    (cache / "update.json").unlink(missing_ok=True)


def _install(update: Update, cache: Path, staged: Path) -> Update:
    remove_staged(staged, UP, HEALTHY)
    _say(f"installing {update.version} over {update.before}")
    if failure := _put(cache / "new.deb", update):
        reason = f"cannot be installed: {failure.reason}"
        return _give_up(update, failure._replace(reason=reason), cache)
    return _note(replace(update, step="wait"), cache)


def _wait(update: Update, cache: Path, staged: Path) -> Update:
    began_s, first_s = time.monotonic(), 60 * update.minutes
    within_s = first_s
    while _version_in(staged, HEALTHY) != update.version:
        if time.monotonic() - began_s >= within_s:
            if (now := installed()[0]) != update.version:
                raise _OvertakenError(now)
            if _version_in(staged, UP) != update.version:
                reason = f"not healthy in {update.minutes:g} minutes"
                return _give_up(update, Failure(reason, refuse=True), cache)
            if within_s >= DAY_S:
                reason = "it runs, and has not stayed connected to the broker for a day"
                return _give_up(update, Failure(reason, refuse=False), cache)
            if within_s == first_s:
                _say(f"{update.version} runs, but is not connected; waiting, for a day at most")
            within_s = min(within_s + first_s, DAY_S)
        time.sleep(POLL_S)
    _say(f"{update.version} is well")
    return update


def _give_up(update: Update, failure: Failure, cache: Path) -> Update:
    # Remove this first, since the rest may need the room.
    with suppress(OSError):
        (cache / "new.deb").unlink()
    back = replace(update, step="rollback", reason=failure.reason, refuse=failure.refuse)
    return _note(back, cache)


def _record(update: Update, cache: Path) -> None:
    """Record the refusal of the version, or the failure; if that fails, go on rolling back."""
    if not update.refuse:
        fail(cache, update.version, update.reason)
        return
    try:
        refuse(cache, update.version, update.reason)
    except OSError as fault:
        _say(f"{update.version} cannot be refused: {fault}")


def _version_in(staged: Path, name: str) -> str:
    """The version that the agent has written to one of its files; "" without one."""
    try:
        with open_staged(staged, name) as file:
            return str(json.loads(file.read(4096))["version"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""


def installed() -> tuple[str, str]:
    """Version and architecture of the installed package; "" if there is none."""
    done = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${Version} ${Architecture}", NAME],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    version, _, architecture = done.stdout.partition(" ")
    return version, architecture


def _put(deb: Path, update: Update) -> Failure | None:
    """Install a package file over one of this update's two versions, or over none.

    Raises:
        _OvertakenError: another version is installed.
    """
    with dpkg_to_ourselves():
        now = installed()[0]
        if now not in ("", update.version, update.before):
            raise _OvertakenError(now)
        return _dpkg(deb)


def _dpkg(deb: Path, command: tuple[str, ...] = ("dpkg", "--install")) -> Failure | None:
    """Run dpkg for `DPKG_S` at most; if it fails, return the last it printed."""
    with subprocess.Popen(
        [*command, str(deb)],
        env=ENVIRONMENT | {"DPKG_FRONTEND_LOCKED": "true"},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True,
    ) as running:  # fmt: skip
        try:
            _, printed = running.communicate(timeout=DPKG_S)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # with the package's scripts
            return Failure(f"dpkg did not end in {DPKG_S / 60:g} minutes", refuse=True)
    if running.returncode == 0:
        return None
    if running.returncode < 0:  # out of memory, say
        return Failure(f"dpkg was ended by signal {-running.returncode}", refuse=False)
    refuse = os.strerror(errno.ENOSPC) not in printed
    return Failure(printed.strip()[-400:] or "dpkg failed", refuse)


@contextmanager
def dpkg_to_ourselves() -> Iterator[None]:
    """Hold dpkg's lock, after waiting for apt and others; do not nest this."""
    with DPKG_LOCK.open("ab") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def open_staged(folder: Path, name: str) -> BinaryIO:
    """A file of the agent's folder, which may hold anything: no link is followed.

    Raises:
        OSError: the file is missing, or not a regular file.
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
    """Remove files of the agent's folder, or whatever has their names."""
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
    """Note that a version must not be tried again."""
    known = {**refused(cache), version: reason}
    write(cache / "refused.json", json.dumps(known, indent=1).encode())


def last(cache: Path) -> Last | None:
    """The last failure; None if an update has succeeded since."""
    try:
        table = json.loads((cache / "last.json").read_text())
        return Last(str(table["version"]), str(table["reason"]), float(table["at"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def fail(cache: Path, version: str, reason: str) -> None:
    """Print a failure, and note it for the agent, which reports it; retried after a day."""
    _say(reason)
    failure = Last(version, reason, time.time())._asdict()
    try:
        write(cache / "last.json", json.dumps(failure, indent=1).encode())
    except OSError as fault:
        _say(f"last.json cannot be written: {fault}")


def write(path: Path, content: bytes) -> None:
    """Write a file that all may read; even a power cut leaves all of it or nothing."""
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
    """Note the next step; if that fails, a restart repeats the step before."""
    try:
        write(cache / "update.json", json.dumps(asdict(update)).encode())
    except OSError as fault:
        _say(f"update.json cannot be written: {fault}")
    return update


def _say(text: str) -> None:
    print(f"update: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(resume())
