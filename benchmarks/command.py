"""What the benchmarks' commands share: options, a description of the machine, exit codes."""

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from wire.errors import SettingsError, StillhouseError


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m benchmarks.NAME`, with the module's docstring as its help."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    measure: Callable[[argparse.Namespace], None],
) -> int:
    """Measure; return 0, or 2 if the input is bad or what is measured fails."""
    options = parser.parse_args(arguments)
    try:
        target = getattr(options, "json", None)
        if target and not target.parent.is_dir():
            raise SettingsError(f"--json {target}: {target.parent} is no folder; create it")
        measure(options)
    except StillhouseError as fault:
        print(f"{parser.prog.rpartition('.')[2]}: {fault}", file=sys.stderr)
        return 2
    return 0


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json FILE."""
    parser.add_argument("--json", type=Path, help="file to write everything to")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add --cache FOLDER, for the environments of peers."""
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    parser.add_argument("--cache", type=Path, default=base / "stillhouse" / "benchmarks",
                        help="where environments are kept; default: %(default)s")  # fmt: skip


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add --model NAME, and --input for a network that was published without a shape."""
    parser.add_argument("--model", default="resnet8",
                        help="a known name, or your own: nets.py:make")  # fmt: skip
    parser.add_argument("--input", type=shape, help="shape of a sample, such as 3,32,32; default: "
                        "the one that the network was published with")  # fmt: skip


def shape(text: str) -> tuple[int, int, int]:
    """Channels, height and width in a text "3,32,32"."""
    channels, *sides = (count(part) for part in text.split(","))
    if len(sides) != 2:
        raise argparse.ArgumentTypeError(f"expected a shape like 3,32,32, got {text!r}")
    return channels, sides[0], sides[1]


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """The length of a turn, from over 0 to 600."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"expected over 0 to 600, got {text!r}")
    return value


def say(what: str) -> None:
    """Print what is going on, if a person is waiting at a terminal."""
    if sys.stderr.isatty():
        print(f"  {what}", file=sys.stderr)


def write(path: Path | None, content: Mapping[str, object]) -> None:
    """Write the file of --json, if one was asked for."""
    if path:
        path.write_text(json.dumps(content, indent=1) + "\n")


def machine() -> dict[str, str | int | float]:
    """The machine, the system and the packages that this ran on."""
    packages = ("numpy", "onnxruntime", "torch")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def _cpu() -> str:
    with suppress(OSError):  # Raspberry Pi and Jetson boards name themselves here
        return Path("/proc/device-tree/model").read_text().strip("\0\n ")
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
