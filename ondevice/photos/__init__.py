"""Reads labelled images from a folder or an `.npz`, for agents and for the server.

- A folder has one sub-folder for each class, with the class's name; `picture` says how a picture
  becomes pixels. Damaged pictures are left out and named; other files are left out and counted.
- An `.npz` holds the pixels themselves, or encoded pictures; see `archive`.

The result says what was left out, and how unusual pictures (16 bits, transparent) were converted.
"""

from pathlib import Path

from ondevice.config import BAD_SHARE
from ondevice.photos import archive, folder
from ondevice.photos.folder import Sizes, sizes
from ondevice.photos.picture import fit
from ondevice.photos.record import RENAME, Photos, Remark, tell
from wire.errors import DataError

__all__ = ["BAD_SHARE", "RENAME", "Remark", "Sizes", "fit", "is_folder", "read", "sizes", "tell"]


def read(path: Path, input_shape: tuple[int, ...], *, bad_share: float = BAD_SHARE) -> Photos:
    """Read a folder of images, or an `.npz`.

    Args:
        path: the folder or file.
        input_shape: (C, H, W) to which a folder's pictures are converted, C = 1 (grey) or 3 (RGB).
            The images of an `.npz` are not converted.
        bad_share: the share of pictures that may be damaged; one always may. With 0, none may.

    Raises:
        DataError: the path does not exist or cannot be read, has another form, or too much of it is
            damaged.
    """
    if is_folder(path):
        return folder.read(path, input_shape, bad_share)
    return archive.read(path)


def is_folder(path: Path) -> bool:
    """Whether the path is a folder, not a file.

    Raises:
        DataError: it does not exist, or a folder above it may not be entered.
    """
    try:
        if path.is_dir():
            return True
        if path.is_file():
            return False
        if path.exists():  # a pipe, say: opening it may wait for ever
            raise DataError(f"{path}: expected an .npz file or a folder of images, got neither")
    except OSError as fault:
        raise DataError(
            f"{path}: cannot be read ({fault.strerror}); let this user read it"
        ) from fault
    raise DataError(
        f"{path}: expected an .npz file or a folder of images, got nothing there; check the path"
    )
