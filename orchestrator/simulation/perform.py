"""Simulated devices do a round's orders: in stacks with PyTorch, or each with ONNX Runtime.

`Stacks` trains a stack of devices at once; on a CPU a stack is one device. `Agents` does what
agents do: each device runs the compiled training step in one thread, and as many devices run at
once as there are threads. That is faster on a CPU.
"""

import threading
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any, Protocol

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from models import submodel
from ondevice.engine import Engine, Trained
from ondevice.images import ImageSet
from ondevice.order import Model, Start, begin, keeps_weights
from ondevice.outcome import finish
from ondevice.work import Desk, OnnxEngine
from orchestrator.config import RunConfig
from orchestrator.launch import prepare
from orchestrator.run_folder.store import Store
from orchestrator.simulation.kept import Kept
from orchestrator.simulation.stack import STEPS, TorchEngine
from orchestrator.strategies.task import Task
from wire.artifact import Artifact
from wire.errors import StillhouseError, StorageError
from wire.messages import Order, Result


class Devices(Protocol):
    """All simulated devices of a run."""

    def perform(self, orders: Mapping[str, Order]) -> Generator[Result]:
        """The results of devices' orders, in any order."""


class Site:
    """What the devices of a run share: its settings, images, blobs and kept tensors."""

    def __init__(
        self, config: RunConfig, store: Store, task: Task, images: Mapping[str, ImageSet]
    ) -> None:
        self.config, self.task, self.images = config, task, images
        self.kept = Kept(store.folder)
        self._patience = store.patience

    def begin(self, name: str, order: Order, model: Model) -> Start | Result:
        """A device's order, ready for training; or its result, if it cannot begin."""
        try:
            files = self.kept.of(name, order)
            return begin(order, model, self.images[name], self.task.blobs, files)
        except StorageError:  # a fault of our disk, not the device's
            raise
        except StillhouseError as fault:
            return self._result(name, order, fault=str(fault))

    def finish(self, name: str, start: Start, trained: Trained | None, engine: Engine) -> Result:
        """A device's result after training; what it keeps is written."""
        try:
            outcome = finish(start, trained, engine, self.task.blobs)
        except StorageError:
            raise
        except StillhouseError as fault:  # training diverged
            return self._result(name, start.order, fault=str(fault))
        if (kept := outcome.kept_state) is not None:
            self._patience.attempt(partial(self.kept.put, name, start.order, kept))
        return self._result(name, start.order, blobs=outcome.blobs, metrics=outcome.metrics)

    def _result(self, name: str, order: Order, **outcome: Any) -> Result:
        images = self.images[name]
        return Result(
            device=name,
            run=order.run,
            sequence=order.sequence,
            round=order.round,
            samples=len(images.y),
            data_digest=images.digest,
            submodel=order.submodel,
            **outcome,
        )


class Stacks:
    """Devices that PyTorch trains.

    Args:
        site: what they share.
        size: devices in a stack; 0: one on a CPU, the whole cohort on a GPU.
    """

    def __init__(self, site: Site, size: int) -> None:
        self._site, self._size = site, size
        self._engines: dict[str, TorchEngine] = {}
        config, task = site.config, site.task
        for recipe, variant in task.variants.items():
            model = prepare.fresh(config, recipe)
            if not config.submodel.whole:
                layout = submodel.layout(model, config.device.input)
                model = submodel.narrow(model, layout, recipe.keep_rate)
            self._engines[variant.artifact.digest] = TorchEngine(
                model, config.device, task.torch_device
            )

    def perform(self, orders: Mapping[str, Order]) -> Generator[Result]:
        """See `Devices`.

        Devices share stacks if their orders differ in nothing that a stack has only one of.
        """
        groups = defaultdict(list)
        for name, order in orders.items():
            # A carried order may have another learning rate than this round's orders, and a user's
            # strategy may give each device other settings.
            shared = order.lr, order.mu, order.temperature, order.epochs
            groups[order.artifact.digest, self._steps(name, order), shared].append(name)
        on_gpu = self._site.task.torch_device.type == "cuda"
        for (digest, *_), names in groups.items():
            size = self._size or (len(names) if on_gpu else 1)
            for at in range(0, len(names), size):
                together = {name: orders[name] for name in names[at : at + size]}
                yield from self._together(self._engines[digest], together)

    def _steps(self, name: str, order: Order) -> float:
        """How many steps Adam has done on a device; a stack needs one count for all its devices."""
        if self._site.config.device.optimizer != "adam" or not keeps_weights(order):
            return 0.0
        return float(self._site.kept.of(name, order).read().get(STEPS, 0))

    def _together(self, engine: TorchEngine, orders: Mapping[str, Order]) -> Iterator[Result]:
        """The results of devices that are trained in one stack."""
        starts = {}
        for name, order in orders.items():
            start = self._site.begin(name, order, engine.model)
            if isinstance(start, Result):
                yield start
            else:
                starts[name] = start
        trains = any(start.steps for start in starts.values())
        ended = engine.train([*starts.values()]) if trains else [None] * len(starts)
        for (name, start), trained in zip(starts.items(), ended, strict=True):
            yield self._site.finish(name, start, trained, engine)


class Agents:
    """Devices that ONNX Runtime trains, each in one thread.

    Args:
        site: what they share.
        artifacts: by digest.
    """

    def __init__(self, site: Site, artifacts: Mapping[str, Artifact]) -> None:
        self._site, self._artifacts = site, artifacts

    def perform(self, orders: Mapping[str, Order]) -> Generator[Result]:
        """See `Devices`."""
        cancel = threading.Event()
        with (
            threadpool_limits(1, user_api="blas"),
            ThreadPoolExecutor(torch.get_num_threads()) as pool,
        ):
            work = [pool.submit(self._one, name, order, cancel) for name, order in orders.items()]
            try:
                for done in as_completed(work):
                    yield done.result()
            finally:
                cancel.set()
                pool.shutdown(cancel_futures=True)

    def _one(self, name: str, order: Order, cancel: threading.Event) -> Result:
        site = self._site
        desk = Desk(site.images[name], site.task.blobs, 1, lambda *_: None, cancel)
        engine = OnnxEngine(self._artifacts[order.artifact.digest], desk)
        start = site.begin(name, order, engine.model)
        if isinstance(start, Result):
            return start
        trained = engine.train([start])[0] if start.steps else None
        return site.finish(name, start, trained, engine)
