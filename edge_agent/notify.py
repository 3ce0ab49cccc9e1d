"""Words to systemd, for a unit of Type=notify: sd_notify(3). Without systemd they go nowhere."""

import logging
import os
import socket
import time

log = logging.getLogger("edge-agent")


class Notifier:
    """The service manager that started this process, if one did.

    Args:
        environment: as systemd sets it: NOTIFY_SOCKET, and WATCHDOG_USEC with WATCHDOG_PID.
    """

    def __init__(self, environment: "os._Environ[str] | dict[str, str]" = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        # A name that begins with @ is in the abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        usec, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
        ours = usec.isdigit() and pid in ("", str(os.getpid()))
        self._every = int(usec) / 2e6 if ours else 0.0
        self._alive = 0.0

    def ready(self, status: str) -> None:
        """The service is up; `systemctl status` shows the text."""
        self._say(f"READY=1\nSTATUS={status}")

    def status(self, text: str) -> None:
        """What `systemctl status` shows from now on."""
        self._say(f"STATUS={text}")

    def alive(self) -> None:
        """Feed the watchdog, twice in its time; to be called from the loop that it watches."""
        now = time.monotonic()
        if self._every and now - self._alive >= self._every:
            self._alive = now
            self._say("WATCHDOG=1")

    def stopping(self) -> None:
        """The service ends by itself."""
        self._say("STOPPING=1")

    def _say(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
                end.sendto(text.encode(), self._address)
        except OSError as fault:
            log.debug("systemd cannot be told: %s", fault)
