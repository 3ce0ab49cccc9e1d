"""The end of an order: packs its payloads, names its metrics, and returns the state to keep."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.engine import Engine, Trained
from ondevice.kept import Tensors
from ondevice.order import Start, keeps_weights
from ondevice.payloads import cover, encode_state, encode_update, extract_record
from wire.blobs import BlobStore
from wire.messages import BlobRef

log = logging.getLogger("edge-agent")


@dataclass(frozen=True)
class Outcome:
    """The outcome of an order.

    Attributes:
        blobs: the payloads, by the names in `Order.returns`.
        metrics: after training, `steps`, `train_flops`, `train_loss` and `train_accuracy` (of the
            last epoch), and `teacher_heldout_accuracy` (if there is a teacher and samples are left
            out); after extraction, `extract_accuracy` (of all samples and views), `extract_flops`,
            and `heldout_accuracy` (of the samples left out, in the first view).
        kept_state: what the device keeps for the run's next order: its own weights and their
            optimizer state, or with error feedback what the codec left out of the update; or None.
    """

    blobs: dict[str, BlobRef]
    metrics: dict[str, float]
    kept_state: Tensors | None


def finish(start: Start, trained: Trained | None, engine: Engine, blobs: BlobStore) -> Outcome:
    """Pack the payloads that the order asks for.

    Args:
        start: the order as `begin` returned it.
        trained: the result of training; None if the order has no epochs.
        engine: extracts feature maps and logits, if the order asks for them.
        blobs: stores the payloads.

    Raises:
        CodecError: training diverged, or a spec is unknown.
    """
    order = start.order
    state = start.state if trained is None else trained.state
    metrics = {} if trained is None else _training(start, trained)
    kept_state = dict(state) if trained is not None and keeps_weights(order) else None
    weights = {name: state[name] for name in start.model.sent}
    payloads: dict[str, BlobRef] = {}
    for what in order.returns:
        match what:
            case "state":
                payloads[what] = blobs.put(encode_state(order, weights))
            case "update":
                update = {name: array - start.state[name] for name, array in weights.items()}
                packed, kept_state = encode_update(order, update, _owed(start))
                payloads[what] = blobs.put(packed)
            case _:
                payloads[what] = _extract(start, state, engine, blobs, metrics)
    return Outcome(payloads, metrics, kept_state)


def _training(start: Start, trained: Trained) -> dict[str, float]:
    batches = start.steps_per_epoch
    metrics = {
        "steps": float(start.steps),
        "train_flops": float(start.steps * trained.flops),
        "train_loss": trained.loss / batches,
        "train_accuracy": trained.correct / (batches * start.model.batch),
    }
    if start.teacher_accuracy is not None:
        metrics["teacher_heldout_accuracy"] = start.teacher_accuracy
    return metrics


def _extract(
    start: Start,
    state: Mapping[str, NDArray[Any]],
    engine: Engine,
    blobs: BlobStore,
    metrics: dict[str, float],
) -> BlobRef:
    """Write one record for each batch, so that only one batch is in memory."""
    order, labels, maps = start.order, start.images.y, "features" in start.order.returns
    right = np.zeros(len(labels) * len(order.views), bool)
    done = flops = 0
    with blobs.create() as sink:
        for batch in engine.extract(start, state, maps=maps):
            end = done + len(batch.logits)
            y = labels[np.arange(done, end) % len(labels)]
            right[done:end] = batch.logits.argmax(axis=1) == y
            features = None if batch.features is None else cover(batch.features, order)
            sink.write(extract_record(order, features, batch.logits, y, first=done))
            done, flops = end, flops + batch.flops
    metrics["extract_accuracy"] = float(right.mean())
    if start.left_out.any():
        metrics["heldout_accuracy"] = float(right[: len(labels)][start.left_out].mean())
    metrics["extract_flops"] = float(flops)
    return sink.ref


def _owed(start: Start) -> Tensors:
    """The part of the previous update that the codec left out, if it fits this sub-model."""
    if not start.order.feedback:
        return {}
    owed, state = start.kept_file.read(), start.state
    if any(name not in state or array.shape != state[name].shape for name, array in owed.items()):
        log.warning("%s is of another sub-model; going on without it", start.kept_file.path)
        return {}
    return owed
