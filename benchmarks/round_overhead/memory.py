"""Memory of a process and its descendants, as the kernel counts it.

RSS counts a page in every process that maps it. PSS (proportional set size) divides each page by
the number of processes that map it. PSS of processes can be added, but it depends on which others
map the same libraries.
"""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

PERIOD_S = 0.02
SETTLE_S = 2.0
_PROC = Path("/proc")


@dataclass(frozen=True)
class Memory:
    """Bytes of memory, and the number of processes that use them."""

    rss: int = 0
    pss: int = 0
    processes: int = 0

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(self.rss + other.rss, self.pss + other.pss, self.processes + other.processes)

    def highest(self, other: "Memory") -> "Memory":
        """The maximum of each figure."""
        return Memory(
            max(self.rss, other.rss),
            max(self.pss, other.pss),
            max(self.processes, other.processes),
        )


@dataclass(frozen=True)
class Weights:
    """Memory of each device before its first order, after the last one, and at its peak.

    `server` is the server's peak.
    """

    fresh: tuple[Memory, ...]
    after: tuple[Memory, ...]
    peak: tuple[Memory, ...]
    server: Memory


def weigh(devices: Sequence[int], start: Callable[[], int], finish: Callable[[], None]) -> Weights:
    """The memory of processes before, during and after some work.

    Args:
        devices: their process ids.
        start: starts the work, and returns the server's process id.
        finish: waits until the work is done.
    """
    time.sleep(SETTLE_S)
    fresh = of(devices)
    server = start()
    with Watch([server, *devices]) as watch:
        finish()
    time.sleep(SETTLE_S)
    after = of(devices)
    return Weights(
        tuple(fresh[pid] for pid in devices),
        tuple(after[pid] for pid in devices),
        tuple(watch.peak[pid] for pid in devices),
        watch.peak[server],
    )


def of(roots: Iterable[int]) -> dict[int, Memory]:
    """The current memory of each root with all its descendants; zeros without a procfs."""
    children = defaultdict(list)
    for entry in _PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in brackets, may hold anything; the parent is the second field after it.
            parent = entry.read_bytes().rpartition(b")")[2].split()[1]
            children[int(parent)].append(int(entry.parent.name))
    return {root: _tree(root, children) for root in roots}


def _tree(pid: int, children: Mapping[int, Sequence[int]]) -> Memory:
    return sum((_tree(child, children) for child in children.get(pid, ())), _one(pid))


def _one(pid: int) -> Memory:
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return Memory()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return Memory(1024 * kib["Rss"], 1024 * kib["Pss"], 1)


class Watch:
    """Measures every 20 ms, in a thread, and keeps each root's highest figures in `peak`.

    This takes processor time, so work that is watched is not timed.
    """

    def __init__(self, roots: Iterable[int]) -> None:
        self.peak = {root: Memory() for root in roots}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch")

    def _look(self) -> None:
        while not self._ended.wait(PERIOD_S):
            for root, memory in of(self.peak).items():
                self.peak[root] = self.peak[root].highest(memory)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._ended.set()
        self._thread.join()
