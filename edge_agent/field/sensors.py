"""A board's sensors for power, heat and clocks; None stands for a missing sensor.

    Raspberry Pi 5   `vcgencmd pmic_read_adc`: volts and amperes of each rail of its power chip,
                     without the 5 V that USB devices and hats draw
    Jetson           INA3221 monitors under hwmon, with labels for their rails; VDD_IN is the board
    x86              RAPL: a counter of microjoules for each processor package

A Raspberry Pi 4 and its predecessors do not measure power.
"""

import logging
import re
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Protocol, Self

log = logging.getLogger("edge-agent")

EVERY_S = 0.1
BOARD_RAILS = ("VDD_IN", "POM_5V_IN")  # Orin Nano, Orin NX and Xavier NX; Nano and TX2
# Cooling devices that do not slow the processor: fans, and a setting of Intel's firmware that is
# rarely 0.
NO_BRAKES = ("fan", "tcc offset")
# Bits of get_throttled for what holds now; the bits for what held since boot are 16 higher.
THROTTLED = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}

Run = Callable[[str], str]


def _run(line: str) -> str:
    """What a command prints.

    Raises:
        OSError: the command does not exist, or fails.
    """
    try:
        done = subprocess.run(line.split(), capture_output=True, text=True, check=False, timeout=10)
    except subprocess.TimeoutExpired as fault:
        raise OSError(f"{line}: no answer in 10 s") from fault
    if done.returncode:
        raise OSError(f"{line}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Power(Protocol):
    """A source of joules: its name, and the energy used since some fixed moment."""

    name: str

    def joules(self) -> float:
        """Energy so far; only differences mean something. Call it at least ten times a second."""


class Rapl:
    """Counters of an x86 processor's packages, which wrap around at `max_energy_range_uj`."""

    name = "RAPL"

    def __init__(self, packages: list[Path]) -> None:
        self._packages = packages
        self._range = [int((p / "max_energy_range_uj").read_text()) for p in packages]
        self._last = self._read()
        self._total = 0

    def joules(self) -> float:
        """Energy of all packages since this object was created."""
        now = self._read()
        for new, old, most in zip(now, self._last, self._range, strict=True):
            self._total += new - old if new >= old else new - old + most
        self._last = now
        return self._total / 1e6

    def _read(self) -> list[int]:
        return [int((package / "energy_uj").read_text()) for package in self._packages]


class Integral:
    """Joules of a board that reports watts, by the trapezoidal rule between readings."""

    def __init__(
        self, name: str, watts: Callable[[], float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name, self._watts, self._clock = name, watts, clock
        self._at, self._last, self._total = clock(), watts(), 0.0

    def joules(self) -> float:
        """Energy since this object was created."""
        now, watts = self._clock(), self._watts()
        self._total += (now - self._at) * (watts + self._last) / 2
        self._at, self._last = now, watts
        return self._total


def power(root: Path = Path("/"), run: Run = _run) -> Power | None:
    """The sensor of this machine's power, or None.

    Args:
        root: the folder that holds /sys.
        run: runs a command line and returns what it prints; raises OSError if it cannot.
    """
    with suppress(OSError, ValueError):
        domains = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
        # Other domains are a part of a package (core, dram), or the whole platform (psys).
        packages = [d for d in domains if (d / "name").read_text().startswith("package")]
        if packages:
            return Rapl(packages)
    for folder in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        with suppress(OSError, ValueError):
            if (folder / "name").read_text().strip() == "ina3221":
                return _ina3221(folder)
    with suppress(OSError, ValueError):
        watts(run("vcgencmd pmic_read_adc"))
        return Integral("PMIC", lambda: watts(run("vcgencmd pmic_read_adc")))
    return None


def _ina3221(folder: Path) -> Integral:
    """A monitor of the rail that feeds the whole board.

    Raises:
        ValueError: no label names such a rail.
    """
    labels = folder.glob("in*_label")
    rails = {path.read_text().strip(): path.name[2:].removesuffix("_label") for path in labels}
    label = next((label for label in BOARD_RAILS if label in rails), "")
    if not label:
        raise ValueError(f"{folder}: no rail of the whole board")
    files = [folder / f"{kind}{rails[label]}_input" for kind in ("in", "curr")]  # mV, mA
    return Integral(f"INA3221 {label}", lambda: prod(int(f.read_text()) for f in files) / 1e6)


def watts(printed: str) -> float:
    """The watts of all rails together, from what `vcgencmd pmic_read_adc` printed.

    Raises:
        ValueError: no rail has both volts and amperes.
    """
    rails: dict[str, dict[str, float]] = {}
    for rail, kind, value in re.findall(r"(\w+)_[AV] (current|volt)\(\d+\)=([\d.]+)[AV]", printed):
        rails.setdefault(rail, {})[kind] = float(value)
    each = [rail["current"] * rail["volt"] for rail in rails.values() if len(rail) == 2]
    if not each:
        raise ValueError("vcgencmd pmic_read_adc tells of no rail")
    return sum(each)


def throttling(root: Path = Path("/"), run: Run = _run, *, ever: bool = False) -> tuple[str, ...]:
    """What slows the processor down now, in words; empty if nothing does, or nothing is known.

    With `ever`, what has slowed a Raspberry Pi down since it started.
    """
    causes = []
    with suppress(OSError, ValueError):
        bits = int(run("vcgencmd get_throttled").partition("=")[2], 16)
        causes += [name for bit, name in THROTTLED.items() if bits >> (bit + 16 * ever) & 1]
    if ever:
        return tuple(causes)
    for zone in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        with suppress(OSError, ValueError):
            kind, level = (zone / "type").read_text().strip(), (zone / "cur_state").read_text()
            if int(level) > 0 and not any(word in kind.lower() for word in NO_BRAKES):
                causes.append(f"cooling by {kind}")
    return tuple(causes)


def celsius(root: Path = Path("/")) -> dict[str, float]:
    """The temperature of each thermal zone, by the zone's type."""
    zones = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        with suppress(OSError, ValueError):
            zones[(zone / "type").read_text().strip()] = int((zone / "temp").read_text()) / 1e3
    return zones


class Watch:
    """Reads a power sensor in the background while a block runs.

    Attributes:
        joules: energy of the block; None without a sensor, or if a reading failed.
        seconds: duration of the block.
    """

    def __init__(self, sensor: Power | None) -> None:
        self.joules: float | None = None
        self.seconds = 0.0
        self._sensor, self._done = sensor, threading.Event()
        self._thread = threading.Thread(target=self._read_on, name="power", daemon=True)

    def __enter__(self) -> Self:
        self._before = self._read()
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        after = self._read()
        if self._before is not None and after is not None:
            self.joules = after - self._before
        self.seconds = time.monotonic() - self._began

    def _read_on(self) -> None:
        while not self._done.wait(EVERY_S) and self._read() is not None:
            pass

    def _read(self) -> float | None:
        """The sensor's energy; None without a sensor, and after a failure: a gap falsifies sums."""
        sensor = self._sensor
        if sensor is None:
            return None
        try:
            return sensor.joules()
        except (OSError, ValueError) as fault:
            log.warning("%s cannot be read any more: %s", sensor.name, fault)
            self._sensor = None
            return None
