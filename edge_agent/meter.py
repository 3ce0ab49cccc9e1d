"""What work costs on this device: peak resident memory and seconds, phase by phase.

The kernel keeps the peak (VmHWM, "high water mark") itself; writing 5 to clear_refs resets it
(man 5 proc), so that each phase has its own. Where the kernel refuses the reset, a phase's figure
is the peak since the process began.
"""

import ctypes
import gc
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from wire.messages import Platform

_PROC = Path("/proc/self")


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory now ("VmRSS") or at its peak ("VmHWM"), bytes; 0 where there is no procfs."""
    with suppress(OSError):
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def proportional_bytes() -> int:
    """Resident memory with shared pages counted by share (PSS); 0 where the kernel tells none."""
    with suppress(OSError):
        for line in (_PROC / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def group_peak_bytes() -> int:
    """Peak of all memory of this process's control group (cgroup v2, memory.peak); 0 if untold."""
    with suppress(OSError, IndexError):
        path = (_PROC / "cgroup").read_text().strip().split("::", 1)[1].lstrip("/")
        return int((Path("/sys/fs/cgroup") / path / "memory.peak").read_text())
    return 0


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that can be had without swapping; 0 where the kernel tells none."""
    with suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


class Meter:
    """Metrics of one order: `<phase>_s` and `<phase>_peak_bytes` for each phase."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block."""
        with suppress(OSError):
            (_PROC / "clear_refs").write_text("5")
        began = time.monotonic()
        try:
            yield
        finally:
            self.metrics[f"{name}_s"] = time.monotonic() - began
            self.metrics[f"{name}_peak_bytes"] = float(resident_bytes("VmHWM"))


def give_back() -> None:
    """Hand the memory that work has freed back to the system, for a device waits most of the time.

    What lies in reference cycles is not free before a collection; and glibc keeps for itself what
    a thread has freed, until it is asked.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def model() -> str:
    """What the machine calls itself."""
    with suppress(OSError):  # Raspberry Pi and Jetson boards name themselves here
        return Path("/proc/device-tree/model").read_text().strip("\0\n ")
    return platform.node()


def this_platform() -> Platform:
    """The machine this runs on."""
    return Platform(
        model=model(),
        machine=platform.machine(),
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        python=platform.python_version(),
        onnxruntime=metadata.version("onnxruntime"),
    )
