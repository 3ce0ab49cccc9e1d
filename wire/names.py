"""How a network is named, in run.toml, on command lines and in an artifact's manifest.

resnet8                       one of Stillhouse's, or an entry point
nets/small.py:make            what a file's factory makes; package.module:make likewise
FOLDER/./nets/small.py:make   the same, with the folder that it is relative to
NAME@features.3               cut behind the module features.3, for FedGKT
"""

from pathlib import Path

MARK = "/./"


def anchored(name: str, folder: Path) -> str:
    """A name that tells which folder it is relative to; absolute ones stay as they are."""
    if ":" not in name or name.startswith(("/", "~")):
        return name
    return f"{folder.resolve()}{MARK}{name}"


def written(name: str) -> str:
    """A name as it was before it was anchored."""
    return name.partition(MARK)[2] or name if ":" in name else name


def cut(name: str, split: str) -> str:
    """A name with the path of the module that the network is cut behind; "" leaves it whole."""
    return f"{name}@{split}" if split else name


def parse(name: str) -> tuple[str, str]:
    """What `cut` put together."""
    whole, mark, path = name.rpartition("@")
    return (whole, path) if mark and whole and not set(path) & set("/:") else (name, "")


def title(name: str) -> str:
    """A short name for people, printable ASCII: `small:make` of `nets/small.py:make`."""
    short = written(name)
    place, colon, factory = short.rpartition(":")
    if colon:
        short = f"{place.rpartition('/')[2].removesuffix('.py')}:{factory}"
    return "".join(c if "!" <= c <= "~" else "_" for c in short)[-200:]
