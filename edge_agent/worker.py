"""The thread that does orders, one at a time."""

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

from edge_agent.supply import Supply
from ondevice.images import ImageSet
from ondevice.kept import KeptFile
from ondevice.outcome import Outcome
from ondevice.work import CancelledError, Desk, perform
from wire.blobs import BlobStore
from wire.errors import StillhouseError
from wire.messages import Order
from wire.storage import Patience

log = logging.getLogger("edge-agent")


class Advanced(NamedTuple):
    """Progress: `done` of `total` in a phase."""

    phase: str
    done: int
    total: int


class Ended(NamedTuple):
    """An order has ended, with its outcome or with a fault."""

    order: Order
    outcome: Outcome | StillhouseError


class Worker:
    """Does orders in a thread of its own, which calls `emit` with its events."""

    def __init__(self, emit: Callable[[Advanced | Ended], None], threads: int) -> None:
        self._emit, self._threads = emit, threads
        self._cancel = threading.Event()
        self._thread: threading.Thread | None = None

    def pause(self, seconds: float) -> bool:
        """Wait for some seconds; return early, and true, if the order is cancelled."""
        return self._cancel.wait(seconds)

    def start(
        self,
        order: Order,
        supply: Supply,
        kept_file: KeptFile,
        *,
        images: ImageSet,
        blobs: BlobStore,
        patience: Patience,
    ) -> None:
        """Begin an order, after the cancelled one has ended.

        While the disk is full, the order's thread waits for room.
        """
        if self._thread:  # ends within a step; its Ended comes first
            self._thread.join()
        cancel = self._cancel = threading.Event()
        desk = Desk(
            images,
            blobs,
            self._threads,
            lambda phase, done, total: self._emit(Advanced(phase, done, total)),
            cancel,
        )

        def work() -> None:
            outcome: Outcome | StillhouseError
            try:
                outcome = patience.attempt(
                    lambda: perform(order, supply.artifact(), kept_file, desk)
                )
            except StillhouseError as fault:
                # A cancelled order that waited for room ends with the fault that it met.
                outcome = CancelledError() if cancel.is_set() else fault
            except Exception as fault:
                log.exception("order %d of %s failed", order.sequence, order.run)
                outcome = StillhouseError(f"{type(fault).__name__}: {fault}")
            self._emit(Ended(order, outcome))

        self._thread = threading.Thread(target=work, name="work", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Cancel the order, because a newer one came."""
        self._cancel.set()

    def end(self, timeout_s: float) -> None:
        """Cancel the order, and wait at most `timeout_s` until it has ended."""
        self._cancel.set()
        if self._thread:
            self._thread.join(timeout_s)
