"""The agent's half of an update: it pulls a new package, and lays it out for root.

The package is pulled like an order's blobs, so it goes on after a restart; but only while the
device has no order. The file `ready` is written last, when the files beside it are complete.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from edge_agent.update.install import HEALTHY, PACKAGE, READY, RELEASE, UP, last, refused, write
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
    """Checks, pulls and stages newer packages; does nothing if no package installed the agent.

    Args:
        config: the agent's settings.
        prefix: the Python environment, where the package has written its description.
    """

    def __init__(self, config: AgentConfig, prefix: Path = Path(sys.prefix)) -> None:
        self.config, self.own = config, installed(prefix)
        self._update: Update | None = None
        self._fetch: Fetch | None = None
        self._fault = ""
        self._news = False
        self._since: dict[str, float] = {}  # when what each of root's files says began
        self._told: set[str] = set()

    @property
    def word(self) -> str:
        """Why the last update is not installed, as the agent or root has found; else ""."""
        if self._fault or self.own is None:
            return self._fault
        current, known = self.own.version, refused(self.config.updates_kept)
        later = [version for version in known if release.newer(version, current)]
        if later:
            return f"{later[-1]} is refused: {known[later[-1]]}"
        failed = last(self.config.updates_kept)
        if failed and (not failed.version or release.newer(failed.version, current)):
            return f"{failed.version} failed: {failed.reason}".lstrip()
        return self._forgotten()

    def news(self) -> bool:
        """Whether `word` says something new since this was last asked."""
        news, self._news = self._news, False
        return news

    def told(self, update: Update) -> None:
        """Hear of a newer package."""
        if self.own is None or (self._fetch and self._update == update):
            return
        self._update, self._fetch, self._fault = update, None, ""
        package = update.release.package
        try:
            known = refused(self.config.updates_kept)
            release.check(update.release, self.own, key=self.config.release_key, refused=known)
            if package.size > self.config.max_download_bytes:
                raise ReleaseError(
                    f"{package.version} has {package.size} bytes, this device accepts at most "
                    f"{self.config.max_download_bytes}; raise max_download_bytes in agent.toml"
                )
            failed = last(self.config.updates_kept)
            if failed and failed.waits(package.version):
                raise ReleaseError(
                    f"{package.version} failed: {failed.reason}; it is tried again after a day, or "
                    "when last.json is removed"
                )
            if (self.config.updates / READY).exists():
                self._news |= bool(self._forgotten())  # if "", root is working on it
                return
            store = BlobStore(self.config.updates / "blobs")
            store.keep_only({package.sha256})
            self._fetch = Fetch(
                store, update.blob, window=self.config.window, retry_s=self.config.retry_s
            )
        except (StillhouseError, OSError) as fault:
            self._failed(fault)
            return
        log.info("update: %s is available; pulling it", package.version)

    def wants(self, now_s: float) -> Iterator[Want]:
        """What to ask for now; stages the package when it is complete. For an idle device."""
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
        """Take an answer; return whether it belongs to the update."""
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
        """The connection is lost: ask again for everything, and restart the time to `healthy`."""
        self._since.pop(HEALTHY, None)
        if self._fetch:
            self._fetch.forget_asked()

    def turns(self, now_s: float) -> None:
        """Note that the agent's loop runs; after `UP_S` root is told that the agent is up."""
        self._after(UP_S, UP, now_s)

    def lives(self, now_s: float) -> None:
        """Note that the agent is connected; after `HEALTHY_S` root is told that it is well."""
        self._after(HEALTHY_S, HEALTHY, now_s)

    def _after(self, wait_s: float, name: str, now_s: float) -> None:
        """Tell root by a file once something has held for a time; this is tried only once."""
        since_s = self._since.setdefault(name, now_s)
        if self.own is None or name in self._told or now_s - since_s < wait_s:
            return
        self._told.add(name)
        content = {"version": self.own.version, "at": time.time()}
        try:
            self.config.updates.mkdir(parents=True, exist_ok=True)
            write(self.config.updates / name, json.dumps(content).encode())
        except OSError as fault:
            log.warning("update: root cannot be told that this version is %s: %s", name, fault)

    def _forgotten(self) -> str:
        """A message if root has not taken a staged package for too long; else ""."""
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
        assert self._update is not None  # noqa: S101 - it is being fetched
        assert self._fetch is not None  # noqa: S101
        folder, fetch = self.config.updates, self._fetch
        fetch.store.path(fetch.ref.digest).replace(folder / PACKAGE)
        write(folder / RELEASE, release.dump(self._update.release))
        write(folder / READY, b"")
        self._fetch = None
        log.info("update: %s is staged", self._update.release.package.version)

    def _failed(self, fault: Exception) -> None:
        log.error("update: %s", fault)
        self._fetch, self._fault, self._news = None, str(fault), True


def installed(prefix: Path) -> Build | None:
    """The package that installed a Python environment; None if none did.

    Raises:
        SettingsError: the package's description is damaged, or cannot be read.
    """
    path = prefix / "package.json"
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as fault:
        raise SettingsError(f"{path}: {fault}; install the package again") from fault
    return records.build(Build, table, where=str(path), error=SettingsError)
