"""Names of networks in run.toml, on command lines and in an artifact's manifest.

resnet8                       one of Stillhouse's networks, or an entry point
nets/small.py:make            the network that `make` in that file returns
package.module:make           the network that `make` in that module returns
FOLDER/./nets/small.py:make   a file's network, with the folder that its path is relative to
NAME@features.3               the network cut behind its module features.3, for FedGKT
"""

from pathlib import Path

MARK = "/./"


def anchored(name: str, folder: Path) -> str:
    """The name with the folder that it is relative to; an absolute name stays as it is."""
    if ":" not in name or name.startswith(("/", "~")):
        return name
    return f"{folder.resolve()}{MARK}{name}"


def written(name: str) -> str:
    """The name as it was before `anchored` changed it."""
    return name.partition(MARK)[2] or name if ":" in name else name


def cut(name: str, split: str) -> str:
    """The name of the network cut behind the module at the path `split`; "" leaves it whole."""
    return f"{name}@{split}" if split else name


def parse(name: str) -> tuple[str, str]:
    """The name and the split that `cut` joined."""
    whole, _, path = name.rpartition("@")
    return (whole, path) if whole and path and not set(path) & set("/:") else (name, "")


def title(name: str) -> str:
    """A short name for people in printable ASCII: `small:make` for `nets/small.py:make`."""
    short = written(name)
    place, colon, factory = short.rpartition(":")
    if colon:
        short = f"{place.rpartition('/')[2].removesuffix('.py')}:{factory}"
    return "".join(c if "!" <= c <= "~" else "_" for c in short)[-200:]
