"""PyTorch beside us: the same training step in turns, in a process whose memory is its own.

The process is `python -m tools.pytorch_step`, which comes with the orchestrator's packages; nothing
of it is imported here. Both sides begin with the artifact's weights, see the same batch, and must
tell the same first loss. While one computes, the other waits on a pipe.
"""

import contextlib
import importlib.util
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ondevice import meter
from wire.artifact import Artifact
from wire.errors import SettingsError
from wire.manifest import Manifest

PACKAGES = ("torch", "models", "tools")
TURNS, TURN_S = 7, 1.0
LIMIT_S = 300.0  # for PyTorch to be imported and to do its first steps on a small board
SAME_LOSS = 1e-3
# A rate so small that random labels do not let the weights run away.
SETTINGS = {"lr": 1e-6, "alpha": 1.0, "temperature": 3.0}


def batch(manifest: Manifest) -> dict[str, NDArray[Any]]:
    """Random samples of an artifact: x (B, *input), y (B,), and for distillation teacher (B, C)."""
    rng, size, classes = np.random.default_rng(0), manifest.batch, manifest.model.classes
    made: dict[str, NDArray[Any]] = {
        "x": rng.standard_normal((size, *manifest.model.input), np.float32),
        "y": rng.integers(classes, size=size),
    }
    if manifest.task == "distill":
        made["teacher"] = rng.standard_normal((size, classes), np.float32)
    return made


def check() -> None:
    """Return if PyTorch can be measured here.

    Raises:
        SettingsError: packages are missing; the message names them.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"--with-pytorch: {', '.join(missing)} cannot be found by {sys.executable}; measure in "
            "an environment with the orchestrator's packages (pip install "
            "'stillhouse[orchestrator]'), or leave it out"
        )


def race(
    artifact: Artifact, step: Callable[[], float], *, threads: int, model: str = ""
) -> dict[str, Any]:
    """Measure PyTorch and us in turns.

    Args:
        artifact: that PyTorch's process reads.
        step: does one of our steps; returns its loss.
        threads: of both; 0 leaves PyTorch its own number.
        model: the network's name for PyTorch's process; "": as the manifest has it.

    Returns:
        What `wire.measurement.Peer` holds.

    Raises:
        SettingsError: PyTorch cannot do this step, or does another one; the message says why.
    """
    first = step()
    ours: list[float] = []
    theirs: list[float] = []
    with _process(artifact, threads, model) as (process, errors):
        ready = _answer(process, errors)
        if abs(ready["loss"] / first - 1) > SAME_LOSS:
            raise SettingsError(
                f"--with-pytorch: not the same step: expected a first loss near {first:.6f}, got "
                f"{ready['loss']:.6f} of PyTorch"
            )
        for _ in range(TURNS):
            done, began = 0, time.perf_counter()
            while (seconds := time.perf_counter() - began) < TURN_S:
                step()
                done += 1
            ours.append(done * artifact.manifest.batch / seconds)
            assert process.stdin is not None  # noqa: S101 - a pipe, as asked for below
            with contextlib.suppress(BrokenPipeError):  # it has ended: _answer says so
                print(TURN_S, file=process.stdin, flush=True)
            theirs.append(_answer(process, errors)["images_per_s"])
        peak = meter.resident_bytes("VmHWM", process.pid)
    return {
        "version": metadata.version("torch"),
        "images_per_s": statistics.median(theirs),
        "ours_images_per_s": statistics.median(ours),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "peak_bytes": peak,
    }


@contextlib.contextmanager
def _process(
    artifact: Artifact, threads: int, model: str
) -> Iterator[tuple["subprocess.Popen[str]", IO[bytes]]]:
    # The same packages whatever the folder this is started in; a network of one's own behind them.
    places = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, places)), "PYTHONSAFEPATH": "1"}
    held = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    arguments = [str(artifact.folder), str(threads), model]
    command = [sys.executable, "-m", "tools.pytorch_step", *arguments]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, **paths, **held},
        )  # fmt: skip
        try:
            yield process, errors
        finally:
            process.kill()
            process.communicate()


def _answer(process: "subprocess.Popen[str]", errors: IO[bytes]) -> dict[str, Any]:
    pipe = process.stdout
    assert pipe is not None  # noqa: S101 - a pipe, as asked for above
    if not select.select([pipe], [], [], LIMIT_S)[0]:
        raise SettingsError(f"--with-pytorch: no answer of its process within {LIMIT_S:g} s")
    if line := pipe.readline():
        answer: dict[str, Any] = json.loads(line)
        fault = answer.get("failed")
    else:
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip() or "it ended without a word"
        fault = said.splitlines()[-1]
    if fault:
        raise SettingsError(f"--with-pytorch: its process failed: {fault}; leave it out")
    return answer
