"""The setting of the benchmark, and the folder of files from which all contenders start.

    setting.json    the `Setting`
    batch.npz       x float32 (B, *input), y int64 (B), teacher float32 (B, classes)
    images.npz      x uint8 (N, H, W, C), y: the agent trains on these
    artifact/       the compiled training step
    forward.onnx    network and objective, for onnxruntime-training to differentiate
    trained.json    names of the parameters in forward.onnx
    training/       what onnxruntime-training generates from both

This file needs only the standard library and numpy, because onnxruntime-training's separate
environment imports it too.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Task = Literal["distill", "classify"]

SEED = 0
CLASSES = 10
# Every step sees the same batch. The learning rate is so small that over thousands of steps, the
# loss and the share of zeros after the ReLUs stay like those of a network in training.
LR = 1e-4
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
ALPHA = 0.5
TEMPERATURE = 3.0
AGENT_STEPS = 12


@dataclass(frozen=True)
class Setting:
    """One network, one objective, one batch size; `input` is the shape of a sample."""

    model: str
    task: Task
    batch: int
    input: tuple[int, int, int]

    def write(self, folder: Path) -> None:
        """Write the setting and its random data."""
        random = np.random.default_rng(SEED)
        channels, height, width = self.input
        images = AGENT_STEPS * self.batch
        (folder / "setting.json").write_text(json.dumps(asdict(self)))
        np.savez(
            folder / "batch.npz",
            x=random.standard_normal((self.batch, *self.input), dtype=np.float32),
            y=random.integers(0, CLASSES, self.batch),
            teacher=3 * random.standard_normal((self.batch, CLASSES), dtype=np.float32),
        )
        np.savez(
            folder / "images.npz",
            x=random.integers(0, 256, (images, height, width, channels), dtype=np.uint8),
            y=random.integers(0, CLASSES, images),
        )

    def load_batch(self, folder: Path) -> dict[str, NDArray[Any]]:
        """The batch: x and y, and for distillation the teacher's logits."""
        names = ("x", "y", "teacher") if self.task == "distill" else ("x", "y")
        with np.load(folder / "batch.npz", allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}


def load(folder: Path) -> Setting:
    """The setting in a folder."""
    values = json.loads((folder / "setting.json").read_text())
    return Setting(**values | {"input": tuple(values["input"])})
