"""What a run, real or simulated, needs before it begins: model, held-out images, folder, task."""

import contextlib
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import nn

import models
from models import SplitModel
from ondevice.images import Preprocess, load
from orchestrator.config import Recipe, RunConfig
from orchestrator.display.report import Report
from orchestrator.fleet import claim, classes, enrolment
from orchestrator.run_folder.store import AGENTS, Store, last_checkpoint
from orchestrator.strategies import create
from orchestrator.strategies.task import HeldOut, Progress, Task, Variant
from orchestrator.training import distill
from wire import stopping, storage
from wire.blobs import BlobStore
from wire.errors import DamagedError, DataError, RunError
from wire.messages import BlobRef
from wire.names import title, written
from wire.storage import Patience

log = logging.getLogger("orchestrator")


def read_heldout(config: RunConfig) -> HeldOut:
    """Held-out images, normalized as devices normalize theirs; empty if the run names none.

    Raises:
        DataError: they are missing or do not fit the model, or have a class that the run lacks.
    """
    device = config.device
    log.info(device.pixels)
    if config.heldout is None:
        return HeldOut(torch.empty(0, *device.input), torch.empty(0, dtype=torch.int64))
    if not config.heldout.exists():
        raise DataError(
            f"heldout: {config.heldout} is not there; let run.toml name images that no device has, "
            "or cut some out of your own: python -m orchestrator.datasets --source FOLDER "
            "--devices 2 --out data writes data/heldout.npz"
        )
    stored = load(config.heldout, input_shape=device.input)
    stored.tell(log)
    settled = classes.resolve(config, stored.names)
    images = stored.labelled(settled.count, settled.artifact_names)
    total = len(images.y)
    most = min(config.heldout_limit or total, total)
    chosen = np.arange(most) * total // most  # a folder's images lie class by class
    pixels, y = images.x[chosen], images.y[chosen]
    x = np.empty((len(y), *device.input), np.float32)
    Preprocess(device.mean, device.std)(pixels, out=x)
    return HeldOut(
        torch.from_numpy(x), torch.from_numpy(y), stored.names, f"{images.digest}:{len(y)}"
    )


def check(config: RunConfig, heldout: HeldOut) -> None:
    """Create the strategy on trial, before anything is compiled, started or kept.

    Raises:
        StillhouseError: models, strategy, `pretrained` and held-out images do not fit together.
    """
    with tempfile.TemporaryDirectory() as folder:
        blobs = BlobStore(Path(folder) / "blobs")
        known = variants(config)
        create(config.strategy, _task(config, "", known, heldout, blobs, lambda *_: None)).begin()


def variants(config: RunConfig) -> dict[Recipe, Variant]:
    """What devices train, without compiling it; a digest of the recipe stands for the artifact."""
    found = {}
    for recipe in config.recipes:
        model, features = fresh(config, recipe), None
        if isinstance(model, SplitModel):
            with torch.inference_mode():
                maps, _ = model.eval().extract(torch.zeros(1, *config.device.input))
            features = tuple(maps.shape[1:])
        plain = recipe._replace(model=written(recipe.model))
        digest = hashlib.sha256("/".join(map(str, plain)).encode()).hexdigest()
        found[recipe] = Variant(recipe, BlobRef(digest, 0, 1024), features)
    return found


@contextlib.contextmanager
def opened(config: RunConfig, heldout: HeldOut, devices: str = AGENTS) -> Iterator[Store]:
    """The run's folder, locked, and with agents the fleet too; waits while the disk is full.

    If the block fails before a round was opened, what this start made is removed: the folder, the
    broker's folder, and the fleet's list if nobody is enrolled. What was there before stays.

    Raises:
        RunError: the folder is another run's, is in use, or its journal is damaged; or another run
            has the fleet.
    """
    made = absent(config)
    with contextlib.ExitStack() as held:
        patience = Patience(stopped=stopping.asked.wait)
        if devices == AGENTS:
            held.enter_context(claim.locked(config.runs, config.fleet, config.name, patience))
        try:
            store = patience.attempt(lambda: Store(config, devices))
        except BaseException:
            _undo(made, config)
            raise
        try:
            patience.attempt(lambda: _hold(store, config, heldout))
            yield store
        except BaseException as fault:
            if store.discard():
                _undo(made, config)
            if isinstance(fault, FileNotFoundError) and not config.folder.exists():
                raise storage.gone(config.folder) from fault
            if isinstance(fault, DamagedError):
                raise RunError(
                    f"{fault}; start again: the journal is set aside then, and the run goes on "
                    "after its last closed round"
                ) from fault
            raise
        store.close()


def _hold(store: Store, config: RunConfig, heldout: HeldOut) -> None:
    """Refuse held-out images that differ from those at the run's begin; they may have moved."""
    if not store.hold("heldout", heldout.digest):
        raise RunError(
            f"heldout: the run began with other images than those of {config.heldout} "
            f"({len(heldout.y)} of them), and accuracies of its rounds could not be compared; "
            "restore them, or choose another name"
        )


def absent(config: RunConfig) -> list[Path]:
    """What a start makes beside the run's folder, as far as it is not there yet."""
    runs, fleet = config.runs, config.fleet
    files = claim.lock_file(runs, fleet), enrolment.path(runs, fleet)
    made = runs, *files, enrolment.broker_folder(runs, fleet)
    return [path for path in made if not path.exists()]


def remove(made: Sequence[Path], runs: Path) -> None:
    """Remove what a failed start made, last first; the folder of all runs only if it is empty."""
    for path in reversed(made):
        with contextlib.suppress(OSError):
            if path == runs:
                path.rmdir()
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _undo(made: Sequence[Path], config: RunConfig) -> None:
    """Remove what a failed start made; devices that were enrolled meanwhile stay so."""
    fleet = enrolment.path(config.runs, config.fleet)
    used = True  # if it cannot be told
    with contextlib.suppress(RunError, OSError):
        used = fleet in made and fleet.exists() and not enrolment.is_empty(fleet)
    remove([path for path in made if path != fleet or not used], config.runs)


def fresh(config: RunConfig, recipe: Recipe | None = None) -> nn.Module:
    """A device model with its initial weights; the same seed gives the same weights.

    Without a recipe it is the main model. It is always whole: `submodel.narrow` cuts units out.

    Raises:
        RunError: no layer of `config.pretrained` fits it.
    """
    device = config.device
    torch.manual_seed(config.seed)
    name = recipe.model if recipe else device.network
    model = models.build(name, classes=device.class_count, input_shape=device.input)
    if config.pretrained and not models.inherit(model, _pretrained(config)):
        raise RunError(
            f"pretrained: {title(name)} has no layer in common with the model of "
            f"{config.pretrained}; name a run of that network, or of a whole resnet56 for "
            "its halves"
        )
    if recipe and recipe.frozen and isinstance(model, SplitModel):
        models.freeze(model)
    return model


def _pretrained(config: RunConfig) -> dict[str, torch.Tensor]:
    """The weights that all models begin with; empty for random weights.

    They are copied into the run's folder if it exists, since the run that they come from may go on
    or be deleted.

    Raises:
        RunError: that run has no checkpoint or no global model.
    """
    if config.pretrained is None:
        return {}
    kept = config.folder / "pretrained.safetensors"
    if not kept.exists():
        _, state = last_checkpoint(config.pretrained)
        found = {name: np.ascontiguousarray(a) for name, a in state.under("global").items()}
        if not found:
            raise RunError(
                f"pretrained: {config.pretrained} has no global model; name a run of fedavg"
            )
        if not config.folder.is_dir():
            return {name: torch.from_numpy(array) for name, array in found.items()}
        with storage.at(kept):
            storage.write(kept, save(found))
    return {name: torch.from_numpy(array) for name, array in load_file(kept).items()}


def task(
    config: RunConfig,
    store: Store,
    variants: Mapping[Recipe, Variant],
    heldout: HeldOut,
    report: Report,
) -> Task:
    """What the run's strategy works with."""
    return _task(config, store.run_id, variants, heldout, store.blobs, report.progress)


def _task(  # noqa: PLR0917 - what differs between a check and a run
    config: RunConfig,
    run: str,
    variants: Mapping[Recipe, Variant],
    heldout: HeldOut,
    blobs: BlobStore,
    progress: Progress,
) -> Task:
    name = config.server.torch_device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    shards = blobs.folder.with_name("shards")
    with storage.at(shards):
        shards.mkdir(exist_ok=True)
    return Task(
        config=config,
        run=run,
        variants=variants,
        initial=distill.weights(fresh(config)),
        others={m: distill.weights(fresh(config, Recipe(m))) for m in config.device.models[1:]},
        blobs=blobs,
        shard_folder=shards,
        heldout=heldout,
        torch_device=torch.device(name),
        progress=progress,
        pretrained=_pretrained(config),
    )
