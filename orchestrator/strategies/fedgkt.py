"""FedGKT (He et al. 2020): devices teach a large model with feature maps, and it teaches them.

A round: devices train with the last z_s as teacher (none at first), send H, z_c and y of all their
samples and their own weights (42 kB for ResNet-8); the server trains W_s on all shards it has,
those of absent devices included, and sends z_s of each sample back with the next order. It
evaluates without any device's test data: the extractor travels with the weights, and held-out
images go through extractor and large model here.

`TransferConfig` says what differs from the paper. A shard is asked for only where the feature maps
that the server has are not those that the device would send now; else z_c alone travel.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import models
from ondevice.views import MIRRORED, PLAIN, held_out
from orchestrator.config import Recipe
from orchestrator.strategies import extractors
from orchestrator.strategies.fedavg import read_payload
from orchestrator.strategies.local import admit_own_weights, device_model, evaluate_device
from orchestrator.strategies.strategy import Array, Metrics, State, Task, evaluated
from orchestrator.training import distill, ranks, shards
from orchestrator.training.samples import Samples, Source
from orchestrator.training.shards import Shard
from wire import codecs, tensors
from wire.errors import AdmissionError, RunError
from wire.messages import Birth, BlobRef, Order, Result
from wire.names import title

log = logging.getLogger("orchestrator")

LEAST = 1e-6  # weight of a sample, so that a batch of old ones has a mean


class FedGKT:
    """Group knowledge transfer.

    State: tensors `server/...` (the large model), `optimizer/...` (its optimizer),
    `device/<name>/...` (each device's last weights), `extractor/<name>/...` (the one that made the
    device's feature maps), `shared/...` (the extractor that all go on with, if they do) and
    `network/<model>/...` (what follows it, likewise, for all with this model); notes "shards" and
    "teachers", each by device, and "schedule".

    Raises:
        RunError: the device models do not fit each other or the run; see `extractors.check`.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        found = {
            name: (task.variants[Recipe(name)].features, task.others.get(name, task.initial))
            for name in task.config.device.models
        }
        self.shape = extractors.check(task.config, found)

    def begin(self) -> State:
        """A fresh large model; the same seed gives the same."""
        torch.manual_seed(self.task.config.seed)
        server = self._server()
        if self.task.pretrained and not models.inherit(server, self.task.pretrained):
            log.warning("pretrained: nothing fits %s, which begins with random weights",
                        title(self.task.config.server.model))  # fmt: skip
        learnt = _under("server", distill.weights(server)) | extractors.begin(self.task)
        return State(learnt, {"shards": {}, "teachers": {}, "blobs": []})

    def orders(
        self, state: State, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """To each device its own teacher logits, if they are for the samples it has now."""
        task, device, transfer = self.task, self.task.config.device, self.task.config.transfer
        frozen, orders = transfer.frozen(round_), {}
        shared, refs = state.under("shared"), {}
        for model in device.models if shared else ():
            packed = tensors.pack(
                tensors.weights(extractors.shared(state, model), "float32"), seed=0
            )
            refs[model] = task.blobs.put(packed)
        for name, birth in cohort.items():
            teacher = state.notes["teachers"].get(name)
            fits = teacher is not None and teacher["data_digest"] == birth.data_digest
            fits = fits and device.alpha > 0
            returns = {"state": "float32"}
            if self._stale(state, name, birth, round_, shared):
                returns["features"] = device.features
            elif task.config.server.alpha or not len(task.heldout.y):
                returns["logits"] = transfer.logits
            orders[name] = task.order(
                name,
                round_,
                sequence,
                Recipe(device.model_of(name), frozen=frozen),
                state=refs.get(device.model_of(name)),
                own=True,
                teacher=self._offered(teacher["ref"]) if fits else None,
                data_digest=birth.data_digest,
                alpha=device.alpha if fits else 0.0,
                view=teacher["view"] if fits else self._view(round_ - 1),
                views=self._views(round_),
                clip=device.clip,
                noise=device.noise,
                returns=returns,
            )
        return orders

    def admit(self, state: State, order: Order, result: Result) -> None:
        """Weights as `Local` does; every record of the features, decoded to a shard on the way."""
        admit_own_weights(self.task, order, result)
        rows = result.samples * len(order.views)
        if "features" in result.blobs:
            self._shelve(result.blobs["features"], rows)
        if "logits" in result.blobs:
            held = state.notes["shards"][result.device]
            if held["samples"] != rows:
                raise AdmissionError(
                    f"logits of {rows} samples, but feature maps of {held['samples']} are here"
                )
            self._logits(result.blobs["logits"], rows, order.returns["logits"])

    def aggregate(
        self, state: State, round_: int, orders: Mapping[str, Order], results: Sequence[Result]
    ) -> tuple[State, Metrics]:
        """Train on all shards, compute every sample's z_s, evaluate."""
        task, config = self.task, self.task.config.server
        held: dict[str, dict[str, Any]] = dict(state.notes["shards"])
        kept = {
            name: array
            for name, array in state.tensors.items()
            if name.startswith(("device/", "extractor/", "shared/", "network/"))
        }
        own = {r.device: read_payload(task, orders[r.device], r, "state") for r in results}
        for result in results:
            name, order = result.device, orders[result.device]
            if "features" in result.blobs:
                kept |= _under(f"extractor/{name}", extractors.part(own[name]))
            held[name] = {**held.get(name, {}), **_entry(order, result)}
            kept |= _under(f"device/{name}", own[name])
        transfer = task.config.transfer
        if transfer.extractor == "shared":
            kept |= extractors.means(task, own, results, round_)
        for name, entry in held.items() if transfer.resend else ():
            weights = State(kept, {})
            now = weights.under("shared") or extractors.part(weights.under(f"device/{name}"))
            moved = extractors.moved(task, name, weights.under(f"extractor/{name}"), now)
            held[name] = {**entry, "moved": moved}
        names = sorted(held)
        model = distill.load(self._server(), state.under("server")).to(task.torch_device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        step = distill.optimizer(model, config)
        distill.resume(step, state.under("optimizer"))
        samples = Samples(
            [self._source(name, held[name], kept, round_) for name in names], task.torch_device
        )
        schedule = distill.Schedule(
            config, step, round_, task.config.rounds, state.notes.get("schedule")
        )
        mean_loss = ranks.train(
            model,
            step,
            samples,
            config,
            seed=(task.config.seed << 20) + round_,
            progress=lambda done, total: task.progress("distil", done, total),
            rate=schedule.rate,
        )
        teachers = {}
        for i, (name, span) in enumerate(zip(names, samples.spans, strict=True)):
            if not task.config.device.alpha:
                break
            # Uncropped feature maps show the view that they were sent in.
            view = self._view(round_) if held[name]["cropped"] else held[name]["view"]
            logits = ranks.teach(model, samples, span, config, view)
            ref = task.blobs.put(self._packed(logits))
            own_data = held[name]["data_digest"]
            teachers[name] = {"ref": _plain(ref), "data_digest": own_data, "view": view}
            task.progress("teach", i + 1, len(names))
        after = State(_under("server", distill.weights(model)) | kept, {})
        scores: Metrics = {}
        if evaluated(task.config, round_):
            scores = (
                self._evaluate(after, model, names)
                if len(task.heldout.y)
                else self._evaluate_left_out(model, samples, names)
            )
        notes = {
            "shards": held,
            "teachers": teachers,
            "schedule": schedule.after(scores.get("server_accuracy")),
            "blobs": sorted(_digests(held, teachers)),
        }
        after = State({**after.tensors, **_under("optimizer", distill.slots(step))}, notes)
        self._forget({entry["ref"]["digest"] for entry in held.values()})
        return after, {"server_loss": mean_loss, **scores}

    def _views(self, round_: int) -> tuple[int, ...]:
        """Of which views feature maps and logits are sent in a round."""
        transfer = self.task.config.transfer
        if transfer.views and transfer.frozen(round_):
            return PLAIN, MIRRORED
        return (self._view(round_),)

    def _view(self, round_: int) -> int:
        """That devices see in a round: a drawn one is 2 or higher, since 0 and 1 are not drawn."""
        config, transfer = self.task.config, self.task.config.transfer
        drawn = transfer.views and transfer.student_views
        return (config.seed << 20) + round_ + 2 if drawn else PLAIN

    def _stale(
        self, state: State, name: str, birth: Birth, round_: int, shared: Mapping[str, Array]
    ) -> bool:
        """Whether the feature maps that are here are not those that the device would send."""
        held, transfer = state.notes["shards"].get(name), self.task.config.transfer
        if held is None or held["data_digest"] != birth.data_digest:
            return True
        views = self._views(round_)
        if held["cropped"] != (len(views) > 1) or held["view"] != views[0]:
            return True
        sent = state.under(f"extractor/{name}")
        now = shared or extractors.part(state.under(f"device/{name}"))
        if transfer.frozen(round_):
            return any(not np.array_equal(sent[key], now[key]) for key in now)
        return not transfer.resend or held["moved"] > transfer.resend

    def _source(
        self, name: str, entry: Mapping[str, Any], kept: Mapping[str, Array], round_: int
    ) -> Source:
        """What is here of a device, its newest logits beside its feature maps."""
        shard = self._shelve(BlobRef(**entry["ref"]), entry["samples"])
        if entry["logits"]:
            ref, spec = BlobRef(**entry["logits"]), self.task.config.transfer.logits
            shard = replace(shard, logits=self._logits(ref, entry["samples"], spec))
        made_by = State(kept, {}).under(f"extractor/{name}")
        fill = extractors.fill(self.task, name, made_by) if entry["cropped"] else None
        age, n = round_ - entry["round"], len(shard) // (2 if entry["cropped"] else 1)
        left_out = held_out(entry["data_digest"], n, self.task.config.device.holdout)
        weight = max(self.task.config.transfer.age_decay**age, LEAST)
        return Source(shard, weight, fill, left_out)

    def _logits(self, ref: BlobRef, rows: int, spec: str) -> NDArray[np.float32]:
        """The records of a payload "logits", (rows, C) together.

        Raises:
            AdmissionError, WireError: they are not that.
        """
        classes = self.task.config.device.class_count
        return shards.read_logits(
            self.task.blobs.path(ref.digest), rows=rows, classes=classes, spec=spec
        )

    def _packed(self, logits: NDArray[np.float32]) -> bytes:
        """Teacher logits as they travel; what the codec cannot hold is cut."""
        spec = self.task.config.transfer.logits
        most = codecs.parse(spec).coder.highest
        if not np.abs(logits).max() <= most:
            log.warning(
                "logits of the large model go up to %g, and %s holds %g: they are cut; lower "
                "server.lr if it stays so", np.abs(logits).max(), spec, most,
            )  # fmt: skip
            logits = np.clip(logits, -most, most)
        return tensors.pack([("logits", logits, spec)], seed=0)

    def _evaluate(self, state: State, model: nn.Module, names: Sequence[str]) -> Metrics:
        """Held-out accuracy of each device's extractor + large model, and of its own classifier."""
        heldout, config = self.task.heldout, self.task.config.server
        device, transfer = self.task.config.device, self.task.config.transfer
        devices, known, small = {}, {}, {}
        for i, name in enumerate(names):
            weights = state.under(f"extractor/{name}")
            key = b"".join(weights[n].tobytes() for n in sorted(weights))
            if key not in known:  # a shared extractor is looked at once
                stacked = nn.Sequential(extractors.build(self.task, name, weights), model)
                logits = distill.predict(stacked, heldout.x, config)
                known[key] = distill.accuracy(logits, heldout.y)
            whose = device.model_of(name) if transfer.network == "shared" else name
            if whose not in small:  # so is a shared network
                network = extractors.network(state, device, name)
                small[whose] = evaluate_device(self.task, device_model(self.task, name, network))
            devices[name] = {"server_accuracy": known[key], "device_accuracy": small[whose]}
            self.task.progress("evaluate", i + 1, len(names))
        means = {
            key: float(np.mean([d[key] for d in devices.values()]))
            for key in ("server_accuracy", "device_accuracy")
        }
        return {**means, "devices": devices}

    def _evaluate_left_out(
        self, model: nn.Module, samples: Samples, names: Sequence[str]
    ) -> Metrics:
        """Accuracy on what devices hold out, of the large model and by the logits that they sent.

        Feature maps of one view are evaluated in that view.
        """
        right: dict[str, list[NDArray[np.bool_]]] = {"server": [], "device": []}
        devices = {}
        for name, span, source in zip(names, samples.spans, samples.sources, strict=True):
            assert source.left_out is not None  # noqa: S101 - `_source` sets it
            of, shard = np.flatnonzero(source.left_out), source.shard
            logits = ranks.teach(model, samples, span, self.task.config.server)
            for who, z in (("server", logits), ("device", shard.logits)):
                right[who].append(z[of].argmax(axis=1) == shard.labels[of])
            devices[name] = {
                f"{who}_accuracy": float(each[-1].mean()) for who, each in right.items() if len(of)
            }
            self.task.progress("evaluate", len(devices), len(names))
        if not any(len(each) for each in right["server"]):
            raise RunError("device.holdout leaves no image of any device to evaluate on; raise it")
        means = {f"{who}_accuracy": float(np.concatenate(e).mean()) for who, e in right.items()}
        return {**means, "devices": devices}

    def _server(self) -> nn.Module:
        config = self.task.config
        return models.build(
            config.server.model, classes=config.device.class_count, input_shape=self.shape
        )

    def _shelve(self, ref: BlobRef, rows: int) -> Shard:
        return shards.shelve(
            self.task.blobs.path(ref.digest),
            self.task.shards / ref.digest,
            samples=rows,
            shape=self.shape,
            classes=self.task.config.device.class_count,
            spec=self.task.config.device.features,
        )

    def _offered(self, ref: Mapping[str, Any]) -> BlobRef:
        """A blob as devices pull it now; when it was noted, chunks may have had another size."""
        return replace(BlobRef(**ref), chunk_bytes=self.task.config.chunk_bytes)

    def _forget(self, digests: set[str]) -> None:
        """Delete decoded shards that a newer one has replaced."""
        for folder in self.task.shards.iterdir():
            if folder.name not in digests:
                shutil.rmtree(folder)


def _entry(order: Order, result: Result) -> dict[str, Any]:
    """What is noted of a result's payloads, beside or in place of what was noted before."""
    noted: dict[str, Any] = {"round": order.round, "data_digest": result.data_digest}
    if "features" in result.blobs:
        noted |= {
            "ref": _plain(result.blobs["features"]),
            "logits": None,
            "samples": result.samples * len(order.views),
            "view": order.views[0],
            "cropped": len(order.views) > 1,
        }
    elif "logits" in result.blobs:
        noted["logits"] = _plain(result.blobs["logits"])
    return noted


def _plain(ref: BlobRef) -> dict[str, Any]:
    return {"digest": ref.digest, "size": ref.size, "chunk_bytes": ref.chunk_bytes}


def _digests(held: Mapping[str, Any], teachers: Mapping[str, Any]) -> set[str]:
    refs = [entry[key] for entry in held.values() for key in ("ref", "logits")]
    refs += [entry["ref"] for entry in teachers.values()]
    return {ref["digest"] for ref in refs if ref}


def _under(prefix: str, weights: Mapping[str, Array]) -> dict[str, Array]:
    return {f"{prefix}/{name}": array for name, array in weights.items()}
