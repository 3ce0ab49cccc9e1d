"""A folder of pictures, one sub-folder for each class.

Class names are the folders' names in Unicode's composed form (NFC), because a copy made by a Mac
may spell the same name in other bytes. Two folders with the same name in that form are one class.
"""

import os
import re
import stat
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ondevice.photos import picture
from ondevice.photos.record import Bad, Photos, Skipped, class_names, reason, shown
from wire.errors import DataError

# Folders that systems create, not people: disks, Windows, macOS, Android, Synology and QNAP.
SYSTEM_FOLDERS = re.compile(
    r"lost\+found|lost\.dir|found\.\d{3}|\$recycle\.bin|recycle[rd]|system volume information"
    r"|\$winreagent|\$extend|config\.msi|__macosx|network trash folder|temporary items"
    r"|thevolumesettingsfolder|@eadir|[@#]recycle|#snapshot|@recently-snapshot|@tmp|__pycache__",
    re.IGNORECASE,
)
SYSTEM_FILES = ("desktop.ini", "ehthumbs.db", "thumbs.db")


class Sizes(NamedTuple):
    """How many of a folder's pictures have each (height, width); 3 channels if any has colour."""

    sizes: Counter[tuple[int, int]]
    channels: int


def read(path: Path, input_shape: tuple[int, ...], bad_share: float) -> Photos:
    """Read all pictures, one at a time; see `ondevice.photos.read`."""
    channels, height, width = input_shape
    if channels not in (1, 3):
        raise DataError(
            f"{path}: expected a model with 1 or 3 input channels, got {channels}; a folder holds "
            "grey or colour images; give other data as an .npz"
        )
    files, names, skipped = _find(path)
    shape = (len(files), height, width, channels)
    try:
        x, y = np.empty(shape, np.uint8), np.empty(len(files), np.int64)
    except (MemoryError, ValueError) as fault:
        raise DataError(
            f"{path}: {len(files):,} images of {height}x{width} take "
            f"{np.prod(shape, dtype=float) / 1e9:,.1f} GB of memory, more than there is; use fewer "
            "or smaller ones"
        ) from fault
    good = 0
    for file, label in files:
        try:
            x[good] = picture.decode(file, (height, width), channels, skipped.done)
        except picture.damaged() as fault:
            skipped.bad.append(Bad(shown(str(file.relative_to(path))), reason(fault)))
        else:
            y[good] = label
            good += 1
    _check(path, skipped.bad, len(files), bad_share)
    return Photos(x[:good], y[:good], names, skipped)


def sizes(path: Path) -> Sizes:
    """The sizes of a folder's pictures when upright, from the files' headers.

    Raises:
        DataError: the folder has no picture, or none that can be read.
    """
    counts: Counter[tuple[int, int]] = Counter()
    channels = 1
    bad = []
    files, _, _ = _find(path)
    for file, _ in files:
        try:
            height, width, depth = picture.form(file)
        except picture.damaged() as fault:
            bad.append(Bad(shown(str(file.relative_to(path))), reason(fault)))
            continue
        counts[height, width] += 1
        channels = max(channels, depth)
    _check(path, bad, len(files), 1.0)
    return Sizes(counts, channels)


def _check(path: Path, bad: list[Bad], total: int, bad_share: float) -> None:
    """Refuse a folder with too many damaged pictures; one is allowed unless the share is 0."""
    allowed = max(bad_share * total, 1) if bad_share else 0
    if len(bad) <= allowed and len(bad) < total:
        return
    first = ", ".join(f"{file} ({why})" for file, why in bad[:3]) + (", ..." * (len(bad) > 3))
    raise DataError(
        f"{path}: expected at most {100 * bad_share:g} % of the pictures to be damaged, got "
        f"{len(bad):,} of {total:,}: {first}; replace or remove them (on a device, `bad_share` in "
        "agent.toml allows more)"
    )


def _find(path: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...], Skipped]:
    """The picture files with their class numbers, the classes' names, and what is left out.

    Raises:
        DataError: a folder cannot be read, or there is no picture.
    """
    skipped = Skipped()
    classes: dict[str, list[Path]] = {}
    for entry in _entries(path):
        if entry.name.startswith("."):
            skipped.hidden += 1
        elif not _is_folder(entry, needed=True):
            skipped.loose += _is_picture(entry)
        elif SYSTEM_FOLDERS.fullmatch(entry.name):
            skipped.system.append(shown(entry.name))
        else:
            classes.setdefault(_class_name(entry), []).append(entry)
    names = class_names(sorted(classes), path)
    skipped.merged = [name for name in names if len(classes[name]) > 1]
    files = [
        (file, label)
        for label, name in enumerate(names)
        for folder in classes[name]
        for file in _pictures(folder, path, skipped)
    ]
    if not files:
        raise _nothing(path, len(names), skipped)
    return files, names, skipped


def _pictures(folder: Path, path: Path, skipped: Skipped) -> list[Path]:
    """The pictures of one class folder."""
    files = []
    for entry in _entries(folder):
        name = shown(str(entry.relative_to(path)))
        if entry.name.startswith("."):
            skipped.hidden += 1
        elif _is_folder(entry):
            (skipped.system if SYSTEM_FOLDERS.fullmatch(entry.name) else skipped.nested).append(
                name
            )
        elif _is_picture(entry):
            files.append(entry)
        elif entry.name.lower() not in SYSTEM_FILES:
            skipped.suffixes[shown(entry.suffix.lower()) or "none"] += 1
    return files


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as fault:
        raise DataError(
            f"{shown(str(folder))}: this folder cannot be read ({fault.strerror}); let this user "
            "read it (chmod a+rx), or move it away"
        ) from fault


def _is_folder(entry: Path, *, needed: bool = False) -> bool:
    """Whether an entry is a folder.

    Raises:
        DataError: this cannot be determined, and the entry is `needed` because it may be a class.
    """
    try:
        return stat.S_ISDIR(entry.stat().st_mode)
    except OSError as fault:
        if not needed or _is_picture(entry):
            return False
        raise DataError(
            f"{shown(str(entry))}: cannot be read ({fault.strerror}), and may be a class; let this "
            "user read it, or remove the link"
        ) from fault


def _is_picture(entry: Path) -> bool:
    return entry.suffix.lower() in picture.suffixes()


def _class_name(folder: Path) -> str:
    name = unicodedata.normalize("NFC", folder.name)
    if shown(name) != name:
        raise DataError(
            f"{shown(str(folder))}: expected a class name in UTF-8 without control characters; "
            "rename the folder"
        )
    return name


def _nothing(path: Path, classes: int, skipped: Skipped) -> DataError:
    """The error that says why no pictures were found in a folder."""
    if archives := sorted(path.glob("*.npz")):
        return DataError(
            f"{path}: expected one sub-folder of pictures for each class, got .npz files; name one "
            f"of them, such as {archives[-1]}"
        )
    if skipped.loose:
        return DataError(
            f"{path}: expected one sub-folder of pictures for each class, got pictures in the "
            f"folder itself ({skipped.loose:,} of them); make sub-folders with the classes' names "
            f"and move the pictures into them"
        )
    for place, inner, files in os.walk(path):
        inner[:] = sorted(n for n in inner if n[0] != "." and not SYSTEM_FOLDERS.fullmatch(n))
        folder = Path(place)
        if any(_is_picture(folder / name) for name in files if not name.startswith(".")):
            return DataError(
                f"{path}: expected pictures in its sub-folders, one for each class, got them "
                f"deeper, in {shown(place)}; name the folder {shown(str(folder.parent))} instead, "
                "or move the class folders up"
            )
    others = "".join(f", {n:,} {suffix}" for suffix, n in skipped.suffixes.most_common(5))
    return DataError(
        f"{path}: expected one sub-folder of pictures ({' '.join(picture.suffixes())}) for each "
        f"class, got {classes} sub-folders and no picture in them{others}; sort pictures into "
        "sub-folders"
    )
