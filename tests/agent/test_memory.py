"""The memory that an artifact predicts is what the agent's process uses."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from tools.export import export

ROOT = Path(__file__).parents[2]
TOLERANCE = 0.15
BATCHES = 6


@pytest.mark.e2e
@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="the agent's own memory was measured on Linux x86-64",
)
@pytest.mark.parametrize(
    ("batch", "memory_mb"), [(8, None), (32, None), (32, 110)], ids=["8", "32", "32 in 110 MB"]
)
def test_agent_at_work_takes_what_the_artifact_foretells(tmp_path, batch, memory_mb):
    torch.manual_seed(0)
    memory = export(
        models.build("resnet8", classes=10), name="resnet8", classes=10, input_shape=(3, 32, 32),
        batch=batch, memory_mb=memory_mb, out=tmp_path / "artifact",
    ).manifest.memory  # fmt: skip
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "images.npz",
        x=random.integers(0, 256, (BATCHES * batch, 32, 32, 3), dtype=np.uint8),
        y=random.integers(0, 10, BATCHES * batch),
    )
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("worker.py"), tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(memory.process, rel=TOLERANCE)
    assert memory_mb is None or memory.process <= memory_mb * 1e6
