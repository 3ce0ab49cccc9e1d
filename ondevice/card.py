"""The card of an exported network: how to use it, and what its answers mean.

`orchestrator export` writes the card into the ONNX file's `metadata_props`, one key a field. Texts
are written as they are, all other values as JSON. docs/in-use.md lists the keys.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from wire import classes, records
from wire.errors import ArtifactError

PREFIX = "stillhouse."
FORMAT = 1  # version of the keys; raised when today's reader would misunderstand newer ones
DRAFT = 2  # a JPEG may be decoded at a smaller scale, down to this many times the network's side
REMEDY = "name a file that `orchestrator export RUN --out model.onnx` wrote"


@dataclass(frozen=True)
class Resize:
    """How a photo is resized for the network."""

    filter: Literal["bilinear"] = "bilinear"
    antialias: bool = True
    keep_aspect_ratio: bool = False
    upright: Literal["exif"] = "exif"
    jpeg_draft: int = DRAFT


@dataclass(frozen=True)
class ModelCard:
    """How to use an exported graph, what its answers mean, and where it comes from.

    Attributes:
        format: version of this record's keys.
        classes: names in the order of the logits; numbers if the run has no names.
        input: dtype of the input `image`.
        layout: order of the input's axes.
        channels: 1 is grey, 3 is RGB.
        size: height and width.
        resize: how a photo is resized to that size.
        scale: the value of a white pixel.
        mean, std: one for each channel; the graph itself computes (image / scale - mean) / std.
        version: the version of Stillhouse that wrote the file.
        run, strategy, round: the run and strategy that trained the network, and its last round.
        device: the device whose network this is, or whose extractor feeds the large network; "" for
            a network of all devices.
        model: names of the networks that the graph consists of.
        accuracy: share of held-out images classified correctly after that round, if known.
    """

    classes: tuple[str, ...]
    input: Literal["float32", "uint8"]
    layout: Literal["NCHW", "NHWC"]
    channels: int
    size: tuple[int, int]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    run: str
    strategy: str
    round: int
    model: str
    version: str
    device: str = ""
    accuracy: float | None = None
    resize: Resize = dataclasses.field(default_factory=Resize)
    format: int = FORMAT

    def __post_init__(self) -> None:
        if min(self.channels, *self.size, len(self.classes)) < 1:
            raise ValueError(
                f"expected channels, a size and classes, got {self.channels} channels, "
                f"{list(self.size)} and {len(self.classes)} classes"
            )
        for name in self.classes:
            if not name or not classes.printable(name):
                raise ValueError(f"expected a printable name of each class, got {name!r:.80}")

    @property
    def metadata(self) -> dict[str, str]:
        """The card as written to the file: texts as they are, other values as JSON, no None."""
        plain: dict[str, object] = records.plain(self)
        return {
            PREFIX + key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in plain.items()
            if value is not None
        }


def numbers(count: int) -> tuple[str, ...]:
    """Names for classes without names: their numbers."""
    return tuple(map(str, range(count)))


def read(metadata: Mapping[str, str], where: str) -> ModelCard:
    """The card in a file's metadata.

    Raises:
        ArtifactError: there is no card, it is damaged, or it has another format.
    """
    texts = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
    if not texts:
        raise ArtifactError(
            f"{where}: expected metadata that say names of classes and size of images "
            f"({PREFIX}classes and others), got an ONNX file without them; export the run with "
            "this version: orchestrator export RUN --out model.onnx"
        )
    if texts.get("format") != str(FORMAT):
        raise ArtifactError(
            f"{where}: expected metadata of format {FORMAT}, got {texts.get('format')!r:.20}; "
            "update Stillhouse here, or export the run with this version"
        )
    is_text = {f.name for f in dataclasses.fields(ModelCard) if f.type is str}
    is_text |= {"input", "layout"}
    try:
        table = {key: v if key in is_text else json.loads(v) for key, v in texts.items()}
    except ValueError as fault:
        raise ArtifactError(f"{where}: its metadata are damaged ({fault}); {REMEDY}") from fault
    return records.build(ModelCard, table, where=where, error=ArtifactError, strict=False)
