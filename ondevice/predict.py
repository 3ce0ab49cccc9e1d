"""Classifies photos: gives the likeliest classes of each, with their probabilities.

It uses a file that `orchestrator export` wrote (`Exported`), or the small network that a device
trained last (`edge_agent.own_network`), and needs neither torch nor onnx. The code that reads
training images also reads the photos, so that the network sees the same kind of pixels.

The metadata of an exported file say how to use it and what its answers mean (`ondevice.card`).
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ondevice import card
from ondevice.card import DRAFT, REMEDY
from ondevice.photos import picture
from wire.errors import ArtifactError, DataError, StillhouseError

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


class Network(Protocol):
    """A network that classifies images.

    Attributes:
        classes: names in the order of the logits.
        shape: channels, height and width of an image.
        batch: how many images it takes at once.
    """

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    batch: int

    def __call__(self, pixels: Pixels) -> Floats:
        """Logits (N, classes) of images, uint8 (N, H, W, C) with N up to `batch`."""


class Exported:
    """The network in a file that `orchestrator export` wrote.

    Raises:
        ArtifactError: the file cannot be read, or is of another kind.
    """

    batch = 1  # so that a photo's answer does not depend on the other photos

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        if path.is_dir():
            raise ArtifactError(f"{path}: expected an .onnx file, got a folder; {REMEDY}")
        try:
            content = path.read_bytes()
        except OSError as fault:
            raise ArtifactError(f"{path}: cannot be read ({fault.strerror}); {REMEDY}") from fault
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised; they need not be logged as well
        try:
            session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as fault:  # onnxruntime has an exception class for each status code
            raise ArtifactError(
                f"{path}: expected an .onnx file, got one that onnxruntime {ort.__version__} "
                f"cannot load ({_line(fault)}); {REMEDY}"
            ) from fault
        self.card = card.read(session.get_modelmeta().custom_metadata_map, str(path))
        self.classes = self.card.classes
        self.shape = photos_shape((self.card.channels, *self.card.size), str(path))
        self._session, self._path = session, path

    def __call__(self, pixels: Pixels) -> Floats:
        """Logits (N, classes) of images, uint8 (N, H, W, C).

        Raises:
            ArtifactError: the graph does not fit its metadata.
        """
        image: NDArray[Any] = pixels
        if self.card.input == "float32":
            image = pixels.astype(np.float32) * np.float32(self.card.scale / 255)
        if self.card.layout == "NCHW":
            image = image.transpose(0, 3, 1, 2)
        expected = (len(pixels), len(self.classes))
        try:
            (logits,) = self._session.run(["logits"], {"image": np.ascontiguousarray(image)})
        except Exception as fault:  # onnxruntime has an exception class for each status code
            raise ArtifactError(
                f"{self._path}: the graph does not take what its metadata say ({_line(fault)}); "
                f"{REMEDY}"
            ) from fault
        if logits.shape != expected:
            raise ArtifactError(
                f"{self._path}: expected logits {list(expected)} by its metadata, got "
                f"{list(logits.shape)}; {REMEDY}"
            )
        answer: Floats = logits
        return answer


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a photo as (name, probability), or the error in reading it."""

    photo: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""

    @property
    def plain(self) -> dict[str, object]:
        """The prediction as --json prints it."""
        if self.error:
            return {"photo": str(self.photo), "error": self.error}
        classes = [{"name": name, "probability": p} for name, p in self.classes]
        return {"photo": str(self.photo), "classes": classes}

    @property
    def line(self) -> str:
        """The prediction as a line for people."""
        names = "  ".join(f"{name} {100 * p:.1f} %" for name, p in self.classes)
        return _printable(self.error or f"{self.photo}  {names}")


def photos(paths: Iterable[Path]) -> Iterator[Path]:
    """The photos that paths name: files as they are, and all pictures in and below folders.

    A folder without pictures, or one that cannot be read, is yielded itself.
    """
    for path in paths:
        yield from _pictures(path) or [path]


def _pictures(path: Path) -> list[Path]:
    """The pictures in a folder, and the sub-folders that cannot be read; [] for a file."""
    if not os.path.isdir(path):  # noqa: PTH112 - False where this user may not look
        return []
    pictures: list[Path] = []
    walk = os.walk(path, onerror=lambda fault: pictures.append(Path(fault.filename)))
    for folder, inner, files in walk:
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        pictures += (Path(folder, name) for name in sorted(files) if _is_picture(name))
    return pictures


def _is_picture(name: str) -> bool:
    return name.lower().endswith(picture.suffixes()) and not name.startswith(".")


def predict(network: Network, files: Sequence[Path], top: int = 1) -> Iterator[Prediction]:
    """The `top` likeliest classes of each photo, in the order of the photos.

    A photo that cannot be read has an `error` instead.

    Raises:
        ArtifactError: the network cannot answer.
    """
    for start in range(0, len(files), network.batch):
        some = files[start : start + network.batch]
        read = [_pixels(file, network.shape) for file in some]
        images = [pixels for pixels in read if not isinstance(pixels, str)]
        rows = iter(probabilities(network(np.stack(images)))) if images else iter(())
        for file, pixels in zip(some, read, strict=True):
            if isinstance(pixels, str):
                yield Prediction(file, error=pixels)
                continue
            row = next(rows)
            best = np.argsort(-row, kind="stable")[:top]
            yield Prediction(file, tuple((network.classes[i], float(row[i])) for i in best))


def _pixels(file: Path, shape: tuple[int, int, int]) -> Pixels | str:
    """The pixels of a photo for the network, uint8 (H, W, C), or an error message."""
    channels, height, width = shape
    try:
        if file.is_dir():
            next(file.iterdir(), None)
            kinds = " ".join(picture.suffixes())
            return f"{file}: expected pictures ({kinds}), got a folder without any; name another"
        file.stat()
    except OSError as fault:
        return f"{file}: cannot be read ({fault.strerror}); check the name, and who may read it"
    try:
        image = picture.open_image(file, DRAFT * max(height, width))
        return picture.fit(image, (height, width), channels)
    except DataError as fault:
        return str(fault)


def probabilities(logits: Floats) -> NDArray[np.float64]:
    """Softmax of logits (N, classes)."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares


def report(network: Network, paths: Sequence[Path], *, top: int, as_json: bool) -> int:
    """Print the classes of each photo; return the exit code, 1 if a photo could not be read.

    Args:
        network: classifies the photos.
        paths: photos, and folders of photos.
        top: how many classes to print for each.
        as_json: print one JSON list instead of a line a photo.

    Raises:
        ArtifactError: the network cannot answer.
        StillhouseError: `top` is less than 1.
    """
    if top < 1:
        raise StillhouseError(f"--top: expected 1 or more classes, got {top}")
    rows, failed = [], 0
    for prediction in predict(network, list(photos(paths)), top):
        failed += bool(prediction.error)
        if as_json:
            rows.append(prediction.plain)
        else:
            print(prediction.line, file=sys.stderr if prediction.error else sys.stdout)
    if as_json:
        print(_printable(json.dumps(rows, ensure_ascii=False, indent=1)))
    return 1 if failed else 0


def photos_shape(shape: tuple[int, ...], where: str) -> tuple[int, int, int]:
    """An image's shape, checked to be one that photos can have.

    Raises:
        ArtifactError: photos cannot have this shape.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ArtifactError(
            f"{where}: expected a network for grey images or RGB, (1, H, W) or (3, H, W), got one "
            f"for {shape}; photos cannot have that shape; use the network with onnxruntime"
        )
    return shape[0], shape[1], shape[2]


def _printable(text: str) -> str:
    """The text in a form that can be printed, even if its file names are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _line(fault: Exception) -> str:
    """The first line of an error from onnxruntime."""
    return str(fault).partition("\n")[0][:300]
