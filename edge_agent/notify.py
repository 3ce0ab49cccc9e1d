"""Messages to systemd for a unit of Type=notify, see sd_notify(3). Without systemd none is sent."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("edge-agent")

BUSY_S = 1800  # a folder of many images may take so long; the unit's TimeoutStartSec is the same


class Notifier:
    """The service manager that started this process, if there is one.

    Args:
        environment: systemd sets NOTIFY_SOCKET, and WATCHDOG_USEC with WATCHDOG_PID, in it.
    """

    def __init__(self, environment: "os._Environ[str] | dict[str, str]" = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        # A name that begins with @ is in the abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        usec, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
        ours = usec.isdigit() and pid in ("", str(os.getpid()))
        self._usec = int(usec) if ours else 0
        self._every = self._usec / 2e6
        self._alive = 0.0

    def ready(self, status: str) -> None:
        """Say that the service is up; `systemctl status` shows the text."""
        self._say(f"READY=1\nSTATUS={_line(status)}")

    def status(self, text: str) -> None:
        """Set the text that `systemctl status` shows."""
        self._say(f"STATUS={_line(text)}")

    def alive(self) -> None:
        """Feed the watchdog, at most twice in its interval; called by the loop that it watches."""
        now = time.monotonic()
        if self._every and now - self._alive >= self._every:
            self._alive = now
            self._say("WATCHDOG=1")

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Within the block nothing feeds the watchdog, so it waits for `BUSY_S`."""
        if not self._every:
            yield
            return
        self._say(f"WATCHDOG_USEC={BUSY_S * 1_000_000}\nWATCHDOG=1")
        try:
            yield
        finally:
            self._say(f"WATCHDOG_USEC={self._usec}\nWATCHDOG=1")

    def stopping(self) -> None:
        """Say that the service is ending."""
        self._say("STOPPING=1")

    def _say(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
                end.sendto(text.encode(), self._address)
        except OSError as fault:
            log.debug("systemd cannot be told: %s", fault)


def _line(text: str) -> str:
    """The text on one line; systemd would take a second line for another message."""
    return " ".join(text.split())
