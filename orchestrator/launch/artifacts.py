"""Training artifacts of a run: one for each recipe that its devices train.

They are compiled into a temporary folder before anything of the run is made, and copied into the
run's folder once it exists. A run that is resumed has them in its folder already.
"""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from models import submodel
from orchestrator import strategies
from orchestrator.config import DeviceConfig, Recipe, RunConfig
from orchestrator.launch import networks
from orchestrator.launch.prepare import fresh
from orchestrator.run_folder.store import Store
from orchestrator.strategies.task import Variant
from tools.export import Adam, Optimizer, Sgd, export
from wire import stopping, storage
from wire.artifact import Artifact, open_artifact
from wire.errors import RunError
from wire.names import title
from wire.storage import Patience

log = logging.getLogger("orchestrator")


@contextlib.contextmanager
def compiled(config: RunConfig) -> Iterator[Path]:
    """A temporary folder with the artifacts that the run's folder lacks.

    Raises:
        ExportError: a model cannot be compiled.
    """
    with tempfile.TemporaryDirectory(prefix="stillhouse-artifacts-") as name:
        folder, patience = Path(name), Patience(stopped=stopping.asked.wait)
        for recipe in config.recipes:
            kept = _name(config, recipe)
            if not (config.folder / kept).exists():
                patience.attempt(partial(_artifact, config, folder / kept, recipe))
        yield folder


def prepare_variants(
    config: RunConfig, store: Store, compiled_folder: Path | None = None
) -> dict[Recipe, Variant]:
    """The training artifact of each recipe, put into the run's folder and its blobs.

    Args:
        config: of the run.
        store: the run's folder; artifacts that are in it stay.
        compiled_folder: the folder from `compiled`; missing artifacts are copied from it, or
            compiled if it lacks them too.

    Raises:
        ExportError: a model cannot be compiled.
        ArtifactError: an artifact in the run's folder is damaged.
    """
    variants, digests = {}, set()
    for recipe in config.recipes:
        name = _name(config, recipe)
        if compiled_folder is not None and (compiled_folder / name).exists():
            store.patience.attempt(partial(_take, compiled_folder / name, store.folder / name))
        artifact = store.patience.attempt(partial(_artifact, config, store.folder / name, recipe))
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


def by_digest(config: RunConfig, store: Store) -> dict[str, Artifact]:
    """The artifacts that `prepare_variants` put into the run's folder, by their digests."""
    found = (open_artifact(store.folder / _name(config, recipe)) for recipe in config.recipes)
    return {artifact.digest: artifact for artifact in found}


def _name(config: RunConfig, recipe: Recipe) -> str:
    """The name of the artifact's folder within the run's folder."""
    model, rate = recipe.model, recipe.keep_rate
    parts = [
        "artifact",
        networks.folder_name(model) if model != config.device.network else "",
        repr(rate) if rate != 1 else "",
        "frozen" if recipe.frozen else "",
    ]
    return "-".join(filter(None, parts))


def _take(source: Path, target: Path) -> None:
    """Copy an artifact's files; the target folder appears whole or not at all."""
    new = target.with_name(f".{target.name}.new")
    with storage.at(target):
        if target.exists():
            return
        shutil.rmtree(new, ignore_errors=True)  # left by an attempt that ran out of room
        new.mkdir()
        for file in source.iterdir():
            storage.write(new / file.name, file.read_bytes())
        new.rename(target)


def _artifact(config: RunConfig, folder: Path, recipe: Recipe) -> Artifact:
    """The artifact in a folder, compiled if there is none."""
    with storage.at(folder):
        if not folder.exists():
            _compile(config, recipe, folder)
        artifact = open_artifact(folder)
    kept = artifact.manifest.model.keep_rate
    if kept != recipe.keep_rate:
        raise RunError(
            f"{folder}: expected an artifact of keep rate {recipe.keep_rate!r}, got one of "
            f"{kept!r}; remove it"
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
        task="distill" if "teacher" in strategies.needs(config.strategy) else "classify",
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
