"""A measurement of what training costs on a device: one JSON object, signed by the device.

    {"format": "stillhouse-measure/2", "device": "ed25519:...", ..., "signature": "..."}

`device` is the device's public key. `signature` signs the canonical JSON of all other keys (sorted,
no spaces, ASCII, numbers as Python writes them); the context is the name of the format, see
`wire.signing`. `docs/measure.md` describes the keys. FLOPs are 2 x MAC; times are in seconds, sizes
in bytes.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from wire import checks, records, signing, topics
from wire.costs import MAX_ROWS, Phase
from wire.errors import SignatureError, WireError
from wire.manifest import ModelInfo
from wire.messages import Platform

FORMAT = "stillhouse-measure/2"
MAX_BYTES = 128 << 10  # about 1,100 rows of layers; a broker that takes our chunks takes this too
MAX_NUMBER = 1 << 62
_UTC = re.compile(r"\d{4}-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-6]\dZ", re.ASCII)


@dataclass(frozen=True)
class Compiled:
    """The artifact that was measured.

    `step_flops` counts a whole step, `activation_bytes` one run of the graph.
    """

    digest: str
    model: ModelInfo
    task: Literal["distill", "classify"]
    batch: int
    micro_batches: int
    parameters: int
    step_flops: int
    activation_bytes: int


@dataclass(frozen=True)
class Machine:
    """The machine's speed at a float32 matrix product, and at a copy too large for its caches."""

    gemm_gflops: float
    copy_gbytes: float

    def __post_init__(self) -> None:
        if min(self.gemm_gflops, self.copy_gbytes) <= 0:
            raise ValueError("gemm_gflops, copy_gbytes: expected over 0")


@dataclass(frozen=True)
class Step:
    """Speed of the timed steps."""

    timed: int
    median_s: float
    quartiles_s: tuple[float, ...]
    images_per_s: float
    gflops: float

    def __post_init__(self) -> None:
        if len(self.quartiles_s) != 3 or min(*self.quartiles_s, self.median_s) <= 0:
            raise ValueError(f"quartiles_s: expected three over 0, got {self.quartiles_s!r:.80}")


@dataclass(frozen=True)
class LayerTime:
    """Cost and time of one layer in one phase of a whole step."""

    name: str
    phase: Phase
    flops: int
    bytes: int
    activation_bytes: int
    seconds: float


@dataclass(frozen=True)
class MemoryUse:
    """Resident memory in bytes; peaks are VmHWM; 0 if the kernel does not report a value."""

    idle_bytes: int
    loaded_bytes: int
    train_peak_bytes: int
    pss_bytes: int
    group_peak_bytes: int
    foretold_bytes: int
    budget_bytes: int
    largest_batch: int
    eval_peak_bytes: int | None = None
    extract_peak_bytes: int | None = None


@dataclass(frozen=True)
class Energy:
    """Energy of the timed steps; None if the machine has no sensor."""

    sensor: str | None
    joules_per_sample: float | None
    watts: float | None


@dataclass(frozen=True)
class Heat:
    """Degrees Celsius by thermal zone, and what slowed the processor down."""

    celsius_before: Mapping[str, float]
    celsius_after: Mapping[str, float]
    held_back_before: tuple[str, ...]
    held_back_after: tuple[str, ...]
    held_back_meanwhile: tuple[str, ...]


@dataclass(frozen=True)
class Peer:
    """PyTorch at the same step, in turns with our engine.

    `ratio` is our speed divided by PyTorch's, the median over the turns.
    """

    version: str
    images_per_s: float
    ours_images_per_s: float
    ratio: float
    peak_bytes: int


@dataclass(frozen=True)
class Measurement:
    """A device's measurement; `name` is the device's name in agent.toml, or ""."""

    format: Literal["stillhouse-measure/2"]
    device: str
    name: str
    agent: str
    measured_at: str
    platform: Platform
    threads: int
    artifact: Compiled
    machine: Machine
    step: Step
    layers: tuple[LayerTime, ...]
    memory: MemoryUse
    energy: Energy
    heat: Heat
    valid: bool
    signature: str
    pytorch: Peer | None = None

    def __post_init__(self) -> None:
        if self.name:
            topics.check_name(self.name, "device name")
        if not _UTC.fullmatch(self.measured_at):
            raise ValueError(f"measured_at: expected 2026-01-31T12:00:00Z, got {self.measured_at}")
        if len(self.layers) > MAX_ROWS:
            raise ValueError(f"layers: {len(self.layers)} rows, limit {MAX_ROWS}")
        for where, value in _leaves("", records.plain(self)):
            _check(where, value)

    def to_bytes(self) -> bytes:
        """The measurement as canonical JSON, with its signature."""
        return records.canonical(self)


def sign(key: "signing.PrivateKey", report: Mapping[str, Any]) -> Measurement:
    """The measurement of a report: with the public key, and signed.

    Raises:
        WireError: the report does not fit its format.
    """
    content = {**report, "device": signing.public(key), "signature": ""}
    unsigned = records.build(Measurement, content, where="measurement", error=WireError)
    plain = records.plain(unsigned)
    del plain["signature"]
    signature = signing.sign(key, FORMAT, records.canonical(plain))
    return dataclasses.replace(unsigned, signature=signature)


def verify(data: bytes, *, where: str) -> Measurement:
    """The measurement in a JSON text, after a check that the owner of its key signed it.

    Args:
        data: the JSON text, as a file or a message holds it.
        where: how to name it in messages.

    Raises:
        WireError: the text is not JSON, or not of this format.
        SignatureError: it is not signed by the key that it names.
    """
    if len(data) > MAX_BYTES:
        raise WireError(f"{where}: {len(data)} bytes, limit {MAX_BYTES}")
    try:
        content = json.loads(data, parse_int=_whole, parse_constant=_refuse)
    except (ValueError, RecursionError) as fault:
        raise WireError(f"{where}: not JSON: {fault}") from fault
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise WireError(
            f"{where}: expected format {FORMAT}, got {version!r:.40}; measure with an agent of "
            "this version, or update this side"
        )
    measurement = records.build(Measurement, content, where=where, error=WireError)
    signed = {name: value for name, value in content.items() if name != "signature"}
    message = records.canonical(signed)
    try:
        signing.verify(measurement.device, FORMAT, message, measurement.signature)
    except SignatureError as fault:
        raise SignatureError(f"{where}: {fault}") from fault
    return measurement


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _whole(digits: str) -> int:
    if len(digits) > len(str(MAX_NUMBER)):  # a longer one may overflow a float
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _leaves(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield where, key
            yield from _leaves(f"{where}.{key}" if where else str(key), each)
    else:
        yield where, value


def _check(where: str, value: object) -> None:
    """Raise ValueError unless a table and a picture can show this number or text."""
    if isinstance(value, str):
        checks.texts(**{where: value})
    if isinstance(value, int | float) and not where.startswith("heat."):
        if not 0 <= value < MAX_NUMBER:  # NaN and infinity too
            raise ValueError(f"{where}: expected 0 or more, below {MAX_NUMBER}, got {value}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a number, got {value}")
