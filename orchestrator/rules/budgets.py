"""What each device may cost: pure rules, so that one device cannot keep the orchestrator busy.

    messages    `MESSAGES` at once and `MESSAGES_S` a second
    wants       `WANTS` at once and `WANTS_S` a second: questions for chunks
    chunks      as many as it was asked for
    downloads   `DOWNLOAD_BYTES` at once and `DOWNLOAD_BYTES_S` a second

What goes beyond is dropped before it is decoded. Honest devices stay far below: all that a device
needs for an order, and a package, are less than 4 GiB. What is dropped they send or ask for again.
"""

from collections import OrderedDict
from dataclasses import dataclass

from wire.frames import Kind

MESSAGES, MESSAGES_S = 200.0, 20.0
WANTS, WANTS_S = 2000.0, 500.0
DOWNLOAD_BYTES, DOWNLOAD_BYTES_S = float(4 << 30), float(64 << 20)
MOST_ASKED = 4096  # chunks that a device was asked for and that may still come
DEVICES = 20_000  # whose budgets are kept: strangers can invent any number of names
TOLD_S = 60.0  # from one log line about a device to the next


@dataclass
class Bucket:
    """A token bucket: it holds up to `size`, fills by `rate` a second, and begins full."""

    size: float
    rate: float
    level: float
    filled_s: float

    def take(self, amount: float, now_s: float) -> bool:
        """Take an amount out; whether it was there."""
        self.level = min(self.size, self.level + self.rate * (now_s - self.filled_s))
        self.filled_s = now_s
        if amount > self.level:
            return False
        self.level -= amount
        return True


@dataclass
class Budget:
    """One device's budget, and when a log line last said that it was exceeded."""

    messages: Bucket
    wants: Bucket
    downloads: Bucket
    asked: int = 0
    told_s: float = float("-inf")


class Budgets:
    """The budgets of all devices. Those heard of longest ago are forgotten beyond `DEVICES`."""

    def __init__(self) -> None:
        self._devices: OrderedDict[str, Budget] = OrderedDict()

    def reads(self, device: str, kind: Kind | None, now_s: float) -> bool:
        """Whether a message of a device may be read.

        Args:
            device: its sender.
            kind: of the message; None if it is no message of ours.
            now_s: monotonic seconds.
        """
        budget = self._of(device, now_s)
        if kind is Kind.WANT:
            return budget.wants.take(1, now_s)
        if kind is not Kind.CHUNK:
            return budget.messages.take(1, now_s)
        if budget.asked < 1:
            return False
        budget.asked -= 1
        return True

    def asked(self, device: str, chunks: int, now_s: float) -> None:
        """Note that a device was asked for so many chunks."""
        budget = self._of(device, now_s)
        budget.asked = min(budget.asked + chunks, MOST_ASKED)

    def download(self, device: str, size: int, now_s: float) -> bool:
        """Whether a device may be sent so many bytes more."""
        return self._of(device, now_s).downloads.take(size, now_s)

    def tells(self, device: str, now_s: float) -> bool:
        """Whether it is time for a log line about a device that exceeds its budget."""
        budget = self._of(device, now_s)
        if now_s - budget.told_s < TOLD_S:
            return False
        budget.told_s = now_s
        return True

    def _of(self, device: str, now_s: float) -> Budget:
        budget = self._devices.get(device)
        if budget is None:
            budget = self._devices[device] = Budget(
                Bucket(MESSAGES, MESSAGES_S, MESSAGES, now_s),
                Bucket(WANTS, WANTS_S, WANTS, now_s),
                Bucket(DOWNLOAD_BYTES, DOWNLOAD_BYTES_S, DOWNLOAD_BYTES, now_s),
            )
            if len(self._devices) > DEVICES:
                self._devices.popitem(last=False)
        else:
            self._devices.move_to_end(device)
        return budget
