"""A run with its devices simulated in this process: `orchestrator simulate`.

Strategy, orders, codecs, checks, journal and checkpoints are those of a run over the wire; a
simulated device decodes the weights that it is sent and encodes the update that it returns, so that
noise and bytes are the real ones. Only the network is missing, and PyTorch trains in place of ONNX
Runtime (`.cohort`). Bytes are those of the payloads: no MQTT, no artifact, which travels once. A
round has neither quorum nor deadline; a share of the devices may be late, and answers in the round
after where `cohort.carry_rounds` lets it, or else not. The same command goes on where a run was
stopped.
"""

import hashlib
import logging
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import wire
from models import SplitModel, submodel
from ondevice import data
from ondevice.data import ImageSet
from ondevice.work import cover, encode_update, extract_record
from orchestrator.config import Recipe, RunConfig
from orchestrator.display.report import Report, said
from orchestrator.fleet import classes
from orchestrator.fleet.classes import Classes
from orchestrator.launch import networks, prepare
from orchestrator.rules import admit, rounds
from orchestrator.rules.attempt import Attempt, Verdict
from orchestrator.run_folder.store import Store, referred
from orchestrator.simulation import cohort
from orchestrator.simulation.cohort import Job, Trained
from orchestrator.strategies import create
from orchestrator.strategies.strategy import State, Strategy
from orchestrator.training import distill
from wire import seeds, stopping, storage, tensors, topics
from wire.errors import RunError, StillhouseError
from wire.messages import MAX_COUNT, Birth, BlobRef, Order, Platform, Result

log = logging.getLogger("orchestrator")

_LATE = 1 << 40  # streams of the run's seed; those of lower numbers choose a round's devices


def run(
    config: RunConfig,
    shards: Path,
    *,
    stack: int = 0,
    late: float = 0.0,
    changed: Callable[[Report], None] = lambda _: None,
    told: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Do a run, from the start or from where it stopped.

    Args:
        config: of the run; `cohort.max_devices` devices take part in a round.
        shards: a folder of `device-*.npz`, one a device, named by its file.
        stack: devices that are trained at once; 0: one on a CPU, the whole cohort on a GPU.
        late: share of a round's devices, drawn by seed, that miss its end.
        changed: called after each round.
        told: called whenever something was done: a device's training, a step of the server's.

    Raises:
        RunError: no shards are there, tiers go by memory, or all would be late.
        StillhouseError: what is wrong and what to do; the run's folder keeps what was reached.
    """
    if any(tier.memory_mb for tier in config.submodel.tiers):
        raise RunError(
            "submodel.tiers: simulated devices have no memory to go by; name them instead, "
            'devices = "device-1*"'
        )
    if not 0 <= late < 1:
        raise RunError(f"late: expected a share of the devices from 0 to below 1, got {late}")
    sources = networks.check(config)
    heldout = prepare.read_heldout(config)
    settled = classes.resolve(config, heldout.names)
    images = read_shards(config, shards, settled)
    for name, held in images.items():
        settled = settled.named_by(name, held.names)
    # Of the labels as the run numbers them.
    digests = {name: data.digest(held.x, held.y) for name, held in images.items()}
    whole = hashlib.sha256("".join(f"{n}:{d}" for n, d in digests.items()).encode())
    what = f"{len(images)} simulated devices with data {whole.hexdigest():.12}"
    what += f", {late:g} of them late" if late else ""
    prepare.check(config, heldout)
    with prepare.opened(config, heldout, what) as store:
        networks.claim(store.folder, sources)
        config = classes.settle(config, settled)
        report = Report(config, store, sources)

        def tell() -> None:
            report.save()
            told(report)

        def progress(what: str, done: int, total: int) -> None:
            report.progress(what, done, total)
            tell()

        task = prepare.task(config, store, prepare.variants(config), heldout, report)
        strategy = create(config.strategy, replace(task, progress=progress))
        simulation = _Simulation(config, store, strategy, images, stack=stack, late=late, tell=tell)
        store.started()
        with stopping.instead(lambda: said(report, "the open round is done again")):
            simulation.run(report, changed)
    return report


def hold_threads(number: int) -> None:
    """Train and encode with so many threads.

    Without a limit numpy's matrix products take all cores, and where others use them too a codec's
    rotations take 15 times as long (measured with two processes on two cores).
    """
    torch.set_num_threads(number)
    threadpool_limits(number, user_api="blas")


def read_shards(
    config: RunConfig, folder: Path, settled: Classes | None = None
) -> dict[str, ImageSet]:
    """Each device's images by its name, labelled as the run numbers its classes.

    A device with a class that is not the run's is left out, as it would be refused over the wire.

    Args:
        config: of the run.
        folder: of the files.
        settled: the run's classes; None takes them from its configuration alone.

    Raises:
        RunError: there are none, or fewer than a round takes, or a name is not valid for a device.
        DataError: a file does not fit the model.
    """
    settled = settled or classes.resolve(config)
    files = sorted(folder.glob("device-*.npz"))
    for file in files:
        try:
            topics.check_name(file.stem, "device name")
        except ValueError as fault:
            raise RunError(f"{file}: {fault}") from fault
    least = config.cohort.min_devices
    if len(files) < least:
        raise RunError(
            f"{folder}: expected {least} or more files device-*.npz, found {len(files)}; make them "
            "with python -m orchestrator.datasets"
        )
    found = {}
    for file in files:
        images = data.load(file, input_shape=config.device.input)
        if reason := settled.refusal(images.names):
            log.warning("%s is left out: %s", file.stem, reason)
            continue
        settled = settled.named_by(file.stem, images.names)
        found[file.stem] = images.labelled(settled.count, settled.artifact_names)
    if len(found) < least:
        raise RunError(
            f"{folder}: expected {least} or more devices with the run's classes, got {len(found)} "
            f"of {len(files)}; the warnings above name the others and the remedy"
        )
    return found


class _Simulation:
    def __init__(
        self,
        config: RunConfig,
        store: Store,
        strategy: Strategy,
        images: Mapping[str, ImageSet],
        *,
        stack: int,
        late: float,
        tell: Callable[[], None],
    ) -> None:
        self._config, self._store, self._strategy, self._tell = config, store, strategy, tell
        self._images, self._stack, self._late = images, stack, late
        self._births = {name: _birth(name, held) for name, held in images.items()}
        self._owed, self._own = _Kept(store.folder / "owed"), _Kept(store.folder / "own")
        self._models = {}
        for recipe, variant in strategy.task.variants.items():
            model = prepare.fresh(config, recipe)
            if not config.submodel.whole:
                layout = submodel.layout(model, config.device.input)
                model = submodel.narrow(model, layout, recipe.keep_rate)
            self._models[variant.artifact.digest] = model

    def run(self, report: Report, changed: Callable[[Report], None]) -> None:
        config, store = self._config, self._store
        state = store.checkpoint() or self._strategy.begin()
        last = store.last_attempt(closed=True)
        carried = self._carried(last) if last else {}
        for number in range(len(store.closed_rounds()) + 1, config.rounds + 1):
            began = time.monotonic()
            live = {name: 1 for name in self._births if name not in carried}
            most = config.cohort.max_devices
            if most and len(carried) >= most:
                live = {}
            room = most and most - len(carried)
            chosen = rounds.choose(live, room, config.seed, number)
            births = {name: self._births[name] for name in sorted(chosen)}
            orders = self._strategy.orders(state, number, store.next_sequence(), births)
            report.opened()
            attempt = store.begin(number, {**carried, **orders})
            missing = self._missing(attempt)
            done = {n: order for n, order in sorted(attempt.orders.items()) if n not in missing}
            now = rounds.RoundState(
                config.rounds,
                config.seed,
                number,
                rounds.Phase.COLLECTING,
                live=dict.fromkeys(self._births, rounds.Session(1)),
                cohort=frozenset(done),
            )
            log.info("round %d of %d: %d devices", number, config.rounds, len(done))
            report.rounds(now)
            self._tell()
            results = {}
            for result in self._perform(done, report):
                results[result.device] = result
                report.rounds(replace(now, returned=frozenset(results)))
                self._tell()
            report.progress("", 0, 0)
            report.rounds(replace(now, phase=rounds.Phase.AGGREGATING, returned=frozenset(results)))
            verdicts = {n: self._decide(state, order, results[n]) for n, order in done.items()}
            accepted = [verdict.result for verdict in verdicts.values() if verdict.accepted]
            if not accepted:
                first = next(iter(verdicts.values())).reason
                raise RunError(f"round {number}: no result can be used; the first: {first}")
            attempt = replace(attempt, verdicts=verdicts)
            state, metrics = self._strategy.aggregate(state, number, attempt.orders, accepted)
            entry = report.closed(attempt, metrics, time.monotonic() - began)
            carried = self._carried(attempt)
            store.close_round(attempt, state, entry, referred(carried.values()))
            report.kept(entry)
            log.info("%s", report.last_round())
            changed(report)
        report.rounds(
            rounds.RoundState(config.rounds, config.seed, config.rounds, rounds.Phase.FINISHED)
        )
        report.save(final=True)

    def _missing(self, attempt: Attempt) -> frozenset[str]:
        """Devices with an order of this round that miss its end."""
        fresh = sorted(n for n, order in attempt.orders.items() if order.round == attempt.round)
        draw = seeds.raw(self._config.seed, _LATE + attempt.round, len(fresh))
        return frozenset(fresh[i] for i in draw.argsort()[: int(self._late * len(fresh))])

    def _carried(self, attempt: Attempt) -> dict[str, Order]:
        """Orders that are answered in the round after."""
        late = self._missing(attempt) if self._config.cohort.carry_rounds else ()
        return {name: attempt.orders[name] for name in late}

    def _decide(self, state: State, order: Order, result: Result) -> Verdict:
        device, limits = result.device, self._strategy.task.limits
        try:
            admit.header(result, order, device, len(self._images[device].y), limits)
            self._strategy.admit(state, order, result)
        except StillhouseError as fault:
            log.warning("%s: result refused: %s", device, fault)
            return Verdict(device, accepted=False, reason=str(fault), result=result)
        return Verdict(device, accepted=True, reason="", result=result)

    def _perform(self, orders: Mapping[str, Order], report: Report) -> Iterator[Result]:
        """The cohort's results; devices of one keep rate are trained in stacks."""
        task, groups = self._strategy.task, defaultdict(list)
        for name, order in orders.items():
            # Adam counts its steps, and all devices of a stack have one count, and one rate: a
            # carried order may have another.
            steps = self._mine(name, order).get("optimizer/step/")
            count = 0.0 if steps is None else float(steps)
            groups[order.artifact.digest, count, order.lr].append(name)
        for (digest, _, _), names in groups.items():
            size = self._stack or (len(names) if task.torch_device.type == "cuda" else 1)
            for at in range(0, len(names), size):
                jobs = {name: self._job(name, orders[name]) for name in names[at : at + size]}
                done = cohort.train(
                    self._models[digest],
                    self._config.device,
                    list(jobs.values()),
                    task.torch_device,
                )
                for (name, job), trained in zip(jobs.items(), done, strict=True):
                    result = self._result(name, job, trained)
                    given = (job.order.state, job.order.teacher)
                    report.sent(name, sum(ref.size for ref in given if ref is not None))
                    report.received(name, sum(ref.size for ref in result.blobs.values()))
                    yield result

    def _job(self, name: str, order: Order) -> Job:
        """What the device has for an order: its own weights, where it brings none."""
        task, images = self._strategy.task, self._images[name]
        mine = self._mine(name, order)
        start = _under("weights", mine) or task.initial_of(name)
        teacher = None
        if order.state is not None:
            path = task.blobs.path(order.state.digest)
            given = tensors.load(path, where="weights", most=task.values)
            start = {**start, **given} if order.own else given
        if order.teacher is not None:
            most = len(images.y) * self._config.device.class_count
            path = task.blobs.path(order.teacher.digest)
            teacher = tensors.load(path, where="teacher logits", most=most)["logits"]
        return Job(order, images, start, _under("optimizer", mine), teacher)

    def _mine(self, name: str, order: Order) -> cohort.Weights:
        """What the device kept of the round before, where it trains weights of its own."""
        if order.state and not order.own:
            return {}
        return self._own.read(name, self._own.last(name, order.round))

    def _result(self, name: str, job: Job, trained: Trained) -> Result:
        order, blobs, fault = job.order, {}, ""
        try:
            for what, spec in order.returns.items():
                blobs[what] = self._payload(name, job, trained, what, spec)
        except StillhouseError as diverged:
            fault = str(diverged)
        if order.state is None or order.own:
            kept = {f"weights/{n}": array for n, array in trained.weights.items()}
            kept |= {f"optimizer/{n}": array for n, array in trained.optimizer.items()}
            self._own.write(name, order.round, kept, self._own.last(name, order.round))
        return Result(
            device=name,
            run=order.run,
            sequence=order.sequence,
            round=order.round,
            samples=len(job.images.y),
            data_digest=job.images.digest,
            blobs=blobs,
            metrics=trained.metrics,
            fault=fault,
            submodel=order.submodel,
        )

    def _payload(self, name: str, job: Job, trained: Trained, what: str, spec: str) -> BlobRef:
        """One of an order's payloads, as an agent packs it."""
        order, blobs = job.order, self._strategy.task.blobs
        weights = {n: trained.weights[n] for n in sorted(trained.weights)}
        if what == "update":
            update = {n: array - job.start[n] for n, array in weights.items()}
            owed = self._owed.read(name, order.owed if order.feedback else 0)
            packed, left = encode_update(order, update, owed)
            if left is not None:
                self._owed.write(name, order.sequence, left, order.owed)
            return blobs.put(packed)
        if what == "state":
            return blobs.put(tensors.pack(tensors.weights(weights, spec), seed=order.seed))
        whole = prepare.fresh(self._config, Recipe(self._config.device.model_of(name)))
        model = distill.load(whole, weights).eval()
        assert isinstance(model, SplitModel)  # noqa: S101 - the strategy saw its feature maps
        on, done, labels = self._strategy.task.torch_device, 0, job.images.y
        model.to(on)
        right = np.zeros(len(labels) * len(order.views), bool)
        with blobs.create() as sink:
            for view in order.views:
                for features, logits in cohort.extract(
                    model, job.images, self._config.device, on, view
                ):
                    own = np.take(labels, range(done, done + len(logits)), mode="wrap")
                    right[done : done + len(own)] = logits.argmax(axis=1) == own
                    maps = cover(features, order) if what == "features" else None
                    sink.write(extract_record(order, maps, logits, own, first=done))
                    done += len(logits)
        left_out = data.held_out(job.images.digest, len(labels), order.holdout)
        trained.metrics["extract_accuracy"] = float(right.mean())
        if left_out.any():
            trained.metrics["heldout_accuracy"] = float(right[: len(labels)][left_out].mean())
        return sink.ref


@dataclass(frozen=True)
class _Kept:
    """What devices keep from order to order: files by device and number, 0 for nothing."""

    folder: Path

    def read(self, device: str, number: int) -> dict[str, NDArray[np.float32]]:
        """What was kept under a number."""
        return load_file(self._path(device, number)) if number else {}

    def last(self, device: str, before: int) -> int:
        """The highest number below another."""
        numbers = (int(path.stem) for path in (self.folder / device).glob("*.safetensors"))
        return max((number for number in numbers if number < before), default=0)

    def write(self, device: str, number: int, tensors: cohort.Weights, given: int) -> None:
        """Keep it, and what the order was given, for the order may be done anew."""
        path = self._path(device, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.at(path):
            storage.write(path, save(dict(tensors)))
        for old in set(path.parent.iterdir()) - {path, self._path(device, given)}:
            old.unlink()

    def _path(self, device: str, sequence: int) -> Path:
        return self.folder / device / f"{sequence}.safetensors"


def _under(prefix: str, kept: cohort.Weights) -> dict[str, NDArray[np.float32]]:
    start = f"{prefix}/"
    return {n.removeprefix(start): array for n, array in kept.items() if n.startswith(start)}


def _birth(name: str, images: ImageSet) -> Birth:
    machine = Platform("simulated", platform.machine(), 1, MAX_COUNT - 1, "", "")
    return Birth(name, 1, wire.__version__, len(images.y), images.digest, machine)
