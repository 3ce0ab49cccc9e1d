"""Measures PyTorch at the same training step, in turns with our engine.

PyTorch runs in a separate process, so that its memory can be measured separately:
`python -m tools.pytorch_step`, which comes with the orchestrator's packages and is not imported
here. Both sides begin with the artifact's weights, see the same batch, and must report the same
first loss. While one computes, the other waits on a pipe.
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
LIMIT_S = 300.0  # enough to import PyTorch and do its first steps on a small board
SAME_LOSS = 1e-3
# The learning rate is so small that random labels do not make the weights diverge.
SETTINGS = {"lr": 1e-6, "alpha": 1.0, "temperature": 3.0}


def batch(manifest: Manifest) -> dict[str, NDArray[Any]]:
    """Random samples of an artifact: x (B, *input), y (B,), and for distillation teacher (B, C)."""
    rng, size, classes = np.random.default_rng(0), manifest.batch, manifest.model.classes
    samples: dict[str, NDArray[Any]] = {
        "x": rng.standard_normal((size, *manifest.model.input), np.float32),
        "y": rng.integers(classes, size=size),
    }
    if manifest.task == "distill":
        samples["teacher"] = rng.standard_normal((size, classes), np.float32)
    return samples


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
    """Measure PyTorch and our engine in turns.

    Args:
        artifact: PyTorch's process reads it.
        step: does one step of our engine, and returns its loss.
        threads: for both; 0 leaves the number to PyTorch.
        model: the network's name for PyTorch's process; "": the name in the manifest.

    Returns:
        The fields of `wire.measurement.Peer`.

    Raises:
        SettingsError: PyTorch cannot do this step, or does a different one; the message says why.
    """
    first = step()
    ours: list[float] = []
    theirs: list[float] = []
    with _process(artifact, threads, model) as (process, errors):
        ready = _answer(process, errors)
        if abs(ready["loss"] / first - 1) > SAME_LOSS:
            raise SettingsError(
                f"--with-pytorch: not the same step: expected a first loss near {first:.6f}, got "
                f"{ready['loss']:.6f} from PyTorch"
            )
        for _ in range(TURNS):
            steps, began = 0, time.perf_counter()
            while (seconds := time.perf_counter() - began) < TURN_S:
                step()
                steps += 1
            ours.append(steps * artifact.manifest.batch / seconds)
            assert process.stdin is not None  # noqa: S101 - a pipe, as requested below
            with contextlib.suppress(BrokenPipeError):  # the process has ended; _answer reports it
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
    # Our packages come first, whatever the current folder is; the user's own network comes after.
    places = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, places)), "PYTHONSAFEPATH": "1"}
    thread_limit = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    arguments = [str(artifact.folder), str(threads), model]
    command = [sys.executable, "-m", "tools.pytorch_step", *arguments]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, **paths, **thread_limit},
        )  # fmt: skip
        try:
            yield process, errors
        finally:
            process.kill()
            process.communicate()


def _answer(process: "subprocess.Popen[str]", errors: IO[bytes]) -> dict[str, Any]:
    pipe = process.stdout
    assert pipe is not None  # noqa: S101 - a pipe, as requested above
    if not select.select([pipe], [], [], LIMIT_S)[0]:
        raise SettingsError(f"--with-pytorch: no answer from its process within {LIMIT_S:g} s")
    if line := pipe.readline():
        answer: dict[str, Any] = json.loads(line)
        fault = answer.get("failed")
    else:
        errors.seek(0)
        printed = errors.read().decode(errors="replace").strip() or "it ended without a message"
        fault = printed.splitlines()[-1]
    if fault:
        raise SettingsError(f"--with-pytorch: its process failed: {fault}; leave it out")
    return answer
