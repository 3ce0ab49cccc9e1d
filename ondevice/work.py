"""Does one order on this device, with ONNX Runtime."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import load_file

from ondevice import views
from ondevice.engine import Extracted, Trained
from ondevice.images import ImageSet, Preprocess
from ondevice.kept import KeptFile
from ondevice.meter import Meter
from ondevice.order import Model, Start, begin
from ondevice.outcome import Outcome, finish
from wire.artifact import Artifact
from wire.blobs import BlobStore
from wire.errors import ArtifactError, StillhouseError
from wire.manifest import ANCHOR
from wire.messages import Order

Progress = Callable[[str, int, int], None]


class CancelledError(StillhouseError):
    """A newer order replaced this one."""


@dataclass(frozen=True)
class Desk:
    """What work on any order needs: images, blob store, threads, progress and cancellation."""

    images: ImageSet
    blobs: BlobStore
    threads: int
    progress: Progress
    cancel: threading.Event


def perform(order: Order, artifact: Artifact, kept_file: KeptFile, desk: Desk) -> Outcome:
    """Train, extract and pack what `order` asks for; the metrics include the cost of each phase.

    Args:
        order: the order; its blobs are in `desk.blobs`.
        artifact: the artifact that the order names, verified.
        kept_file: what an earlier order of this run left (`Outcome.kept_state`); see `begin`.
        desk: images, blob store, threads, progress, cancellation.

    Raises:
        DataError: the images do not fit the artifact, one of their classes is not the run's, or
            the teacher is for other samples.
        ArtifactError: weights do not fit the artifact.
        CodecError: training diverged, or a spec is unknown.
        CancelledError: a newer order came.
    """
    meter = Meter()
    engine = OnnxEngine(artifact, desk, meter)
    start = begin(order, engine.model, desk.images, desk.blobs, kept_file)
    trained = None
    if order.epochs:
        (trained,) = engine.train([start])
        start = replace(start, teacher=None)  # frees its memory
    outcome = finish(start, trained, engine, desk.blobs)
    return replace(outcome, metrics=meter.metrics | outcome.metrics)


class OnnxEngine:
    """The `Engine` of one device: runs an artifact's graphs with stock ONNX Runtime.

    Args:
        artifact: opened and verified.
        desk: gives the number of threads, takes progress reports, and may cancel.
        meter: measures the phases "train" and "extract"; None measures nothing.

    Attributes:
        model: the model for `begin`.
    """

    def __init__(self, artifact: Artifact, desk: Desk, meter: Meter | None = None) -> None:
        self._artifact, self._desk = artifact, desk
        self._phase: Callable[[str], AbstractContextManager[object]] = (
            meter.phase if meter else nullcontext
        )
        manifest = artifact.manifest
        self._preprocess = Preprocess(manifest.preprocess.mean, manifest.preprocess.std)
        self.model = Model(
            input=manifest.model.input,
            classes=manifest.model.classes,
            class_names=manifest.model.class_names,
            batch=manifest.batch,
            sent=tuple(sorted(spec.name for spec in manifest.state_of("parameter", "buffer"))),
            initial=lambda: load_file(artifact.weights),
        )

    def train(self, starts: Sequence[Start]) -> list[Trained]:
        """Train one device after the other; see `Engine.train`.

        Raises:
            ArtifactError: the artifact takes no teacher, or has no proximal term.
            CancelledError: a newer order came.
        """
        with self._phase("train"):
            return [self._train(start) for start in starts]

    def _train(self, start: Start) -> Trained:
        from ondevice.trainer import TrainStep  # imports onnxruntime (19 MB) only when needed

        order, teacher, labels = start.order, start.teacher, start.images.y
        manifest, digest = self._artifact.manifest, self._artifact.digest
        step = TrainStep(self._artifact, start.state, threads=self._desk.threads)
        inputs = step.inputs
        inputs["lr"][...] = order.lr
        if "teacher" in inputs:
            inputs["alpha"][...] = start.alpha
            inputs["temperature"][...] = order.temperature
        elif teacher is not None:
            raise ArtifactError(
                f"artifact {digest:.12} is of task {manifest.task!r} and takes no teacher logits; "
                "export it with --task distill"
            )
        if "mu" in inputs:
            inputs["mu"][...] = order.mu
        elif order.mu:
            raise ArtifactError(
                f"artifact {digest:.12} has no proximal term for mu = {order.mu}; export it with "
                "--proximal"
            )
        loss = correct = 0.0
        for done, batch in enumerate(start.batches(), 1):
            self._go_on()
            self._preprocess(batch.pixels, out=inputs["x"])
            inputs["y"][...] = labels[batch.indices]
            if teacher is not None:
                inputs["teacher"][...] = teacher[batch.indices]
            step()
            if batch.number == 0:
                loss = correct = 0.0
            loss += float(step.loss)
            correct += float(step.correct)
            self._desk.progress("train", done, start.steps)
        # The anchors of a proximal term are left out: each training sets them anew.
        state = {n: array for n, array in step.state.items() if not n.startswith(ANCHOR)}
        flops = manifest.micro_batches * manifest.graphs["train"].flops
        return Trained(state, loss, correct, flops)

    def extract(
        self, start: Start, state: Mapping[str, NDArray[Any]], *, maps: bool
    ) -> Iterator[Extracted]:
        """Yield the outputs of each micro-batch; see `Engine.extract`.

        Raises:
            CancelledError: a newer order came.
        """
        from ondevice.trainer import Inference

        images, manifest, done = start.images, self._artifact.manifest, 0
        with self._phase("extract"):
            kind, threads = "extract" if maps else "eval", self._desk.threads
            run = Inference(self._artifact, kind, state, threads=threads)
            total = len(images.y) * len(start.order.views)
            for view in start.order.views:
                for _, pixels, valid in views.batches(images, manifest.micro_batch, view):
                    self._go_on()
                    self._preprocess(pixels, out=run.x)
                    run()
                    features = run.outputs["features"][:valid] if maps else None
                    yield Extracted(features, run.outputs["logits"][:valid], run.flops)
                    done += valid
                    self._desk.progress("extract", done, total)

    def _go_on(self) -> None:
        if self._desk.cancel.is_set():
            raise CancelledError("a newer order replaced this one")
