"""The agent's half of an update: what it is told of, pulled piece by piece, and laid out for root.

A release is pulled as orders' blobs are, so that it goes on after a restart; but only while the
device has no order. The file `ready` comes last: what it stands beside is whole.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from edge_agent.update.install import (
    HEALTHY,
    PACKAGE,
    READY,
    RELEASE,
    UP,
    last,
    refused,
    write,
)
from ondevice.config import AgentConfig
from wire import records, release
from wire.blobs import BlobStore, Fetch
from wire.errors import ReleaseError, SettingsError, StillhouseError
from wire.messages import Chunk, Gone, Update, Want
from wire.release import Build

log = logging.getLogger("edge-agent")

UP_S = HEALTHY_S = 10.0
STAGED_S = 1800.0


class Updates:
    """What this device does about newer packages; nothing where it was not installed by one.

    Args:
        config: of the agent.
        prefix: of its Python environment, where the package says what it is.
    """

    def __init__(self, config: AgentConfig, prefix: Path = Path(sys.prefix)) -> None:
        self.config, self.own = config, installed(prefix)
        self._update: Update | None = None
        self._fetch: Fetch | None = None
        self._fault = ""
        self._since: float | None = None
        self._began: float | None = None
        self._up = self._well = False

    @property
    def word(self) -> str:
        """What became of an update that is not installed: of the one told last, or by root."""
        if self._fault or self.own is None:
            return self._fault
        own, known = self.own.version, refused(self.config.updates_kept)
        later = [version for version in known if release.newer(version, own)]
        if later:
            return f"{later[-1]} is refused: {known[later[-1]]}"
        failed = last(self.config.updates_kept)
        if failed and (not failed.version or release.newer(failed.version, own)):
            return f"{failed.version} failed: {failed.reason}".lstrip()
        return self._forgotten()

    def told(self, update: Update) -> bool:
        """There is a newer package; whether the device has something to say about it."""
        if self.own is None or (self._fetch and self._update == update):
            return False
        self._update, self._fetch, self._fault = update, None, ""
        package = update.release.package
        try:
            known = refused(self.config.updates_kept)
            release.check(update.release, self.own, key=self.config.release_key, refused=known)
            if package.size > self.config.max_download_bytes:
                raise ReleaseError(
                    f"{package.version} has {package.size} bytes, this device takes at most "
                    f"{self.config.max_download_bytes}; raise max_download_bytes in agent.toml"
                )
            failed = last(self.config.updates_kept)
            if failed and failed.waits(package.version):
                raise ReleaseError(
                    f"{package.version} failed: {failed.reason}; it is tried again after a day, or "
                    "when last.json is removed"
                )
            if (self.config.updates / READY).exists():
                return bool(self._forgotten())  # or root is at it
            store = BlobStore(self.config.updates / "blobs")
            store.keep_only({package.sha256})
            self._fetch = Fetch(
                store, update.blob, window=self.config.window, retry_s=self.config.retry_s
            )
        except (StillhouseError, OSError) as fault:
            return self._failed(fault)
        log.info("update: %s is there; pulling it", package.version)
        return False

    def wants(self, now_s: float) -> Iterator[Want]:
        """What to ask for now, while there is nothing else to do; stages what is whole."""
        if self._fetch is None:
            return
        try:
            want = self._fetch.wants(now_s)
            if self._fetch.done:
                self._stage()
        except (StillhouseError, OSError) as fault:
            self._failed(fault)
            return
        if want:
            yield want

    def take(self, message: Chunk | Gone, body: memoryview) -> bool:
        """Take an answer; whether it was one to this."""
        if self._fetch is None or message.digest != self._fetch.ref.digest:
            return False
        try:
            if isinstance(message, Gone):
                self._fetch.gone()
            else:
                self._fetch.chunk(message, body)
        except (StillhouseError, OSError) as fault:
            self._failed(fault)
        return True

    def pause(self) -> None:
        """The connection is lost: what was asked must be asked again, and nothing is well yet."""
        self._since = None
        if self._fetch:
            self._fetch.forget_asked()

    def turns(self, now_s: float) -> None:
        """The agent's loop turns; after `UP_S` of that, root is told that it is up."""
        self._began = now_s if self._began is None else self._began
        if not self._up and now_s - self._began >= UP_S:
            self._up = True
            self._tell(UP)

    def lives(self, now_s: float) -> None:
        """The agent is connected; after `HEALTHY_S` of that, root is told that it is well."""
        self._since = now_s if self._since is None else self._since
        if not self._well and now_s - self._since >= HEALTHY_S:
            self._well = True
            self._tell(HEALTHY)

    def _tell(self, name: str) -> None:
        """Tell root, or never: it is tried once."""
        if self.own is None:
            return
        said = {"version": self.own.version, "at": time.time()}
        try:
            self.config.updates.mkdir(parents=True, exist_ok=True)
            write(self.config.updates / name, json.dumps(said).encode())
        except OSError as fault:
            log.warning("update: nobody can be told that this version is %s: %s", name, fault)

    def _forgotten(self) -> str:
        """What is wrong if root has let a staged package lie."""
        try:
            at = (self.config.updates / READY).stat().st_mtime
        except OSError:
            return ""
        if time.time() - at < STAGED_S:
            return ""
        return (
            f"staged for over {STAGED_S / 60:g} minutes; on the device: "
            "systemctl status stillhouse-update.path stillhouse-update.service"
        )

    def _stage(self) -> None:
        assert self._update is not None  # noqa: S101 - it is what is fetched
        assert self._fetch is not None  # noqa: S101
        folder, fetch = self.config.updates, self._fetch
        fetch.store.path(fetch.ref.digest).replace(folder / PACKAGE)
        write(folder / RELEASE, release.dump(self._update.release))
        write(folder / READY, b"")
        self._fetch = None
        log.info("update: %s is staged", self._update.release.package.version)

    def _failed(self, fault: Exception) -> bool:
        log.error("update: %s", fault)
        self._fetch, self._fault = None, str(fault)
        return True


def installed(prefix: Path) -> Build | None:
    """The package that a Python environment came by, if one says so.

    Raises:
        SettingsError: its description is damaged, or cannot be read.
    """
    path = prefix / "package.json"
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as fault:
        raise SettingsError(f"{path}: {fault}; install the package again") from fault
    return records.build(Build, table, where=str(path), error=SettingsError)
