"""Takes a configuration to a finished run: artifacts, folder, broker, coordinator."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial

from orchestrator import broker
from orchestrator.config import RunConfig
from orchestrator.display.report import Report
from orchestrator.fleet import certificates, classes, enrolment, updates
from orchestrator.launch import networks
from orchestrator.launch.artifacts import compiled, prepare_variants
from orchestrator.launch.prepare import check, opened, read_heldout, task
from orchestrator.loop.coordinator import Coordinator
from orchestrator.strategies import create
from wire import stopping, storage
from wire.address import BrokerAddress
from wire.errors import BrokerError

log = logging.getLogger("orchestrator")


def run(
    config: RunConfig,
    *,
    address: BrokerAddress | None = None,
    changed: Callable[[Report], None] = lambda _: None,
    again: str | None = None,
) -> Report:
    """Do a run, from the start or from where it stopped; returns its report.

    Args:
        config: of the run.
        address: a broker that runs already; None: the one of `config.broker`.
        changed: called after each event, in this thread.
        again: the command that resumes the run, shown when it is stopped; None: this process's.

    Raises:
        StillhouseError: what is wrong and what to do; the run's folder keeps what was reached. If
            no round was opened, what this start made is removed.
    """
    # First, so that wrong settings are found before a folder is made or a broker runs.
    sources = networks.check(config)
    heldout = read_heldout(config)
    check(config, heldout)
    if address is None and config.broker.kind != "external":
        broker.check(config.broker.kind, config.broker.host, config.fleet)
    settled = classes.resolve(config, heldout.names)
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(compiled(classes.named(config, settled)))
        store = stack.enter_context(opened(config, heldout))
        patiently = store.patience.attempt
        patiently(lambda: networks.claim(store.folder, sources))
        config = patiently(partial(classes.settle, config, settled))
        enrolled = None
        if config.admission == "enrolled":
            enrolled = patiently(lambda: enrolment.enrolled(config.runs, config.fleet))
        rollout = updates.read(config.release, store.blobs, enrolled=enrolled)
        store.keep(frozenset(update.blob.digest for update in rollout.updates))
        variants = prepare_variants(config, store, made)
        if address is None:
            address = patiently(lambda: stack.enter_context(serve(config)))
        report = Report(config, store, sources, enrolled)
        given = patiently(lambda: task(config, store, variants, heldout, report))
        strategy = create(config.strategy, given)
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
            store.made = False  # keeps the folder, though no round was opened
            raise
        report.save(final=True)
        changed(report)
    return report


@contextlib.contextmanager
def serve(config: RunConfig) -> Iterator[BrokerAddress]:
    """The address of the configured broker, which we run unless it is external.

    Raises:
        BrokerError: our broker does not run.
        StalledError: the disk is full.
    """
    chosen = config.broker
    if chosen.kind == "external":
        yield chosen.address()
        return
    users = enrolment.users(config.runs, config.fleet) if config.admission == "enrolled" else None
    folder = enrolment.broker_folder(config.runs, config.fleet)
    try:
        with storage.at(folder):
            ours = broker.start(
                chosen.kind,
                folder=folder,
                fleet=config.fleet,
                host=chosen.host,
                port=chosen.listens_on,
                users=users,
                certificates=certificates.for_broker(
                    config.runs, config.fleet, "" if chosen.everywhere else chosen.host
                )
                if chosen.mutual_tls
                else None,
            )
    except BrokerError as fault:
        raise storage.full(folder) or fault from fault
    with ours as running:
        log.info("%s broker at %s", running.kind, running.url)
        if chosen.mutual_tls:
            yield certificates.address(running.folder, running.url)
            return
        password = users[enrolment.ORCHESTRATOR] if users else ""
        yield BrokerAddress(running.url, enrolment.ORCHESTRATOR if users else "", password)
