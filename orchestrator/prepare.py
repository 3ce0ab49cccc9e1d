"""What a run needs before it begins, over the wire or simulated: model, held-out images, task."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import models
from edge_agent import data
from edge_agent.data import Preprocess
from models import SplitModel
from orchestrator.config import Recipe, RunConfig
from orchestrator.fleet import classes
from orchestrator.report import Report
from orchestrator.store import Store, last_checkpoint
from orchestrator.strategies.strategy import HeldOut, Task, Variant
from orchestrator.training import distill
from wire.errors import DataError, RunError
from wire.names import title

log = logging.getLogger("orchestrator")


def read_heldout(config: RunConfig) -> HeldOut:
    """Held-out images, normalized as the devices normalize theirs; none where none are named.

    Raises:
        DataError: they are missing or do not fit the model, or one of their classes is not the
            run's.
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
    stored = data.load(config.heldout, input_shape=device.input)
    stored.tell(log)
    settled = classes.resolve(config, stored.names)
    images = stored.labelled(settled.count, settled.artifact_names)
    most = config.heldout_limit or len(images.y)
    pixels, y = images.x[:most], images.y[:most].copy()
    x = np.empty((len(y), *device.input), np.float32)
    Preprocess(device.mean, device.std)(pixels, out=x)
    return HeldOut(torch.from_numpy(x), torch.from_numpy(y), stored.names)


def fresh(config: RunConfig, recipe: Recipe | None = None) -> nn.Module:
    """A device model with its initial weights; the same seed gives the same.

    No recipe is the whole main model. Units are cut out by `submodel.narrow`.

    Raises:
        RunError: nothing of `config.pretrained` fits it.
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
    """The model that all begin with, empty for random weights.

    It is copied into the run's folder: the run that it came from may go on, or away.

    Raises:
        RunError: there is none.
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
        partial = kept.with_suffix(".new")
        save_file(found, partial)
        partial.replace(kept)
    return {name: torch.from_numpy(array) for name, array in load_file(kept).items()}


def task(
    config: RunConfig,
    store: Store,
    variants: Mapping[Recipe, Variant],
    heldout: HeldOut,
    report: Report,
) -> Task:
    """What the run's strategy works with."""
    name = config.server.torch_device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    shards = store.folder / "shards"
    shards.mkdir(exist_ok=True)
    return Task(
        config=config,
        run=store.run_id,
        variants=variants,
        initial=distill.weights(fresh(config)),
        others={m: distill.weights(fresh(config, Recipe(m))) for m in config.device.models[1:]},
        blobs=store.blobs,
        shards=Path(shards),
        heldout=heldout,
        torch_device=torch.device(name),
        progress=report.progress,
        pretrained=_pretrained(config),
    )
