"""FedGKT (He et al. 2020): devices teach a large model with feature maps, and it teaches them.

A device's network is the extractor W_e followed by W_c. The large model W_s takes the extractor's
output. A round of algorithm 1:

    device   trains W_e, W_c with CE(z_c, y) + alpha T^2 KL(softmax(z_s / T) || softmax(z_c / T))
             sends H = W_e(x), z_c = W_c(H) and y of all its samples, and W_e, W_c
    server   trains W_s with CE(z_s, y) + alpha T^2 KL(softmax(z_c / T) || softmax(z_s / T))
             on every H that it holds, those of absent devices included, except for samples that
             devices leave out
             sends each device z_s = W_s(H) of its samples, with the next order

There is no z_s before round 1. The networks (42 kB for ResNet-8) travel so that the server can
evaluate them, compare them and, if devices share, average them: held-out images pass through
extractor and large model on the server, so it needs no test data from devices.

`TransferConfig` says what differs from the paper. The server asks a device for feature maps only if
it holds none or stale ones (`_stale`). Otherwise it asks for z_c alone, if anything uses them.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

import models
from models import average, robust
from ondevice.views import MIRRORED, PLAIN
from orchestrator.config import Recipe, RunConfig, unused
from orchestrator.strategies.gkt import evaluation, extractors, received
from orchestrator.strategies.gkt.received import Logits
from orchestrator.strategies.gkt.state import GktState, HeldShard, Teacher
from orchestrator.strategies.payloads import admit_device_weights, nbytes
from orchestrator.strategies.strategy import Checkpoint, Metrics, NoSettings, Weights
from orchestrator.strategies.task import Task
from orchestrator.training import distill, optimizers, ranks
from orchestrator.training.samples import Samples
from wire import codecs, tensors
from wire.errors import AdmissionError
from wire.messages import Birth, BlobRef, Order, Result
from wire.names import title

log = logging.getLogger("orchestrator")


@dataclass(frozen=True)
class Answer:
    """What one device sent; its feature maps are decoded to a shard on disk.

    Attributes:
        weights: W_e and W_c.
        held: what the server now holds from the device.
        logits: z_c (rows, C) if they came without feature maps, else None.
    """

    weights: Weights
    held: HeldShard
    logits: Logits | None

    @property
    def nbytes(self) -> int:
        """Size in memory, in bytes."""
        return nbytes(self.weights) + (0 if self.logits is None else self.logits.nbytes)


class ServerTraining(NamedTuple):
    """The large model after a round's training; without epochs there are no `metrics`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: optimizers.Schedule
    metrics: Metrics


class FedGKT:
    """Group knowledge transfer.

    Raises:
        RunError: the device models do not fit together or the run; see `feature_shape`.
    """

    settings: ClassVar[type] = NoSettings
    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "feature maps"})

    def __init__(self, task: Task) -> None:
        self.task = task
        networks = {
            name: (task.variants[Recipe(name)].features, task.initial_of_model(name))
            for name in task.config.device.models
        }
        self.shape = extractors.feature_shape(task.config, networks)
        self.mirrors = {
            name: self._mirror(name, weights) for name, (_, weights) in networks.items()
        }

    @staticmethod
    def check(config: RunConfig) -> None:
        """Refuse sub-models and settings of updates, and require images to evaluate on.

        The images are the server's, or those that devices hold out.
        """
        device, transfer = config.device, config.transfer
        if not device.holdout or transfer.resend:
            unused.need_heldout(config)
        unused.refuse_submodel(config)
        if device.temperature <= 0:
            raise ValueError(f"device.temperature: expected over 0, got {device.temperature}")
        if device.clip and extractors.crops(config):
            raise ValueError(
                "device.clip: the server would crop clipped feature maps, which are not the "
                "clipped maps of crops; leave out clip and noise, or transfer.views or freeze_after"
            )
        unused.refuse_updates(config)
        if "shared" not in (transfer.extractor, transfer.network):
            unused.refuse_average(config, "devices share neither their extractors nor networks")

    def begin(self) -> GktState:
        """A fresh large model, and the initial weights of what devices share."""
        torch.manual_seed(self.task.config.seed)
        server = self._large_model()
        if self.task.pretrained and not models.inherit(server, self.task.pretrained):
            log.warning("pretrained: nothing fits %s, which begins with random weights",
                        title(self.task.config.server.model))  # fmt: skip
        task, device, transfer = self.task, self.task.config.device, self.task.config.transfer
        shared_extractor: Weights = {}
        if transfer.extractor == "shared":
            shared_extractor = extractors.of_network(task.initial)
        heads = {
            model: extractors.behind(task.initial_of_model(model))
            for model in (device.models if transfer.network == "shared" else ())
        }
        state = GktState(server=distill.weights(server), shared_extractor=shared_extractor)
        return state.with_heads(heads)

    def restore(self, checkpoint: Checkpoint) -> GktState:
        """The state of a checkpoint, without what refers to blobs that are no longer here.

        After a rollback these may be gone; devices are asked for their feature maps again.
        """
        state, has = GktState.unpack(checkpoint, self.task.config.device.models), self._has
        return replace(
            state,
            held={n: h for n, h in state.held.items() if has(h.features) and has(h.logits)},
            teachers={n: t for n, t in state.teachers.items() if has(t.logits)},
        )

    def orders(
        self, state: GktState, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """One order a device, with its teacher logits if its samples have not changed."""
        task, device, transfer = self.task, self.task.config.device, self.task.config.transfer
        shared_weights = {}
        for model in device.models if state.shared_extractor else ():
            named = tensors.weights(state.shared(model), "float32")
            shared_weights[model] = task.blobs.put(tensors.pack(named, seed=0))
        orders = {}
        for name, birth in cohort.items():
            teacher = state.teachers.get(name) if device.alpha else None
            if teacher and teacher.data_digest != birth.data_digest:
                teacher = None
            returns = {"state": "float32"}
            if self._stale(state, name, birth, round_):
                returns["features"] = device.features
            elif task.config.server.alpha or not len(task.heldout.y):
                returns["logits"] = transfer.logits
            orders[name] = task.order(
                name,
                round_,
                sequence,
                Recipe(device.model_of(name), frozen=transfer.frozen(round_)),
                state=shared_weights.get(device.model_of(name)),
                own=True,
                # Today's chunk size may differ from that when the logits were stored.
                teacher=teacher and replace(teacher.logits, chunk_bytes=task.config.chunk_bytes),
                data_digest=birth.data_digest,
                alpha=device.alpha if teacher else 0.0,
                # Teachers show the view of the round before, not of this round's maps.
                view=teacher.view if teacher else self._view(round_ - 1),
                views=self._views(name, round_),
                clip=device.clip,
                noise=device.noise,
                returns=returns,
            )
        return orders

    def admit(self, state: GktState, order: Order, result: Result) -> Answer:
        """The answer, checked: the network, and every record of the feature maps or logits."""
        weights = admit_device_weights(self.task, order, result)
        rows = result.samples * len(order.views)
        if "features" in result.blobs:
            held = HeldShard(
                order.round,
                result.data_digest,
                result.blobs["features"],
                None,
                rows,
                view=order.views[0],
                both_views=len(order.views) > 1,
                mirror=self.mirrors[self.task.config.device.model_of(result.device)],
            )
            received.decoded(self.task, held, self.shape)
            return Answer(weights, held, None)
        held = replace(state.held[result.device], round=order.round, data_digest=result.data_digest)
        if "logits" not in result.blobs:
            return Answer(weights, held, None)
        if held.rows != rows:
            raise AdmissionError(
                f"logits of {rows} rows came, but feature maps of {held.rows} rows are here"
            )
        ref = result.blobs["logits"]
        logits = received.read_logits(self.task, ref, rows, order.returns["logits"])
        return Answer(weights, replace(held, logits=ref), logits)

    def aggregate(
        self,
        state: GktState,
        round_: int,
        results: Sequence[Result],
        contributions: Iterable[Answer],
    ) -> tuple[GktState, Metrics]:
        """The server's half of a round."""
        state, logits = self.take_in(state, results, contributions)
        state = self.share(state, round_, results)
        samples = received.samples(self.task, state, round_, logits, self.shape)
        trained = self.train(state, round_, samples)
        teachers = self.teach(state, round_, trained.model, samples)
        after = replace(
            state,
            server=distill.weights(trained.model),
            optimizer=optimizers.slots(trained.optimizer),
            teachers=teachers,
        )
        scores = self.evaluate(after, trained.model, samples) if self.task.evaluated(round_) else {}
        after = replace(after, schedule=trained.schedule.after(scores.get("server_accuracy")))
        received.forget(self.task, after)
        return after, {**trained.metrics, **scores}

    def take_in(
        self, state: GktState, results: Sequence[Result], contributions: Iterable[Answer]
    ) -> tuple[GktState, dict[str, Logits]]:
        """The state with each device's network and payloads; logits that came without maps."""
        devices, made_by, held = dict(state.devices), dict(state.made_by), dict(state.held)
        logits = {}
        for result, answer in zip(results, contributions, strict=True):
            name = result.device
            devices[name], held[name] = answer.weights, answer.held
            if "features" in result.blobs:
                made_by[name] = extractors.of_network(answer.weights)
            if answer.logits is not None:
                logits[name] = answer.logits
        return replace(state, devices=devices, made_by=made_by, held=held), logits

    def share(self, state: GktState, round_: int, results: Sequence[Result]) -> GktState:
        """The state with the means that devices continue from, if they share.

        The mean of extractors is over all devices of the round, the mean of W_c over the devices
        with the same model. Both are weighted by samples, as in FedAvg.
        """
        device, transfer = self.task.config.device, self.task.config.transfer
        if transfer.extractor == "shared" and not transfer.frozen(round_):
            state = replace(
                state, shared_extractor=self._mean(state, results, extractors.of_network)
            )
        heads = {}
        for model in device.models if transfer.network == "shared" else ():
            if same := [r for r in results if device.model_of(r.device) == model]:
                heads[model] = self._mean(state, same, extractors.behind)
        state = state.with_heads(heads)
        if not transfer.resend:
            return state
        held = {}
        for name, shard in state.held.items():
            before, now = state.made_by[name], state.extractor(name)
            held[name] = replace(shard, moved=extractors.moved(self.task, name, before, now))
        return replace(state, held=held)

    def train(self, state: GktState, round_: int, samples: Samples) -> ServerTraining:
        """Train W_s on all samples, with all ranks; see `distill.train`."""
        task, config = self.task, self.task.config.server
        model = distill.load(self._large_model(), state.server).to(task.torch_device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = optimizers.make_optimizer(model, config)
        optimizers.resume(optimizer, state.optimizer)
        schedule = optimizers.Schedule(
            config, optimizer, round_, task.config.rounds, state.schedule
        )
        metrics: Metrics = {}
        if schedule.course.epochs:
            began = time.monotonic()
            loss = ranks.train(
                model,
                optimizer,
                samples,
                config,
                seed=(task.config.seed << 20) + round_,
                progress=lambda done, total: task.progress("distill", done, total),
                course=schedule.course,
            )
            metrics = {"server_loss": loss, "server_train_s": time.monotonic() - began}
        return ServerTraining(model, optimizer, schedule, metrics)

    def teach(
        self, state: GktState, round_: int, model: nn.Module, samples: Samples
    ) -> dict[str, Teacher]:
        """z_s of each device's samples; empty if devices do not learn from them."""
        teachers: dict[str, Teacher] = {}
        if not self.task.config.device.alpha:
            return teachers
        for name, span in zip(sorted(state.held), samples.spans, strict=True):
            held = state.held[name]
            # Maps of a single view show that view, whatever view is asked for.
            view = self._view(round_) if held.cropped else held.view
            logits = ranks.teach(model, samples, span, self.task.config.server, view)
            blob = self.task.blobs.put(self._packed(logits))
            teachers[name] = Teacher(blob, held.data_digest, view)
            self.task.progress("teach", len(teachers), len(state.held))
        return teachers

    def evaluate(self, state: GktState, model: nn.Module, samples: Samples) -> Metrics:
        """Accuracy of the large model and of each device's network; see `gkt.evaluation`."""
        if len(self.task.heldout.y):
            return evaluation.on_heldout(self.task, state, model)
        return evaluation.on_left_out(self.task, state, model, samples)

    def _mean(
        self,
        state: GktState,
        results: Sequence[Result],
        part: Callable[[Weights], Weights],
    ) -> Weights:
        """The average of one part of these devices' networks."""
        config = self.task.config
        networks = [part(state.devices[result.device]) for result in results]
        sizes = average.counted([r.samples for r in results], config.cohort.max_weight)
        if not config.average.robust:
            return average.mean(networks, sizes)
        chosen = config.average
        return robust.join(
            networks, sizes, rule=chosen.rule, hostile=chosen.hostile, clip=chosen.clip
        )

    def _mirror(self, model: str, weights: Weights) -> tuple[int, ...] | None:
        """`extractors.mirror` of an extractor that the server crops, and that is never trained."""
        transfer = self.task.config.transfer
        if not (transfer.views and transfer.frozen(1)):
            return None
        return extractors.mirror(self.task.config, model, extractors.of_network(weights))

    def _views(self, device: str, round_: int) -> tuple[int, ...]:
        """The views that a device's feature maps and logits of a round show."""
        transfer = self.task.config.transfer
        if transfer.views and transfer.frozen(round_):
            mirror = self.mirrors[self.task.config.device.model_of(device)]
            return (PLAIN, MIRRORED) if mirror is None else (PLAIN,)
        return (self._view(round_),)

    def _view(self, round_: int) -> int:
        """The view of a round's z_s, on which devices train in the next round.

        The round's feature maps show it too, unless the server crops them. A drawn view is 2 or
        higher: 0 and 1 are the plain and the mirrored view.
        """
        config, transfer = self.task.config, self.task.config.transfer
        drawn = transfer.views and transfer.student_views
        return (config.seed << 20) + round_ + 2 if drawn else PLAIN

    def _stale(self, state: GktState, name: str, birth: Birth, round_: int) -> bool:
        """Whether the device's feature maps on the server are missing or out of date."""
        held, transfer = state.held.get(name), self.task.config.transfer
        if held is None or held.data_digest != birth.data_digest:
            return True
        views = self._views(name, round_)
        if held.both_views != (len(views) > 1) or held.view != views[0]:
            return True
        if transfer.frozen(round_):
            made_by, now = state.made_by[name], state.extractor(name)
            return any(not np.array_equal(made_by[key], now[key]) for key in now)
        return not transfer.resend or (held.moved or 0.0) > transfer.resend

    def _packed(self, logits: Logits) -> bytes:
        """Teacher logits as bytes to send, clipped to the codec's range."""
        spec = self.task.config.transfer.logits
        most = codecs.parse(spec).coder.highest
        if not np.abs(logits).max() <= most:
            log.warning(
                "logits of the large model go up to %g, and %s holds %g: they are cut; lower "
                "server.lr if it stays so", np.abs(logits).max(), spec, most,
            )  # fmt: skip
            logits = np.clip(logits, -most, most)
        return tensors.pack([("logits", logits, spec)], seed=0)

    def _has(self, ref: BlobRef | None) -> bool:
        return ref is None or self.task.blobs.has(ref.digest)

    def _large_model(self) -> nn.Module:
        """W_s with fresh weights."""
        config = self.task.config
        return models.build(
            config.server.model, classes=config.device.class_count, input_shape=self.shape
        )
