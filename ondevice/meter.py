"""Measures work on this device: peak resident memory and seconds of each phase.

The kernel records the peak (VmHWM, "high water mark"). Writing 5 to clear_refs resets it (man 5
proc), so that each phase has its own peak. If the kernel refuses the reset, a phase's figure is the
peak since the process began.
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

_ROOT = Path("/")


def resident_bytes(field: str = "VmRSS", process: int | str = "self", *, root: Path = _ROOT) -> int:
    """Bytes of resident memory now ("VmRSS") or at its peak ("VmHWM"); 0 without a procfs."""
    return _field(root / f"proc/{process}/status", field)


def proportional_bytes(root: Path = _ROOT) -> int:
    """Bytes of resident memory, shared pages divided by their users (PSS); 0 if unknown."""
    return _field(root / "proc/self/smaps_rollup", "Pss")


def group_peak_bytes(root: Path = _ROOT) -> int:
    """Peak bytes of this process's control group (cgroup v2, memory.peak); 0 if unknown."""
    with suppress(OSError, IndexError):
        lines = (root / "proc/self/cgroup").read_text().strip()
        path = lines.split("::", 1)[1].splitlines()[0].lstrip("/")
        return int((root / "sys/fs/cgroup" / path / "memory.peak").read_text())
    return 0


def available_bytes(root: Path = _ROOT) -> int:
    """Bytes of memory available without swapping; 0 if unknown."""
    return _field(root / "proc/meminfo", "MemAvailable")


def _field(path: Path, name: str) -> int:
    """The bytes in a line such as `VmRSS:  123 kB`; 0 if the file or the line is missing."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
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
            Path("/proc/self/clear_refs").write_text("5")
        began = time.monotonic()
        try:
            yield
        finally:
            self.metrics[f"{name}_s"] = time.monotonic() - began
            self.metrics[f"{name}_peak_bytes"] = float(resident_bytes("VmHWM"))


def give_back() -> None:
    """Return freed memory to the system, because a device waits most of the time.

    Memory in reference cycles is free only after a collection. glibc keeps freed memory until it is
    told to return it.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def model(root: Path = _ROOT) -> str:
    """The machine's name for itself."""
    with suppress(OSError):  # Raspberry Pi and Jetson boards name themselves here
        return (root / "proc/device-tree/model").read_text().strip("\0\n ")
    return platform.node()


def machine(root: Path = _ROOT) -> str:
    """A board's serial number, which a copy of its card does not have; "" if there is none.

    The system's id will not do: a copied card has it too, and a read-only system may draw another
    one at each start.
    """
    with suppress(OSError):
        path = root / "proc/device-tree/serial-number"
        name = path.read_text(errors="replace").strip("\0\n ")
        return name if name.strip("0") else ""
    return ""


def this_platform() -> Platform:
    """A description of this machine."""
    return Platform(
        model=model(),
        machine=platform.machine(),
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        python=platform.python_version(),
        onnxruntime=metadata.version("onnxruntime"),
    )
