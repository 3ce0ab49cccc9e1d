"""A run with its devices simulated in this process: `orchestrator simulate`.

Strategy, codecs, checks, journal and checkpoints are the same as in a run over the wire, and so are
the beginning and the end of an order (`ondevice.order`, `ondevice.outcome`). A simulated device
decodes the weights that it gets and encodes the update that it returns, so noise and bytes are the
real ones. Only the network is missing. PyTorch trains, or ONNX Runtime as on a device (`.perform`).

Only payload bytes are counted: no MQTT, and no artifact, which travels once. A round has neither
quorum nor deadline, but a share of the devices may be late. A late device answers in the next round
if `cohort.carry_rounds` allows it, else not at all. The same command resumes a stopped run.

A user's networks are compiled before the first round, as `start` does, to refuse those that no
device could train. PyTorch does not need the artifacts; without onnx only a warning is logged.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import models
from ondevice.images import ImageSet
from orchestrator.config import RunConfig
from orchestrator.display.report import Report, said
from orchestrator.fleet import classes
from orchestrator.launch import networks, prepare
from orchestrator.loop.contributions import Contributions
from orchestrator.rules import admit, rounds
from orchestrator.rules.attempt import Attempt, Verdict
from orchestrator.run_folder.store import Store, referred
from orchestrator.simulation import EngineName, devices
from orchestrator.simulation.perform import Agents, Devices, Site, Stacks
from orchestrator.strategies import create
from orchestrator.strategies.strategy import LearntState, Strategy
from wire import seeds, stopping
from wire.errors import RunError, StillhouseError, StorageError
from wire.messages import Order, Result

log = logging.getLogger("orchestrator")

_LATE = 1 << 40  # first of the seed's streams that draw late devices; lower ones choose the cohort


def run(
    config: RunConfig,
    images_folder: Path,
    *,
    engine: EngineName = "torch",
    stack: int = 0,
    late: float = 0.0,
    changed: Callable[[Report], None] = lambda _: None,
    told: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Do a run, from the start or from where it stopped; returns its report.

    Args:
        config: of the run; `cohort.max_devices` devices take part in a round.
        images_folder: holds `device-*.npz`, one file a device, which names the device.
        engine: what trains: "torch", or "onnx" as agents do, for which networks are compiled.
        stack: devices that PyTorch trains at once; 0: one on a CPU, the whole cohort on a GPU.
        late: share of a round's devices, drawn by seed, that miss its end.
        changed: called after each round.
        told: called after each piece of work: a device's training, a step of the server's.

    Raises:
        RunError: images are missing, tiers go by memory, `late` is not in 0 <= late < 1, or ONNX
            Runtime is asked for stacks.
        StillhouseError: what is wrong and what to do; the run's folder keeps what was reached. If
            no round was opened, what this start made is removed.
    """
    if any(tier.memory_mb for tier in config.submodel.tiers):
        raise RunError(
            "submodel.tiers: simulated devices have no memory to go by; name them instead, "
            'devices = "device-1*"'
        )
    if not 0 <= late < 1:
        raise RunError(f"late: expected a share of the devices from 0 to below 1, got {late}")
    if engine == "onnx" and stack:
        raise RunError("stack: ONNX Runtime trains each device alone; leave it out, or use torch")
    sources = networks.check(config)
    heldout = prepare.read_heldout(config)
    settled = classes.resolve(config, heldout.names)
    images = devices.read_shards(config, images_folder, settled)
    for name, held in images.items():
        settled = settled.named_by(name, held.names)
    what = f"{len(images)} simulated devices with data {devices.digest(images):.12}"
    what += f", {late:g} of them late" if late else ""
    what += ", trained by ONNX Runtime" if engine == "onnx" else ""
    prepare.check(config, heldout)
    with prepare.opened(config, heldout, what) as store:
        networks.claim(store.folder, sources)
        config = classes.settle(config, settled)
        if engine == "torch" and store.last_attempt() is None:
            _compile_on_trial(config)
        report = Report(config, store, sources)

        def tell() -> None:
            report.save()
            told(report)

        def progress(what: str, done: int, total: int) -> None:
            report.progress(what, done, total)
            tell()

        by_digest = {}
        if engine == "onnx":
            # Imported here, since a simulation with PyTorch does without onnx.
            from orchestrator.launch import artifacts

            variants = artifacts.prepare_variants(config, store)
            by_digest = artifacts.by_digest(config, store)
        else:
            variants = prepare.variants(config)
        task = prepare.task(config, store, variants, heldout, report)
        site = Site(config, store, task, images)
        work = Agents(site, by_digest) if by_digest else Stacks(site, stack)
        strategy = create(config.strategy, replace(task, progress=progress))
        simulation = _Simulation(config, store, strategy, images, work, late=late, tell=tell)
        store.started()
        with stopping.instead(lambda: said(report, "the open round is done again")):
            simulation.run(report, changed)
    return report


def _compile_on_trial(config: RunConfig) -> None:
    """Compile the networks that devices train, unless all are ours, which can be compiled.

    Raises:
        ExportError: a network cannot be compiled.
    """
    if config.device.batch > 1 and not any(map(models.sources, config.device.models)):
        return
    try:
        from orchestrator.launch.artifacts import compiled
    except ModuleNotFoundError as fault:
        log.warning(
            "%s is not installed: whether the networks can be compiled for devices is not checked",
            fault.name,
        )
        return
    with compiled(config):
        pass


def hold_threads(number: int) -> None:
    """Train and encode with this many threads.

    Without a limit numpy's matrix products take all cores. If other processes use them too, a
    codec's rotations take 15 times as long (measured with two processes on two cores).
    """
    torch.set_num_threads(number)
    threadpool_limits(number, user_api="blas")


class _Simulation:
    def __init__(
        self,
        config: RunConfig,
        store: Store,
        strategy: Strategy,
        images: Mapping[str, ImageSet],
        work: Devices,
        *,
        late: float,
        tell: Callable[[], None],
    ) -> None:
        self._config, self._store, self._strategy, self._tell = config, store, strategy, tell
        self._contributions = Contributions(strategy, store.patience.attempt)
        self._images, self._devices, self._late = images, work, late
        self._births = {name: devices.birth(name, held) for name, held in images.items()}

    def run(self, report: Report, changed: Callable[[Report], None]) -> None:
        config, store = self._config, self._store
        checkpoint = store.checkpoint()
        state = self._strategy.restore(checkpoint) if checkpoint else self._strategy.begin()
        last = store.last_attempt(closed=True)
        carried = self._carried(last) if last else {}
        for number in range(len(store.closed_rounds()) + 1, config.rounds + 1):
            began = time.monotonic()
            free, most = self._births.keys() - carried.keys(), config.cohort.max_devices
            if most and len(carried) >= most:
                free = set()
            chosen = rounds.choose(free, most and most - len(carried), config.seed, number)
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
            with contextlib.closing(self._devices.perform(done)) as performed:
                for result in performed:
                    order = done[result.device]
                    down = (ref.size for ref in (order.state, order.teacher) if ref is not None)
                    report.sent(result.device, sum(down))
                    report.received(result.device, sum(b.size for b in result.blobs.values()))
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
            state, metrics = self._contributions.aggregate(state, number, attempt.orders, accepted)
            entry = report.closed(attempt, metrics, time.monotonic() - began)
            carried = self._carried(attempt)
            store.close_round(attempt, state.pack(), entry, referred(carried.values()))
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
        """Orders that are answered in the next round."""
        late = self._missing(attempt) if self._config.cohort.carry_rounds else ()
        return {name: attempt.orders[name] for name in late}

    def _decide(self, state: LearntState, order: Order, result: Result) -> Verdict:
        device, limits = result.device, self._strategy.task.limits
        try:
            admit.header(result, order, device, len(self._images[device].y), limits)
            self._contributions.admit(state, order, result)
        except (RunError, StorageError):  # a fault of ours or of the user's strategy
            raise
        except StillhouseError as fault:
            log.warning("%s: result refused: %s", device, fault)
            return Verdict(device, accepted=False, reason=str(fault), result=result)
        return Verdict(device, accepted=True, reason="", result=result)
