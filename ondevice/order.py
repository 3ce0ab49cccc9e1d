"""The beginning of an order: its tensors are read, checked and merged before training.

    begin(order, model, ...)     -> Start        here
    engine.train([start])        -> [Trained]    `engine`: ONNX Runtime, or PyTorch for many devices
    finish(start, trained, ...)  -> Outcome      `outcome`: payloads, metrics, kept state

Agents and simulations do the same; only their engines differ. With teacher logits, training follows
FedGKT (He et al. 2020, algorithm 1); without them it is plain local training. Teacher logits have
one row for each sample, as seen in the order's `view`.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ondevice import views
from ondevice.images import ImageSet, Indices, Pixels
from ondevice.kept import KeptFile, Tensors
from wire import classes, tensors
from wire.blobs import BlobStore
from wire.errors import ArtifactError, DataError
from wire.messages import BlobRef, Order

log = logging.getLogger("edge-agent")


@dataclass(frozen=True)
class Model:
    """The facts about an order's model that `begin` and `finish` need.

    Attributes:
        input: shape of one sample, (C, H, W).
        classes: number of logits.
        class_names: in the order of the logits; () if labels are only numbers.
        batch: number of samples in an optimizer's step.
        sent: names of parameters and buffers; the rest of the state is never sent.
        initial: reads or makes the state before any training: parameters, buffers, optimizer.
    """

    input: tuple[int, ...]
    classes: int
    class_names: tuple[str, ...]
    batch: int
    sent: tuple[str, ...]
    initial: Callable[[], Tensors]


class Batch(NamedTuple):
    """The samples of one optimizer's step: their indices (B,), and pixels uint8 (B, H, W, C).

    `number` counts the batches of an epoch, from 0.
    """

    number: int
    indices: Indices
    pixels: Pixels


@dataclass(frozen=True)
class Start:
    """One device's order, ready for an engine.

    Attributes:
        order: the order.
        model: the model to train.
        images: the device's images, labelled in the run's numbering of classes.
        state: every state tensor at the start of training.
        left_out: (N,), true for samples that are not trained on.
        teacher: the teacher's logits (N, C) float32 of the images; None if none are used.
        teacher_accuracy: the teacher's accuracy on the samples left out; None if there is no
            teacher or no sample left out.
        kept_file: the file of an earlier order; with error feedback, `finish` reads from it what
            the codec left out.
    """

    order: Order
    model: Model
    images: ImageSet
    state: Mapping[str, NDArray[Any]]
    left_out: NDArray[np.bool_]
    teacher: NDArray[np.float32] | None
    teacher_accuracy: float | None
    kept_file: KeptFile

    @property
    def alpha(self) -> float:
        """Weight of the distillation term."""
        return 0.0 if self.teacher is None else self.order.alpha

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in one pass over the samples that are trained on."""
        return views.steps(int((~self.left_out).sum()), self.model.batch)

    @property
    def steps(self) -> int:
        """Number of optimizer steps in the whole order."""
        return self.order.epochs * self.steps_per_epoch

    def batches(self) -> Iterator[Batch]:
        """The batches of all steps, epoch by epoch."""
        order = self.order
        for number in range(order.epochs):
            drawn = views.epoch(
                self.images,
                batch=self.model.batch,
                seed=order.seed + number,
                augment=order.augment,
                view=order.view,
                holdout=order.holdout,
            )
            for n, (indices, pixels) in enumerate(drawn):
                yield Batch(n, indices, pixels)


def keeps_weights(order: Order) -> bool:
    """Whether the device trains weights of its own, from which the run's next order continues."""
    return order.own or order.state is None


def begin(
    order: Order, model: Model, images: ImageSet, blobs: BlobStore, kept_file: KeptFile
) -> Start:
    """Read, check and merge the tensors that an order needs.

    The state starts as the model's initial state. If the device keeps weights of its own, the
    tensors that an earlier order left replace those of the same name and shape. Last, the order's
    own tensors replace theirs.

    Args:
        order: the order; its blobs are in `blobs`.
        model: the model that the order names.
        images: the device's images.
        blobs: the device's store.
        kept_file: the file that an earlier order of this run left; with error feedback, the file of
            the order `order.owed`.

    Raises:
        DataError: the images do not fit the model, one of their classes is not the run's, or the
            teacher is for other samples.
        ArtifactError: the order's weights do not fit the model.
        WireError: a blob is damaged.
    """
    images.check_shape(model.input)
    if model.class_names and not images.names:
        _warn_of_places(images.source, classes.listed(model.class_names))
    images = images.labelled(model.classes, model.class_names)
    state = model.initial()
    values = sum(array.size for array in state.values())
    order_state = _read(blobs, order.state, values) if order.state else {}
    _check_fit(order_state, state)
    if keeps_weights(order):
        own_state = kept_file.read()
        state |= {n: a for n, a in own_state.items() if n in state and a.shape == state[n].shape}
    state |= order_state
    left_out = views.held_out(images.digest, len(images.y), order.holdout)
    teacher = _teacher(order, images, blobs, model.classes) if order.epochs else None
    accuracy = None
    if teacher is not None and left_out.any():
        accuracy = float((teacher[left_out].argmax(axis=1) == images.y[left_out]).mean())
    return Start(order, model, images, state, left_out, teacher, accuracy, kept_file)


@cache
def _warn_of_places(source: str, names: str) -> None:
    """Warn once in a process, however many orders there are."""
    log.warning(
        "%s names no classes: its label 0 is taken for the first of %s, and so on; put an array "
        "'classes' of names into it, and labels go by name",
        source,
        names,
    )


def _check_fit(order_state: Tensors, state: Tensors) -> None:
    for name, array in order_state.items():
        if name not in state or array.shape != state[name].shape:
            known = list(state[name].shape) if name in state else "no such tensor"
            raise ArtifactError(
                f"weights: {name!r} is {list(array.shape)}, the artifact has {known}"
            )


def _teacher(
    order: Order, images: ImageSet, blobs: BlobStore, count: int
) -> NDArray[np.float32] | None:
    if order.teacher is None:
        return None
    if order.data_digest != images.digest:
        raise DataError(
            f"teacher logits are for samples {order.data_digest:.12}, this device has "
            f"{images.digest:.12}; its data changed since the last round"
        )
    expected = (len(images.y), count)
    logits = _read(blobs, order.teacher, math.prod(expected)).get("logits")
    if logits is None or logits.shape != expected or logits.dtype != np.float32:
        got = None if logits is None else (logits.dtype.name, logits.shape)
        raise DataError(f"teacher logits: expected float32 {expected}, got {got}")
    return logits


def _read(blobs: BlobStore, ref: BlobRef, most: int) -> Tensors:
    return tensors.load(blobs.path(ref.digest), where=f"blob {ref.digest:.12}", most=most)
