"""The thread that does orders, one at a time."""

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

from edge_agent.supply import Supply
from ondevice.images import ImageSet
from ondevice.kept import KeptFile
from ondevice.outcome import Outcome
from ondevice.work import Desk, perform
from wire.blobs import BlobStore
from wire.errors import StillhouseError
from wire.messages import Order
from wire.storage import Patience

log = logging.getLogger("edge-agent")


class Advanced(NamedTuple):
    """The worker is so far."""

    phase: str
    done: int
    total: int


class Ended(NamedTuple):
    """An order is done, or ended with a fault."""

    order: Order
    outcome: Outcome | StillhouseError


class Worker:
    """Does orders; what it has to say goes to `emit`, in its thread."""

    def __init__(self, emit: Callable[[Advanced | Ended], None], threads: int) -> None:
        self._emit, self._threads = emit, threads
        self._cancel = threading.Event()
        self._thread: threading.Thread | None = None

    def pause(self, seconds: float) -> bool:
        """Wait so long; whether the order was cancelled."""
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
        """Begin an order, once the cancelled one before has ended; where the disk is full, wait."""
        if self._thread:  # it ends within a step, and its Ended comes first
            self._thread.join()
        self._cancel = threading.Event()
        desk = Desk(
            images,
            blobs,
            self._threads,
            lambda phase, done, total: self._emit(Advanced(phase, done, total)),
            self._cancel,
        )

        def work() -> None:
            outcome: Outcome | StillhouseError
            try:
                outcome = patience.attempt(
                    lambda: perform(order, supply.artifact(), kept_file, desk)
                )
            except StillhouseError as fault:
                outcome = fault
            except Exception as fault:
                log.exception("order %d of %s failed", order.sequence, order.run)
                outcome = StillhouseError(f"{type(fault).__name__}: {fault}")
            self._emit(Ended(order, outcome))

        self._thread = threading.Thread(target=work, name="work", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """A newer order came."""
        self._cancel.set()

    def end(self, timeout_s: float) -> None:
        """Cancel the order, and wait until it has ended, but no longer."""
        self._cancel.set()
        if self._thread:
            self._thread.join(timeout_s)
