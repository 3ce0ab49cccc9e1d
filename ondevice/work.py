"""Doing one order: from blobs and images to a result.

Training follows FedGKT (He et al. 2020, algorithm 1) where the order brings teacher logits, and
local SGD (FedAvg) where it does not; the agent does not know which it is part of. Features leave
in evaluation mode, of the views that the order names and in the order of the samples: what comes
back as teacher logits is keyed by sample and view.
"""

import logging
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ondevice import meter, views
from ondevice.images import ImageSet, Indices, Preprocess
from wire import classes, frames, tensors
from wire.artifact import Artifact
from wire.blobs import BlobStore
from wire.errors import ArtifactError, DataError, StillhouseError
from wire.messages import BlobRef, Order

log = logging.getLogger("edge-agent")

Progress = Callable[[str, int, int], None]
State = dict[str, NDArray[Any]]


class CancelledError(StillhouseError):
    """A newer order replaced this one."""


@dataclass(frozen=True)
class Outcome:
    """`own`: what the device keeps for the run's next order, or None.

    Its own weights and optimizer, where the order brought none; with error feedback, what the
    codec left out of the update.
    """

    blobs: dict[str, BlobRef]
    metrics: dict[str, float]
    own: State | None


@dataclass(frozen=True)
class Desk:
    """What work on any order needs: the images, the blobs, and who wants to know."""

    images: ImageSet
    blobs: BlobStore
    threads: int
    progress: Progress
    cancel: threading.Event


def perform(order: Order, artifact: Artifact, own: Path | None, desk: Desk) -> Outcome:
    """Train, extract and pack what `order` asks for.

    Args:
        order: its blobs are in `desk.blobs`.
        artifact: the one that the order names, verified.
        own: safetensors of what an earlier order of this run left (`Outcome.own`), or None; with
            error feedback, of the order that `order.owed` names. Of another artifact of the model,
            what both have is taken over.
        desk: images, blob store, threads, progress, cancellation.

    Raises:
        DataError: the images do not fit the artifact, one of their classes is not the run's, or
            the teacher is for other samples.
        ArtifactError: weights do not fit the artifact.
        CodecError: training diverged, or a spec is unknown.
        CancelledError: a newer order came.
    """
    manifest, model = artifact.manifest, artifact.manifest.model
    desk.images.check_shape(model.input)
    if model.class_names and not desk.images.names:
        _warn_of_places(desk.images.source, classes.listed(model.class_names))
    desk = replace(desk, images=desk.images.labelled(model.classes, model.class_names))
    counts = meter.Meter()
    start = load_file(artifact.weights)
    values = sum(array.size for array in start.values())
    given = _read(desk.blobs, order.state, values) if order.state else {}
    mine = order.own or order.state is None
    if mine and own is not None:
        kept = _own(own)
        start |= {n: kept[n] for n in start if n in kept and kept[n].shape == start[n].shape}
    _fit(given, start)
    start |= given
    state: State = start
    if order.epochs:
        with counts.phase("train"):
            state = _train(order, artifact, start, desk, counts.metrics)
    blobs: dict[str, BlobRef] = {}
    left = state if mine and order.epochs else None
    sent = sorted(spec.name for spec in manifest.state_of("parameter", "buffer"))
    for what, spec in order.returns.items():
        if what in ("features", "logits"):
            with counts.phase("extract"):
                blobs[what] = _extract(order, artifact, state, desk, counts.metrics)
            continue
        named = {name: state[name] for name in sent}
        if what == "update":
            owed = _owed(own, start) if order.feedback and own is not None else {}
            named = {name: state[name] - start[name] for name in sent}
            packed, left = encode_update(order, named, owed)
        else:
            packed = tensors.pack(tensors.weights(named, spec), seed=order.seed)
        blobs[what] = desk.blobs.put(packed)
    return Outcome(blobs, counts.metrics, left)


@cache
def _warn_of_places(source: str, names: str) -> None:
    """Once in a process, however many orders there are."""
    log.warning(
        "%s names no classes: its label 0 is taken for the first of %s, and so on; put an array "
        "'classes' of names into it, and labels go by name",
        source,
        names,
    )


def encode_update(order: Order, update: State, owed: State) -> tuple[bytes, State | None]:
    """An update as it travels, and with error feedback what its codec left out.

    Error feedback (Seide et al. 2014; Karimireddy et al. 2019): e <- u + e - decode(encode(u + e)).

    Args:
        order: says the codec, the seed, and whether there is feedback.
        update: by name; in this order the tensors travel.
        owed: e of the order that `order.owed` names, or nothing.

    Raises:
        CodecError: training diverged.
    """
    if order.feedback:
        update = {name: array + owed.get(name, 0) for name, array in update.items()}
    packed = tensors.pack(tensors.weights(update, order.returns["update"]), seed=order.seed)
    if not order.feedback:
        return packed, None
    most = sum(array.size for array in update.values())
    frame = frames.decode(packed, max_bytes=len(packed))
    sent = tensors.unpack(frame, where="own update", most=most)
    return packed, {name: array - sent[name] for name, array in update.items()}


def _train(
    order: Order, artifact: Artifact, start: State, desk: Desk, metrics: dict[str, float]
) -> State:
    from ondevice.trainer import TrainStep  # with onnxruntime's 19 MB, once they are needed

    manifest = artifact.manifest
    teacher = _teacher(order, desk, manifest.model.classes)
    step = TrainStep(artifact, start, threads=desk.threads)
    inputs = step.inputs
    inputs["lr"][...] = order.lr
    if "teacher" in inputs:
        inputs["alpha"][...] = order.alpha if teacher is not None else 0.0
        inputs["temperature"][...] = order.temperature
    elif teacher is not None:
        raise ArtifactError(
            f"artifact {artifact.digest:.12} is of task {manifest.task!r} and takes no teacher "
            "logits; export it with --task distill"
        )
    if "mu" in inputs:
        inputs["mu"][...] = order.mu
    elif order.mu:
        raise ArtifactError(
            f"artifact {artifact.digest:.12} has no proximal term for mu = {order.mu}; export it "
            "with --proximal"
        )
    preprocess = Preprocess(manifest.preprocess.mean, manifest.preprocess.std)
    left_out = views.held_out(desk.images.digest, len(desk.images.y), order.holdout)
    per_epoch = views.steps(int((~left_out).sum()), manifest.batch)
    if teacher is not None and left_out.any():
        metrics["teacher_heldout_accuracy"] = _share(teacher, desk.images.y, left_out)
    loss = correct = 0.0
    for epoch in range(order.epochs):
        seed = order.seed + epoch
        loss = correct = 0.0
        for i, (indices, pixels) in enumerate(
            views.epoch(
                desk.images,
                batch=manifest.batch,
                seed=seed,
                augment=order.augment,
                view=order.view,
                holdout=order.holdout,
            )
        ):
            if desk.cancel.is_set():
                raise CancelledError("a newer order replaced this one")
            preprocess(pixels, out=inputs["x"])
            inputs["y"][...] = desk.images.y[indices]
            if teacher is not None:
                inputs["teacher"][...] = teacher[indices]
            step()
            loss += float(step.loss)
            correct += float(step.correct)
            desk.progress("train", epoch * per_epoch + i + 1, order.epochs * per_epoch)
    metrics["steps"] = float(order.epochs * per_epoch)
    runs = metrics["steps"] * manifest.micro_batches
    metrics["train_flops"] = runs * manifest.graphs["train"].flops
    metrics["train_loss"] = loss / per_epoch
    metrics["train_accuracy"] = correct / (per_epoch * manifest.batch)
    return step.state


def _extract(
    order: Order,
    artifact: Artifact,
    state: State,
    desk: Desk,
    metrics: dict[str, float],
) -> BlobRef:
    """Write one record a batch, so that memory stays that of a batch."""
    from ondevice.trainer import Inference

    manifest, maps = artifact.manifest, "features" in order.returns
    run = Inference(artifact, "extract" if maps else "eval", state, threads=desk.threads)
    preprocess = Preprocess(manifest.preprocess.mean, manifest.preprocess.std)
    labels, done, batches = desk.images.y, 0, 0
    total = len(labels) * len(order.views)
    right = np.zeros(total, bool)
    with desk.blobs.create() as sink:
        for view in order.views:
            for indices, pixels, valid in views.batches(desk.images, manifest.micro_batch, view):
                if desk.cancel.is_set():
                    raise CancelledError("a newer order replaced this one")
                preprocess(pixels, out=run.x)
                run()
                logits = run.outputs["logits"][:valid]
                y = labels[indices[:valid]]
                right[done : done + valid] = logits.argmax(axis=1) == y
                features = cover(run.outputs["features"][:valid], order) if maps else None
                sink.write(extract_record(order, features, logits, y, first=done))
                done += valid
                batches += 1
                desk.progress("extract", done, total)
    left_out = views.held_out(desk.images.digest, len(labels), order.holdout)
    metrics["extract_accuracy"] = float(right.mean())
    if left_out.any():
        metrics["heldout_accuracy"] = float(right[: len(labels)][left_out].mean())
    metrics["extract_flops"] = float(batches * run.flops)
    return sink.ref


def cover(features: NDArray[np.float32], order: Order) -> NDArray[np.float32]:
    """Feature maps (B, *shape) clipped and under noise, where the order says so.

    Each sample's values are scaled to an L2 norm of at most `clip`, and each gets Gaussian noise of
    deviation noise * clip: the Gaussian mechanism (Dwork and Roth 2014, appendix A), for which one
    sample in place of another is a difference of at most 2 clip. Negative values become 0, since
    what is done to its output costs no privacy. The noise comes from the system's entropy and no
    seed, so that nobody can draw it again.
    """
    if not order.clip:
        return features
    flat = features.reshape(len(features), -1)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    clipped = flat * np.minimum(1, order.clip / np.maximum(norms, 1e-12)).astype(np.float32)
    if order.noise:
        drawn = np.random.default_rng().standard_normal(flat.shape, np.float32)
        clipped = np.maximum(clipped + np.float32(order.noise * order.clip) * drawn, 0)
    covered: NDArray[np.float32] = clipped.reshape(features.shape)
    return covered


def _share(logits: NDArray[np.float32], labels: Indices, of: NDArray[np.bool_]) -> float:
    """Share of some samples whose largest logit is their label's."""
    return float((logits[of].argmax(axis=1) == labels[of]).mean())


def extract_record(
    order: Order,
    features: NDArray[np.float32] | None,
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    first: int,
) -> bytes:
    """One batch of the payload "features": (B, *shape), (B, C) and (B,), as it travels.

    Args:
        order: says the codec and the seed.
        features: of neighbouring samples; None for the payload "logits", which has only these.
        logits: of the same,
        labels: and theirs.
        first: number of the first of them, all views counted.

    Raises:
        CodecError: training diverged.
    """
    record: list[tensors.Named] = [("logits", logits, order.returns.get("logits", "float32"))]
    if features is not None:
        record = [
            ("features", features, order.returns["features"]),
            ("logits", logits, "float32"),
            ("labels", labels.astype(np.uint16), "raw"),
        ]
    return tensors.pack(record, seed=order.seed + first)


def _teacher(order: Order, desk: Desk, classes: int) -> NDArray[np.float32] | None:
    if order.teacher is None:
        return None
    if order.data_digest != desk.images.digest:
        raise DataError(
            f"teacher logits are for samples {order.data_digest:.12}, this device has "
            f"{desk.images.digest:.12}; its data changed since the last round"
        )
    expected = (len(desk.images.y), classes)
    logits = _read(desk.blobs, order.teacher, math.prod(expected)).get("logits")
    if logits is None or logits.shape != expected or logits.dtype != np.float32:
        got = None if logits is None else (logits.dtype.name, logits.shape)
        raise DataError(f"teacher logits: expected float32 {expected}, got {got}")
    return logits


def _read(blobs: BlobStore, ref: BlobRef, most: int) -> State:
    return tensors.load(blobs.path(ref.digest), where=f"blob {ref.digest:.12}", most=most)


def _own(path: Path) -> State:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as fault:
        log.warning("%s cannot be read (%s); going on without it", path, fault)
        return {}


def _owed(path: Path, start: State) -> State:
    owed = _own(path)
    if any(name not in start or array.shape != start[name].shape for name, array in owed.items()):
        log.warning("%s is of another sub-model; going on without it", path)
        return {}
    return owed


def _fit(given: Mapping[str, NDArray[np.float32]], start: State) -> None:
    for name, array in given.items():
        if name not in start or array.shape != start[name].shape:
            known = list(start[name].shape) if name in start else "no such tensor"
            raise ArtifactError(
                f"weights: {name!r} is {list(array.shape)}, the artifact has {known}"
            )
