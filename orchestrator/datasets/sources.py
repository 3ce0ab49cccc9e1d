"""Sources of images: scikit-learn, torchvision's downloads, a file, or a folder.

Every source gives a training set and a held-out set. A source without a test set is cut 80/20 in
every class, by seed.
"""

import contextlib
import gzip
import io
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.datasets.files import Images, read_path
from orchestrator.datasets.partition import stratified
from wire import storage
from wire.errors import DataError

HELD_OUT_FRACTION = 0.2
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


def read(
    source: str,
    *,
    heldout: Path | None = None,
    cache: Path = Path("data"),
    seed: int = 0,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
) -> tuple[Images, Images]:
    """Read a whole source: (training set, held-out set).

    Args:
        source: a name in `NAMED`, or the path of an `.npz` file or an image folder.
        heldout: the file or folder of the held-out set, for a path.
        cache: where torchvision keeps its downloads.
        seed: seeds the cut of a source without a test set.
        size: height and width to which a folder's images are resized; other sources are not.
        channels: 1 or 3, to which a folder's images are converted; other sources are not.

    Raises:
        DataError: the source is unknown, unreadable, or its two halves do not fit together.
    """
    if source in NAMED:
        if heldout is not None:
            raise DataError(
                f"{source} brings its own held-out set, got --heldout {heldout} too; leave it out"
            )
        return NAMED[source](cache, seed)
    path = Path(source)
    try:
        missing = not path.exists()
    except OSError:  # a folder above it may not be entered; read_path reports that
        missing = False
    if missing:
        raise DataError(
            f"source {source!r}: expected one of {', '.join(NAMED)}, or a path; got a name that is "
            "neither, check its spelling"
        )
    train = read_path(path, size=size, channels=channels)
    if heldout is None:
        return _cut(train, seed)
    height, width, depth = train.x.shape[1:]
    test = read_path(heldout, size=(height, width), channels=depth)
    try:
        test = test.labelled(train.classes)
    except ValueError as fault:
        raise DataError(
            f"{heldout}: {fault}; give the held-out set of the same data as {path}"
        ) from fault
    return train, test.resized((height, width), depth)


def _cut(images: Images, seed: int) -> tuple[Images, Images]:
    rest, heldout = stratified(images.y, HELD_OUT_FRACTION, seed=seed)
    if not len(heldout):
        raise DataError(
            f"{len(images.y)} samples are too few to hold out {HELD_OUT_FRACTION:.0%} of each "
            "class; give a held-out set with --heldout"
        )
    return images.take(rest), images.take(heldout)


def _digits(_cache: Path, seed: int) -> tuple[Images, Images]:
    """Scikit-learn's 1,797 handwritten digits, 8x8 with 17 grey levels, as 32x32 RGB."""
    from sklearn.datasets import load_digits

    levels, y = load_digits(return_X_y=True)
    grey = np.rint(levels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    images = Images(grey, y.astype(np.int64), tuple("0123456789"))
    return _cut(images.resized((32, 32), 3), seed)


def _torchvision(name: str, cache: Path, **options: Any) -> tuple[Images, Images]:
    """A data set of torchvision by its class, downloaded into `cache` unless it is there."""
    import models  # noqa: F401 - lets torchvision be imported beside a torch of another build

    if find_spec("torchvision") is None:
        raise DataError(
            "this data set needs torchvision, which is not installed; "
            "pip install 'stillhouse[orchestrator]'"
        )
    from torchvision import datasets

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train, test = (
                getattr(datasets, name)(str(cache), train=part, download=True, **options)
                for part in (True, False)
            )
    except (OSError, RuntimeError, ValueError) as fault:
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[-1]
        raise DataError(
            f"{name}: torchvision could neither download it nor read it in {cache} ({reason}); "
            "connect this machine, copy a download from another machine there, or pack the images "
            "into an .npz with x and y and give its path"
        ) from fault
    # MNIST's names are "0 - zero" and so on.
    classes = tuple(str(c).removeprefix(f"{i} - ") for i, c in enumerate(train.classes))
    halves = []
    for half in (train, test):
        x, y = np.asarray(half.data, np.uint8), np.asarray(half.targets, np.int64)
        halves.append(Images(x[..., None] if x.ndim == 3 else x, y, classes))
    return halves[0], halves[1]


def _emnist(cache: Path, _seed: int) -> tuple[Images, Images]:
    """EMNIST `byclass`, 62 classes; its files hold every image transposed, and this undoes it."""
    train, test = (
        Images(half.x.transpose(0, 2, 1, 3), half.y, half.classes)
        for half in _torchvision("EMNIST", cache, split="byclass")
    )
    return train, test


def _fashion(cache: Path, _seed: int) -> tuple[Images, Images]:
    """Fashion-MNIST, from Debian's package `dataset-fashion-mnist` if that is installed."""
    raw = cache / "FashionMNIST" / "raw"  # where torchvision looks before it downloads
    for packed in DEBIAN_FASHION.glob("*.gz"):
        file = raw / packed.stem
        if not file.exists():
            raw.mkdir(parents=True, exist_ok=True)
            storage.write(file, gzip.decompress(packed.read_bytes()))
    return _torchvision("FashionMNIST", cache)


NAMED: Mapping[str, Callable[[Path, int], tuple[Images, Images]]] = {
    "digits": _digits,
    "cifar10": lambda cache, _seed: _torchvision("CIFAR10", cache),
    "cifar100": lambda cache, _seed: _torchvision("CIFAR100", cache),
    "mnist": lambda cache, _seed: _torchvision("MNIST", cache),
    "fashion-mnist": _fashion,
    "emnist": _emnist,
}
