"""The result of reading images: pixels, labels, names, and a record of what was left out."""

import logging
import lzma
import struct
import tokenize
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wire import classes
from wire.errors import DataError

# What Pillow and numpy raise for damaged files, found by damaging files. Warning is there for
# programs that turn warnings into errors. `picture` adds Pillow's DecompressionBombError, since an
# `.npz` needs no Pillow.
DAMAGED: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError,
    LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError, Warning,
    lzma.LZMAError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
# Suffixes of pictures that may be unreadable here, and that their owner would miss.
ELSEWHERE = (
    ".arw", ".avif", ".cr2", ".cr3", ".dng", ".exr", ".heic", ".heif", ".ico", ".jp2", ".jxl",
    ".nef", ".orf", ".pgm", ".ppm", ".psd", ".raf", ".rw2", ".svg", ".tga", ".webp",
)  # fmt: skip
RENAME = "rename it (a class is a sub-folder, or a name in `classes` of an .npz)"
FEW = 10  # a class with fewer images gets a remark
NAMED = 20  # pictures, classes or folders that one remark names


class Remark(NamedTuple):
    """A remark about the images, and the remedy if something should be done."""

    what: str
    remedy: str = ""


class Bad(NamedTuple):
    """A picture that was left out: its path below the folder, and why."""

    file: str
    reason: str


@dataclass
class Skipped:
    """What was left out of a folder, and which pictures were converted.

    Attributes:
        bad: damaged pictures.
        suffixes: number of files with each suffix that is not read.
        nested: folders inside class folders.
        loose: number of pictures beside the class folders.
        hidden: number of names that begin with a dot.
        system: folders of operating and storage systems.
        merged: class names that two folders spell in different bytes (NFC and NFD).
        done: number of pictures with each conversion.
    """

    bad: list[Bad] = field(default_factory=list)
    suffixes: Counter[str] = field(default_factory=Counter)
    nested: list[str] = field(default_factory=list)
    loose: int = 0
    hidden: int = 0
    system: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Photos:
    """Labelled images.

    Attributes:
        x: uint8 (N, H, W, C).
        y: int64 (N,), from 0.
        names: names of the classes (NFC), sorted for a folder; empty if an `.npz` has none.
        skipped: what was left out.
    """

    x: NDArray[np.uint8]
    y: NDArray[np.int64]
    names: tuple[str, ...]
    skipped: Skipped = field(default_factory=Skipped)

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Number of images of each class; a class without a name goes by its number."""
        if not self.names:
            labels, numbers = np.unique(self.y, return_counts=True)
            return dict(zip(map(str, labels.tolist()), numbers.tolist(), strict=True))
        numbers = np.bincount(self.y, minlength=len(self.names))
        return dict(zip(self.names, numbers.tolist(), strict=True))

    @property
    def summary(self) -> str:
        """How many images there are of each class, in one line."""
        counts = self.counts
        what = f"{len(self.y):,} images of {_many(len(counts), 'class', 'classes')}"
        if len(counts) <= NAMED:
            return f"{what}: {', '.join(f'{name} {n:,}' for name, n in counts.items())}"
        least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        return f"{what}, from {counts[least]:,} ({least}) to {counts[most]:,} ({most})"

    def remarks(self) -> Iterator[Remark]:
        """Remarks about what was left out, few images, and conversions."""
        skipped = self.skipped
        if skipped.bad:
            total = len(self.y) + len(skipped.bad)
            named = _list([f"{file} ({why})" for file, why in skipped.bad])
            yield Remark(
                f"{len(skipped.bad):,} of {total:,} pictures left out as damaged: {named}",
                "replace or remove them",
            )
        if few := [f"{name} {n}" for name, n in self.counts.items() if 0 < n < FEW]:
            yield Remark(f"few images of some classes: {_list(few)}", f"give each {FEW} or more")
        if skipped.suffixes:
            files = _list([f"{suffix} {n:,}" for suffix, n in skipped.suffixes.most_common()])
            yield Remark(
                f"files left out by their suffix: {files}",
                "convert the pictures to JPEG or PNG"
                * any(s in ELSEWHERE for s in skipped.suffixes),
            )
        if skipped.nested:
            yield Remark(
                f"{_many(len(skipped.nested), 'folder', 'folders')} inside class folders left out: "
                f"{_list(skipped.nested)}",
                "move their pictures up into the class folder, or the folders away",
            )
        if skipped.loose:
            yield Remark(
                f"{_many(skipped.loose, 'picture', 'pictures')} beside the class folders left out",
                "move them into the folders of their classes",
            )
        if skipped.merged:
            yield Remark(f"class names that two folders share: {_list(skipped.merged)}")
        if skipped.system:
            yield Remark(f"system folders are not classes: {_list(skipped.system)}")
        if skipped.hidden:
            yield Remark(f"{_many(skipped.hidden, 'name', 'names')} with a dot in front left out")
        for done, n in skipped.done.items():
            yield Remark(f"{_many(n, 'picture', 'pictures')} {done}")


def tell(log: logging.Logger, source: object, remarks: Iterable[Remark]) -> None:
    """Log remarks; a remark with a remedy is a warning."""
    for what, remedy in remarks:
        if remedy:
            log.warning("%s: %s; %s", source, what, remedy)
        else:
            log.info("%s: %s", source, what)


def class_names(names: Iterable[str], path: Path) -> tuple[str, ...]:
    """Names of classes in Unicode's normal form C.

    Raises:
        DataError: one is empty, too long or not printable, or two are equal.
    """
    try:
        return classes.normalized(names)
    except ValueError as fault:
        raise DataError(f"{shown(str(path))}: {fault}; {RENAME}") from fault


def reason(fault: Exception) -> str:
    """Why a file cannot be read, in one line."""
    if isinstance(fault, MemoryError):
        return "needs more memory than there is"
    if isinstance(fault, OSError) and fault.strerror:
        return fault.strerror
    text = shown(" ".join(str(fault).split()))[:120]
    known = isinstance(fault, OSError | SyntaxError | ValueError) and text
    return text if known else f"{type(fault).__name__} {text}".strip()


def shown(text: str) -> str:
    """A name for messages: control characters and bytes that are not UTF-8 are escaped."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs") else c
        for c in text
    )


def _many(n: int, one: str, more: str) -> str:
    return f"{n:,} {one if n == 1 else more}"


def _list(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest:,} more" if rest > 0 else "")
