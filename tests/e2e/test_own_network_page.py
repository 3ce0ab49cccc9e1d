"""The blocks of docs/your-own-network.md work as a reader types them."""

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from tests.conftest import ROOT

PAGE = ROOT / "docs/your-own-network.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CLASSES = ("bolt", "nut", "washer")


def take_photos(folder: Path) -> None:
    """Make 24 photos of each class, of several sizes; their colour tells the classes apart."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(24):
            pixels = rng.integers(0, 120, (40 + i, 64, 3), np.uint8)
            pixels[..., number] += 120
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.e2e
def test_every_block_of_the_page_does_what_it_says(tmp_path):
    take_photos(tmp_path / "photos")
    text = PAGE.read_text().replace("1883", str(free_port()))
    # The commands are those of this checkout, whatever is installed. Agents have neither PyTorch
    # nor nets.py.
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "torch.py").write_text("raise ImportError('an agent needs no torch')")
    for name, command in (
        ("python", sys.executable),
        ("orchestrator", f"{sys.executable} -m orchestrator.main"),
        ("edge-agent", f"PYTHONPATH={commands}:{ROOT} {sys.executable} -m edge_agent.main"),
    ):
        (commands / name).write_text(f'#!/bin/sh\nexec env {command} "$@"\n')
        (commands / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    known = subprocess.run(
        ["orchestrator", "--help"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    for language, block in BLOCK.findall(text):
        if language == "sh":
            if "orchestrator predict" in block and "predict" not in known:
                continue
            done = subprocess.run(
                ["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True,
                text=True, check=False, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
            continue
        name = re.match(r"# (\S+)\n", block)
        if name:
            (tmp_path / name[1]).write_text(block)
        else:
            tomllib.loads(block)
    check(tmp_path)


def check(folder: Path) -> None:
    """Check that runs learnt, devices got only the artifact, and the file tells colours apart."""
    for run in ("trial", "parts"):
        report = json.loads((folder / f"runs/{run}/report.json").read_text())
        assert len(report["rounds"]) == 2
        assert set(report["sources"]) == {"nets.py:Small", "nets.py:large"}
        assert set(report["sources"]["nets.py:Small"]) == {"nets.py"}
    assert not list(folder.glob("state-*/**/*.py"))
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert session.get_outputs()[0].shape[1] == len(CLASSES)
