"""From a configuration to a finished run: broker, artifact, held-out images, coordinator."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from models import submodel
from orchestrator import broker
from orchestrator.config import DeviceConfig, Recipe, RunConfig
from orchestrator.display.report import Report
from orchestrator.fleet import classes, enrolment, updates
from orchestrator.launch import networks
from orchestrator.launch.prepare import broker_folder, check, fresh, opened, read_heldout, task
from orchestrator.loop.coordinator import Coordinator
from orchestrator.run_folder.store import Store
from orchestrator.strategies import create
from orchestrator.strategies.task import Variant
from tools.export import Adam, Optimizer, Sgd, export
from wire import stopping, storage
from wire.address import BrokerAddress
from wire.artifact import Artifact, open_artifact
from wire.errors import BrokerError, RunError
from wire.names import title

log = logging.getLogger("orchestrator")


def run(
    config: RunConfig,
    *,
    address: BrokerAddress | None = None,
    changed: Callable[[Report], None] = lambda _: None,
    again: str | None = None,
) -> Report:
    """Do a run, from the start or from where it stopped.

    Args:
        config: of the run.
        address: a broker that is there already; None follows `config.broker`.
        changed: called after each event, in this thread.
        again: the command that goes on with the run, for whoever stops it; None: this process's.

    Raises:
        StillhouseError: what is wrong and what to do; the run's folder keeps what was reached. If
            no round was opened, nothing is left that this start made.
    """
    # First: what is cheap to find wrong is found before a folder is made or a broker runs.
    sources = networks.check(config)
    heldout = read_heldout(config)
    check(config, heldout)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(opened(config, heldout))
        patiently = store.patience.attempt
        patiently(lambda: networks.claim(store.folder, sources))
        settled = classes.resolve(config, heldout.names)
        config = patiently(partial(classes.settle, config, settled))
        enrolled = None
        if config.admission == "enrolled":
            enrolled = patiently(lambda: enrolment.enrolled(config.runs, config.fleet))
        rollout = updates.read(config.release, store.blobs, enrolled=enrolled)
        store.keep(frozenset(update.blob.digest for update in rollout.updates))
        if address is None:
            address = patiently(lambda: stack.enter_context(serve(config)))
        report = Report(config, store, sources, enrolled)
        variants = prepare_variants(config, store)
        strategy = create(config.strategy, task(config, store, variants, heldout, report))
        coordinator = Coordinator(
            config,
            store,
            strategy,
            enrolled=enrolled,
            address=address,
            report=report,
            rollout=rollout,
            again=again,
        )
        patiently(store.started)

        def notify() -> None:
            report.save()
            changed(report)

        try:
            coordinator.run(notify)
        except stopping.Interrupted:
            store.made = False  # what is ready is kept, though no round was opened
            raise
        report.save(final=True)
        changed(report)
    return report


@contextlib.contextmanager
def serve(config: RunConfig) -> Iterator[BrokerAddress]:
    """The broker that the configuration names, run by us unless it is external.

    Raises:
        BrokerError: ours does not run.
        StalledError: its disk is full.
    """
    chosen = config.broker
    if chosen.kind == "external":
        yield chosen.address()
        return
    users = enrolment.users(config.runs, config.fleet) if config.admission == "enrolled" else None
    folder = broker_folder(config)
    try:
        with storage.at(folder):
            ours = broker.start(
                chosen.kind,
                folder=folder,
                fleet=config.fleet,
                host=chosen.host,
                port=chosen.port,
                users=users,
            )
    except BrokerError as fault:
        raise storage.full(folder) or fault from fault
    with ours as running:
        log.info("%s broker at %s", running.kind, running.url)
        password = users[enrolment.ORCHESTRATOR] if users else ""
        yield BrokerAddress(running.url, enrolment.ORCHESTRATOR if users else "", password)


def prepare_variants(config: RunConfig, store: Store) -> dict[Recipe, Variant]:
    """The training artifact of each recipe: the one in the run's folder, or a new export.

    Raises:
        ExportError: the model cannot be compiled.
        ArtifactError: one in the folder is damaged.
    """
    variants, digests = {}, set()
    for recipe in config.recipes:
        artifact = store.patience.attempt(partial(_artifact, config, store.folder, recipe))
        files = {"manifest.json": artifact.digest}
        files |= {name: ref.sha256 for name, ref in artifact.manifest.files.items()}
        for name, digest in files.items():
            if not store.blobs.has(digest):
                store.blobs.put((artifact.folder / name).read_bytes())
        digests |= set(files.values())
        ref = store.blobs.ref(artifact.digest)
        variants[recipe] = Variant(recipe, ref, artifact.manifest.features)
    store.keep(frozenset(digests))
    return variants


def _artifact(config: RunConfig, folder: Path, recipe: Recipe) -> Artifact:
    device, rate = config.device, recipe.keep_rate
    parts = [
        "artifact",
        networks.folder_name(recipe.model) if recipe.model != device.network else "",
    ]
    parts += [repr(rate) if rate != 1 else "", "frozen" if recipe.frozen else ""]
    folder /= "-".join(filter(None, parts))
    with storage.at(folder):
        if not folder.exists():
            _compile(config, recipe, folder)
        artifact = open_artifact(folder)
    if artifact.manifest.model.keep_rate != rate:
        raise RunError(
            f"{folder}: expected an artifact of keep rate {rate!r}, got one of "
            f"{artifact.manifest.model.keep_rate!r}; remove it"
        )
    return artifact


def _compile(config: RunConfig, recipe: Recipe, folder: Path) -> None:
    device, rate = config.device, recipe.keep_rate
    model = fresh(config, recipe)
    what = f"keep rate {rate:g}" + (", the extractor frozen" if recipe.frozen else "")
    log.info("compiling the training step of %s, %s", title(recipe.model), what)
    if rate != 1:
        model = submodel.narrow(model, submodel.layout(model, device.input), rate)
    export(
        model,
        name=title(recipe.model),
        classes=device.class_count,
        class_names=device.class_names,
        input_shape=device.input,
        batch=device.batch,
        task="distill" if config.strategy == "fedgkt" else "classify",
        optimizer=_optimizer(device),
        mean=device.mean,
        std=device.std,
        keep_rate=rate,
        proximal=device.mu > 0,
        out=folder,
    )


def _optimizer(device: DeviceConfig) -> Optimizer:
    if device.optimizer == "adam":
        return Adam(weight_decay=device.weight_decay)
    return Sgd(device.momentum, nesterov=device.momentum > 0, weight_decay=device.weight_decay)
