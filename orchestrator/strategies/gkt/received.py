"""The feature maps and logits that devices have sent, decoded into what the server trains on."""

import shutil
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ondevice.views import held_out
from orchestrator.strategies.gkt import extractors
from orchestrator.strategies.gkt.state import GktState, HeldShard
from orchestrator.strategies.task import Task
from orchestrator.training import shards
from orchestrator.training.samples import Samples, Source
from orchestrator.training.shards import Shard
from wire.messages import BlobRef

Logits = NDArray[np.float32]
Shape = tuple[int, int, int]
LEAST = 1e-6  # least weight of a sample: a batch of old samples must not have total weight 0


def decoded(task: Task, held: HeldShard, shape: Shape) -> Shard:
    """The feature maps (C, H, W) in `held`, decoded to files if they are not yet.

    Raises:
        AdmissionError, WireError: they are not `held.rows` proper samples.
    """
    return shards.shelve(
        task.blobs.path(held.features.digest),
        task.shard_folder / held.features.digest,
        samples=held.rows,
        shape=shape,
        classes=task.config.device.class_count,
        spec=task.config.device.features,
    )


def read_logits(task: Task, ref: BlobRef, rows: int, spec: str) -> Logits:
    """Logits (rows, C) that came without feature maps.

    Raises:
        AdmissionError, WireError: they are damaged or do not have this shape.
    """
    classes = task.config.device.class_count
    return shards.read_logits(task.blobs.path(ref.digest), rows=rows, classes=classes, spec=spec)


def samples(
    task: Task, state: GktState, round_: int, logits: Mapping[str, Logits], shape: Shape
) -> Samples:
    """H, z_c and y of all devices, in the order of their names.

    Args:
        task: of the run.
        state: with what the server holds from each device.
        round_: the round that trains on them.
        logits: this round's logits that came without feature maps, by device; others are read from
            blobs.
        shape: of one feature map.
    """
    sources = []
    for name in sorted(state.held):
        held = state.held[name]
        shard = decoded(task, held, shape)
        newest = logits.get(name)
        if newest is None and held.logits:
            newest = read_logits(task, held.logits, held.rows, task.config.transfer.logits)
        if newest is not None:
            shard = replace(shard, logits=newest)
        sources.append(_source(task, state, name, round_, shard))
    return Samples(sources, task.torch_device)


def _source(task: Task, state: GktState, name: str, round_: int, shard: Shard) -> Source:
    """A device's rows, with their weight in the loss and the samples left out of training."""
    held = state.held[name]
    fill = extractors.fill(task, name, state.made_by[name]) if held.cropped else None
    mirror = None if held.mirror is None else np.array(held.mirror)
    count = len(shard) // (2 if held.both_views else 1)
    left_out = held_out(held.data_digest, count, task.config.device.holdout)
    weight = max(task.config.transfer.age_decay ** (round_ - held.round), LEAST)
    return Source(shard, weight, fill, mirror, left_out)


def forget(task: Task, state: GktState) -> None:
    """Delete decoded shards that newer ones have replaced."""
    held = {each.features.digest for each in state.held.values()}
    for folder in task.shard_folder.iterdir():
        if folder.name not in held:
            shutil.rmtree(folder)
