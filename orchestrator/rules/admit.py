"""Checks of what may enter the aggregate: pure rules that give a reason for each refusal.

The device gets the reason, so it names what was expected and what came.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire import logs
from wire.errors import AdmissionError
from wire.messages import Order, Result

Array = NDArray[Any]
TOP = np.float32(255)
MAX_NORM_RATIO = 100.0
MAX_VALUE = 1e5  # largest |feature| or |logit|: beyond it, training has diverged


def header(
    result: Result, order: Order | None, device: str, samples: int, limits: Mapping[str, int]
) -> None:
    """Check a result before its blobs are pulled.

    Args:
        result: as it came.
        order: the device's open order, or None.
        device: the name in the topic, which the broker's access list guards.
        samples: how many samples the device announced in its birth message.
        limits: most bytes of a payload, by its name.

    Raises:
        AdmissionError: the result names another device, answers another order than the open one,
            reports a fault, is an update of another sub-model, has wrong or oversized payloads,
            another number of samples or other samples, or has a metric that is not finite.
    """
    if result.device != device:
        raise AdmissionError(f"the result names device {result.device!r}, it came from {device!r}")
    if order is None:
        raise AdmissionError(f"{device} has no order in the open round; wait for the next one")
    _same_order(result, order)
    if result.fault:
        raise AdmissionError(f"the device could not do it: {logs.clean(result.fault)}")
    if result.submodel != order.submodel:
        raise AdmissionError(
            f"expected an update of sub-model {order.submodel[:12] or 'whole'}, got one of "
            f"{result.submodel[:12] or 'whole'}; it keeps other units"
        )
    if set(result.blobs) != set(order.returns):
        raise AdmissionError(
            f"expected payloads {sorted(order.returns)}, got {sorted(result.blobs)}"
        )
    for name, ref in result.blobs.items():
        if ref.size > limits[name]:
            raise AdmissionError(f"payload {name!r} has {ref.size} bytes, limit {limits[name]}")
    if result.samples != samples:
        raise AdmissionError(f"the device was born with {samples} samples, now {result.samples}")
    if odd := [name for name, value in result.metrics.items() if not math.isfinite(value)]:
        raise AdmissionError(f"metrics are not finite: {odd[:4]}")
    if order.data_digest and result.data_digest != order.data_digest:
        raise AdmissionError(
            f"the device's samples changed within the round: expected {order.data_digest:.12}, "
            f"got {result.data_digest:.12}"
        )


def _same_order(result: Result, order: Order) -> None:
    if (result.run, result.sequence) != (order.run, order.sequence):
        raise AdmissionError(
            f"expected a result of order {order.sequence} of {order.run}, got {result.sequence} of "
            f"{result.run}; its round is closed"
        )
    if result.round != order.round:
        raise AdmissionError(
            f"order {order.sequence} is of round {order.round}, the result says {result.round}"
        )


def norm(weights: Mapping[str, Array]) -> float:
    """L2 norm of all weights; the scale by which absurd updates are rejected."""
    return math.sqrt(sum(float(np.square(a, dtype=np.float64).sum()) for a in weights.values()))


def weights(
    tensors: Mapping[str, Array], expected: Mapping[str, tuple[int, ...]], reference: float
) -> None:
    """Check parameters and buffers, or an update of them.

    Args:
        tensors: as decoded.
        expected: shapes of the parameters and buffers, by name.
        reference: `norm` of the weights before round 1.

    Raises:
        AdmissionError: names or shapes differ, a value is not finite, the norm is absurd.
    """
    if set(tensors) != set(expected):
        odd = sorted(set(tensors) ^ set(expected))
        raise AdmissionError(f"expected {len(expected)} tensors; missing or unknown: {odd[:4]}")
    for name, array in tensors.items():
        if array.shape != expected[name] or array.dtype != np.float32:
            raise AdmissionError(
                f"tensor {name!r}: expected float32 {list(expected[name])}, got "
                f"{array.dtype.name} {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise AdmissionError(f"tensor {name!r} holds NaN or infinity")
    limit = MAX_NORM_RATIO * max(reference, 1.0)
    if norm(tensors) > limit:
        raise AdmissionError(f"norm {norm(tensors):.3g}, limit {limit:.3g}; training diverged")


def variances(tensors: Mapping[str, Array]) -> None:
    """Check the running variances of weights that no lossy codec has rounded.

    Raises:
        AdmissionError: one is negative; batch norm would turn it into NaN.
    """
    for name, array in tensors.items():
        if name.endswith("running_var") and array.min(initial=0) < 0:
            raise AdmissionError(f"tensor {name!r}: expected variances, got {array.min():g}")


def features(record: Mapping[str, Array], shape: tuple[int, ...], classes: int, room: int) -> None:
    """Check one batch of feature maps (n, *shape), logits (n, classes), labels (n,).

    Args:
        record: as decoded; if feature maps are levels, with their `low` and `step`.
        shape: of one sample's feature map.
        classes: how many classes the task has.
        room: how many samples may still come.

    Raises:
        AdmissionError: a shape, dtype, label or count is wrong, or a value is not finite or absurd.
    """
    quantized = "low" in record
    if set(record) - {"low", "step"} != {"features", "logits", "labels"}:
        raise AdmissionError(f"expected features, logits and labels, got {sorted(record)}")
    n = record["labels"].size
    expected = {
        "features": ("uint8" if quantized else "float32", (n, *shape)),
        "logits": ("float32", (n, classes)),
        "labels": ("uint16", (n,)),
    }
    for name, (dtype, full) in expected.items():
        array = record[name]
        if array.dtype.name != dtype or array.shape != full:
            raise AdmissionError(
                f"{name}: expected {dtype} {list(full)}, got {array.dtype.name} {list(array.shape)}"
            )
    maps = [record["features"]]
    if quantized:  # the lowest and the highest value that a block can hold
        maps = [record["low"], record["low"] + TOP * record["step"]]
    for name, arrays in (("features", maps), ("logits", [record["logits"]])):
        if any(not (np.abs(values).max(initial=0) <= MAX_VALUE) for values in arrays):  # or NaN
            raise AdmissionError(f"{name} hold values that are not finite or above {MAX_VALUE:g}")
    if not 1 <= n <= room:
        raise AdmissionError(f"{n} samples where at most {room} were announced")
    if int(record["labels"].max()) >= classes:
        raise AdmissionError(f"label {int(record['labels'].max())} of {classes} classes")


def logits(record: Mapping[str, Array], classes: int, room: int) -> None:
    """Check one batch of logits (n, classes) that came without feature maps.

    Raises:
        AdmissionError: a name, shape, dtype or count is wrong, or a value is not finite or absurd.
    """
    if set(record) != {"logits"}:
        raise AdmissionError(f"expected logits, got {sorted(record)}")
    array = record["logits"]
    if array.dtype != np.float32 or array.ndim != 2 or array.shape[1] != classes:
        raise AdmissionError(
            f"logits: expected float32 [n, {classes}], got {array.dtype.name} {list(array.shape)}"
        )
    if not 1 <= len(array) <= room:
        raise AdmissionError(f"{len(array)} samples where at most {room} were announced")
    if not np.abs(array).max() <= MAX_VALUE:  # or NaN
        raise AdmissionError(f"logits hold values that are not finite or above {MAX_VALUE:g}")


def plausible(samples: int, classes: int, size: int) -> None:
    """Check that `size` bytes can hold this many samples, before room is made for them.

    Raises:
        AdmissionError: the logits (float32) and labels (two bytes) alone would be larger.
    """
    if not 1 <= samples <= size // (4 * classes + 2):
        raise AdmissionError(f"{size} bytes cannot hold {samples} samples of {classes} classes")


def complete(what: str, samples: int, announced: int) -> None:
    """Check that all announced samples of a payload came; `what` names it in the message.

    Raises:
        AdmissionError: fewer or more came.
    """
    if samples != announced:
        raise AdmissionError(f"{what} of {samples} samples, {announced} were announced")
