"""FedGKT (He et al. 2020): devices teach a large model with feature maps, and it teaches them.

A round: devices train with the last z_s as teacher (none at first), send H, z_c and y of all their
samples and their own weights (42 kB for ResNet-8); the server trains W_s on all shards it has,
those of absent devices included, and sends z_s of each sample back with the next order. It
evaluates without any device's test data: the extractor travels with the weights, and held-out
images go through extractor and large model here.
"""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import models
from orchestrator import distill, shards
from orchestrator.samples import Samples
from orchestrator.shards import Shard
from orchestrator.strategies.fedavg import read_payload
from orchestrator.strategies.local import admit_own_weights, device_model, evaluate_device
from orchestrator.strategies.strategy import Array, Metrics, State, Task
from wire import tensors
from wire.errors import RunError
from wire.messages import Birth, BlobRef, Order, Result


class FedGKT:
    """Group knowledge transfer.

    State: tensors `server/...` (the large model), `optimizer/...` (its optimizer) and
    `device/<name>/...` (each device's last weights); notes "shards" and "teachers", each by device.

    Raises:
        RunError: the device model has no extractor, or the server model does not take its features.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        features = task.variants[1.0].features
        if features is None:
            raise RunError(
                f"model {task.config.device.model!r} has no feature extractor, which fedgkt needs; "
                "use resnet8, or strategy fedavg"
            )
        channels, height, width = features
        self.shape = (channels, height, width)

    def begin(self) -> State:
        """A fresh large model; the same seed gives the same."""
        torch.manual_seed(self.task.config.seed)
        return State(
            _under("server", distill.weights(self._server())),
            {"shards": {}, "teachers": {}, "blobs": []},
        )

    def orders(
        self, state: State, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """To each device its own teacher logits, if they are for the samples it has now."""
        device, orders = self.task.config.device, {}
        for name, birth in cohort.items():
            teacher = state.notes["teachers"].get(name)
            fits = teacher is not None and teacher["data_digest"] == birth.data_digest
            orders[name] = self.task.order(
                name,
                round_,
                sequence,
                teacher=BlobRef(**teacher["ref"]) if fits else None,
                data_digest=birth.data_digest,
                alpha=device.alpha if fits else 0.0,
                returns={"features": device.features, "state": "float32"},
            )
        return orders

    def admit(self, state: State, order: Order, result: Result) -> None:
        """Weights as `Local` does; every record of the features, decoded to a shard on the way."""
        del state
        admit_own_weights(self.task, order, result)
        self._shelve(result.blobs["features"], result.samples)

    def aggregate(
        self, state: State, orders: Mapping[str, Order], results: Sequence[Result]
    ) -> tuple[State, Metrics]:
        """Train on all shards, compute every sample's z_s, evaluate."""
        task, config = self.task, self.task.config.server
        round_ = next(iter(orders.values())).round
        held: dict[str, dict[str, Any]] = dict(state.notes["shards"])
        weights = {n: a for n, a in state.tensors.items() if n.startswith("device/")}
        for result in results:
            held[result.device] = {
                "ref": _plain(result.blobs["features"]),
                "samples": result.samples,
                "data_digest": result.data_digest,
                "round": round_,
            }
            own = read_payload(task, orders[result.device], result, "state")
            weights |= {f"device/{result.device}/{n}": a for n, a in own.items()}
        names = sorted(held)
        opened = [self._shelve(BlobRef(**held[n]["ref"]), held[n]["samples"]) for n in names]
        model = distill.load(self._server(), state.under("server")).to(task.torch_device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        step = distill.optimizer(model, config)
        _restore(step, state.under("optimizer"))
        samples = Samples(opened, task.torch_device)
        mean_loss = distill.train(
            model,
            step,
            samples,
            config,
            seed=(task.config.seed << 20) + round_,
            progress=lambda done, total: task.progress("distil", done, total),
        )
        teachers = {}
        for i, (name, span) in enumerate(zip(names, samples.spans, strict=True)):
            logits = distill.teach(model, samples, span, config)
            ref = task.blobs.put(tensors.pack([("logits", logits, "float32")], seed=0))
            teachers[name] = {"ref": _plain(ref), "data_digest": held[name]["data_digest"]}
            task.progress("teach", i + 1, len(names))
        digests = [entry["ref"]["digest"] for part in (held, teachers) for entry in part.values()]
        notes = {"shards": held, "teachers": teachers, "blobs": digests}
        learnt = _under("server", distill.weights(model)) | _flat(step) | weights
        after = State(learnt, notes)
        self._forget({held[n]["ref"]["digest"] for n in names})
        return after, {"server_loss": mean_loss, **self._evaluate(after, model, names)}

    def _evaluate(self, state: State, model: nn.Module, names: Sequence[str]) -> Metrics:
        """Held-out accuracy of each device's extractor + large model, and of its own classifier."""
        heldout, config = self.task.heldout, self.task.config.server
        devices = {}
        for i, name in enumerate(names):
            small = device_model(self.task, state.under(f"device/{name}"))
            stacked = nn.Sequential(small.get_submodule("extractor"), model)
            logits = distill.predict(stacked, heldout.x, config)
            devices[name] = {
                "server_accuracy": distill.accuracy(logits, heldout.y),
                "device_accuracy": evaluate_device(self.task, small),
            }
            self.task.progress("evaluate", i + 1, len(names))
        means = {
            key: float(np.mean([d[key] for d in devices.values()]))
            for key in ("server_accuracy", "device_accuracy")
        }
        return {**means, "devices": devices}

    def _server(self) -> nn.Module:
        config = self.task.config
        return models.build(
            config.server.model, classes=config.device.classes, input_shape=self.shape
        )

    def _shelve(self, ref: BlobRef, samples: int) -> Shard:
        return shards.shelve(
            self.task.blobs.path(ref.digest),
            self.task.shards / ref.digest,
            samples=samples,
            shape=self.shape,
            classes=self.task.config.device.classes,
            spec=self.task.config.device.features,
        )

    def _forget(self, digests: set[str]) -> None:
        """Delete decoded shards that a newer one has replaced."""
        for folder in self.task.shards.iterdir():
            if folder.name not in digests:
                shutil.rmtree(folder)


def _plain(ref: BlobRef) -> dict[str, Any]:
    return {"digest": ref.digest, "size": ref.size, "chunk_bytes": ref.chunk_bytes}


def _under(prefix: str, weights: Mapping[str, Array]) -> dict[str, Array]:
    return {f"{prefix}/{name}": array for name, array in weights.items()}


def _flat(step: torch.optim.Optimizer) -> dict[str, Array]:
    """The optimizer's tensors as `optimizer/<parameter number>/<name>`."""
    return {
        f"optimizer/{number}/{name}": value.detach().cpu().numpy()
        for number, slots in step.state_dict()["state"].items()
        for name, value in slots.items()
        if isinstance(value, torch.Tensor)
    }


def _restore(step: torch.optim.Optimizer, tensors: Mapping[str, Array]) -> None:
    if not tensors:
        return
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for path, array in tensors.items():
        number, name = path.split("/")
        slots.setdefault(int(number), {})[name] = torch.from_numpy(np.array(array))
    step.load_state_dict({**step.state_dict(), "state": slots})
    # Fused optimizers walk through memory: each slot must lie there as its parameter does.
    for parameter, own in step.state.items():
        for name, value in own.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                own[name] = torch.empty_like(parameter).copy_(value)
