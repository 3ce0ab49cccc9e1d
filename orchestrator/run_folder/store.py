"""A run's folder: the journal, the checkpoints, the blobs.

    runs/NAME/
        run.json                  the configuration of its last start
        sources.json              digests of the source files of users' networks and strategies
        pretrained.safetensors    the weights that all begin with, if `pretrained` names a run
        journal.db                rounds, orders, results, bytes
        artifact/, artifact-.../  the training artifacts, one a recipe
        checkpoints/0003/         what is learnt after round 3
        blobs/, shards/           payloads by digest; decoded feature maps
        own/, owed/               what simulated devices keep (`simulation.kept`)
        status.json, report.json  the progress of the run; the results of its rounds
        lock                      held by the one orchestrator that works here

A checkpoint is written first, then the journal marks its round as closed. So whenever a `kill -9`
comes, a restart finds the last closed round, and the accepted results of the open one. If that
round's checkpoint is damaged, the run goes on after the newest one that is not.

While the disk is full, rounds are neither opened nor closed, and no result is acknowledged.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from orchestrator.config import RunConfig, changes
from orchestrator.rules.attempt import Attempt, Verdict
from orchestrator.run_folder import checkpoints
from orchestrator.run_folder.checkpoints import last as last_checkpoint
from orchestrator.run_folder.checkpoints import read as read_checkpoint
from orchestrator.run_folder.journal import Journal
from orchestrator.strategies.strategy import Checkpoint
from wire import locks, records, stopping, storage
from wire.blobs import BlobStore
from wire.errors import RunError
from wire.messages import Order
from wire.names import written
from wire.storage import Patience

log = logging.getLogger("orchestrator")

FAR = 2  # most rounds that a start goes back by itself, if checkpoints are damaged
AGENTS = "agents"  # what carries out a run's orders, if not simulated devices

__all__ = ["Store", "as_written", "last_checkpoint", "read_checkpoint", "referred", "roll_back"]


def referred(orders: Iterable[Order]) -> set[str]:
    """Digests of the blobs that devices may still ask for to carry out these orders."""
    refs = (ref for order in orders for ref in (order.state, order.teacher))
    return {ref.digest for ref in refs if ref}


class Store(Journal):
    """One run's folder, with its journal; locked against a second orchestrator.

    Args:
        config: of the run.
        devices: what carries out its orders: agents, or devices simulated with certain data.

    Attributes:
        folder: the run's folder.
        blobs: its blob store.
        run_id: the run's id, by which devices know it.
        patience: repeats work until the disk has room.
        made: whether this start made the folder and no round was opened yet.

    Raises:
        RunError: the folder belongs to another configuration or to other devices, is in use, or is
            damaged with no checkpoint to continue from.
        StorageError: the disk cannot be written; StalledError: it is full.
    """

    def __init__(self, config: RunConfig, devices: str = AGENTS) -> None:
        self.folder = config.folder
        self.patience = Patience(stopped=stopping.asked.wait)
        self._kept: frozenset[str] = frozenset()
        self._config = records.plain(config)
        self._config["broker"]["password"] = ""  # others may read the run's folder
        with storage.at(self.folder):
            self.made = not self.folder.exists()
            # It holds what is learnt, and feature maps close to the images.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as undone:
            self._lock = _locked(config)
            undone.callback(self._let_go)
            before = self._begun_with()
            self.blobs = BlobStore(self.folder / "blobs", config.chunk_bytes, self.patience)
            super().__init__(self.folder, begun=before is not None)
            undone.callback(super().close)
            self._check(before)
            self._claim_devices(devices)
            self._fall_back()
            self._best = _best(self.closed_rounds())
            self.run_id = self.identify(config.name)
            if before is None:
                self.started()
            undone.pop_all()

    def started(self) -> None:
        """Write this start's configuration to run.json: all is ready, and it is the run's now."""
        with storage.at(self.folder):
            storage.write(self.folder / "run.json", json.dumps(self._config, indent=1).encode())

    def keep(self, digests: frozenset[str]) -> None:
        """Keep these blobs (artifacts, packages) until the run ends."""
        self._kept |= digests

    def begin(self, round_: int, orders: Mapping[str, Order]) -> Attempt:
        """Note a round's orders before they are sent; waits while the disk is full."""
        attempt = self.patience.attempt(lambda: super(Store, self).begin(round_, orders))
        self.made = False
        return attempt

    def next_sequence(self) -> int:
        """The sequence number that `begin` will use next; waits while the journal is held."""
        return self.patience.attempt(super().next_sequence)

    def verdict(self, sequence: int, device: str) -> Verdict | None:
        """The verdict on a device's result, None if none; waits while the journal is held."""
        return self.patience.attempt(lambda: super(Store, self).verdict(sequence, device))

    def close_round(
        self,
        attempt: Attempt,
        state: Checkpoint,
        report: Mapping[str, Any],
        needed: Collection[str] = (),
    ) -> None:
        """Write the checkpoint, note the round as closed, then drop unused checkpoints and blobs.

        Waits while the disk is full.

        Args:
            attempt: the round.
            state: after the round.
            report: the round's entry in the report.
            needed: digests of further blobs to keep, for carried orders.
        """

        def write() -> None:
            journal = self._resumption(attempt, report)
            with storage.at(self.folder):
                checkpoints.write(self.folder, attempt.round, state, journal)
            self._close_attempt(attempt.sequence, report)

        self.patience.attempt(write)
        self._best = _best([self._best, report])
        every, best = int(self._config["keep_every"]), self._best.get("round", 0)
        checkpoints.drop_old(self.folder, every, {best})
        self.blobs.keep_only(state.blobs() | self._kept | set(needed))

    def checkpoint(self) -> Checkpoint | None:
        """The state after the last closed round; None if no round is closed.

        Raises:
            RunError: its files are damaged.
        """
        last = self._number("SELECT COALESCE(MAX(round), 0) FROM attempts WHERE closed = 1")
        return read_checkpoint(self.folder, last) if last else None

    def _fall_back(self) -> None:
        """Go back to the newest checkpoint that is whole, if that of the last round is not.

        Raises:
            RunError: that would be more than `FAR` rounds back.
        """
        last = self._number("SELECT COALESCE(MAX(round), 0) FROM attempts WHERE closed = 1")
        faults = []
        for number in [n for n in range(last, 0, -1) if n in {last, *self._there()}]:
            try:
                read_checkpoint(self.folder, number)
                break
            except RunError as fault:
                faults.append(str(fault).removesuffix("; restore it"))
        else:
            return  # `checkpoint` says what is wrong
        if number < last - FAR:
            raise RunError(
                f"{'; '.join(faults)}. The newest that is whole is of round {number}; restore a "
                f"later one, or: orchestrator rollback {self.folder} --round {number}"
            )
        if number < last:
            with storage.at(self.folder):
                _undo(self.folder, number, "damaged")
            self._go_back(number)
            log.error(
                "%s. The run goes on after round %d, and what devices sent since is asked for "
                "again", "; ".join(faults), number,
            )  # fmt: skip

    def _there(self) -> list[int]:
        return checkpoints.numbers(self.folder)

    def write_json(self, name: str, content: object) -> None:
        """Replace a JSON file of the run folder, whole or not at all.

        Raises:
            StorageError: the file cannot be written; StalledError: the disk is full.
        """
        partial = self.folder / f"{name}.new"
        with storage.at(self.folder):
            try:
                partial.write_text(json.dumps(content, indent=1))
                partial.replace(self.folder / name)
            except OSError:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise

    def close(self) -> None:
        """Close the journal and release the lock."""
        super().close()
        self._lock.close()

    def discard(self) -> bool:
        """Close the run; remove its folder if this start made it and no round was opened.

        Returns whether it removed the folder.
        """
        super().close()
        self._let_go()
        return self.made

    def _let_go(self) -> None:
        """Release the lock; remove the folder if `made`."""
        if self.made:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _begun_with(self) -> dict[str, Any] | None:
        """The configuration in run.json; None if the run has not begun.

        Raises:
            RunError: it cannot be read.
        """
        path = self.folder / "run.json"
        try:
            table = json.loads(path.read_text())
            table.pop("broker", None)  # does not affect results, and its rules have become stricter
        except FileNotFoundError:
            return None
        except (ValueError, AttributeError, TypeError) as fault:
            raise RunError(
                f"{path} is damaged ({fault}); restore it. If run.toml is what the run was begun "
                "with, remove it: it is written anew"
            ) from fault
        before = records.build(RunConfig, table, where=str(path), error=RunError)
        return dict(records.plain(before))

    def _check(self, before: Mapping[str, Any] | None) -> None:
        """Refuse to resume a run with changed settings that decide its results."""
        if before is None:
            return
        last = self.last_attempt()
        now = as_written(self._config)
        if found := changes.refused(as_written(before), now, last.round if last else 0):
            raise RunError(
                f"{self.folder} was begun with other settings. {'; '.join(map(str, found))}. "
                "Restore that, or begin another run: choose another name. docs/fleet.md says what "
                "may change"
            )


def roll_back(folder: Path, round_: int) -> None:
    """Undo the rounds of a run after this one; their checkpoints are set aside.

    The next start goes on after the round. Feature maps that the server no longer has are asked for
    again. Devices that go on with weights of their own keep those that they have now.

    Args:
        folder: of the run; nobody works in it.
        round_: its number.

    Raises:
        RunError: there is no such run or no checkpoint of the round, or the run is in use.
        StorageError: the disk cannot be written.
    """
    if not (folder / "journal.db").exists():
        raise RunError(f"{folder} holds no run; look for it under the `runs` folder")
    lock = _hold(folder)
    journal = Journal(folder, begun=True)
    try:
        there = checkpoints.numbers(folder)
        last = max((entry["round"] for entry in journal.closed_rounds()), default=0)
        if round_ not in there or round_ >= last:
            kept = [str(number) for number in there if number < last]
            raise RunError(
                f"{folder}: the run is after round {last}. It can go back to "
                f"{', '.join(kept) or 'none'}, whose checkpoints are kept, not to {round_}; "
                "keep_every in run.toml keeps more"
            )
        read_checkpoint(folder, round_)
        # First, so that a kill in between leaves checkpoints ahead of the journal, as others do.
        journal._go_back(round_)  # noqa: SLF001 - a function of every journal
        with storage.at(folder):
            _undo(folder, round_, "undone")
    finally:
        journal.close()
        lock.close()


def _undo(folder: Path, round_: int, why: Literal["damaged", "undone"]) -> None:
    """Set aside all checkpoints after a round."""
    for number in checkpoints.numbers(folder):
        if number > round_:
            checkpoints.set_aside(folder, number, why)


def _best(reports: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The report with the best accuracy, of the server's model if it has one; {} if none has."""
    best: Mapping[str, Any] = {}
    for report in reports:
        if _score(report) > _score(best):
            best = report
    return best


def _score(report: Mapping[str, Any]) -> float:
    return float(report.get("server_accuracy", report.get("device_accuracy", -1.0)))


def as_written(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the names of networks and strategy as run.toml has them.

    These stay the same if the run's folder moves.
    """
    plain: dict[str, Any] = json.loads(json.dumps(config))
    plain["strategy"] = written(plain["strategy"])
    device = plain["device"]
    for owner in (plain["server"], device, *device["others"]):
        owner["model"] = written(owner["model"])
    return plain


def _locked(config: RunConfig) -> IO[str]:
    """The lock of a run's folder.

    Raises:
        RunError: another orchestrator has it.
    """
    return _hold(config.folder)


def _hold(folder: Path) -> IO[str]:
    path = folder / "lock"
    with storage.at(path):
        lock = locks.hold(path, f"process {os.getpid()}")
    if lock is None:
        who = storage.holders(path)
        raise RunError(f"{folder}: another orchestrator is running this run: {who}")
    return lock
