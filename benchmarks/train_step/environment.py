"""The environment of onnxruntime-training, created once; its wheels end with Python 3.11."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.race import PATHS, ContenderError

REQUIREMENTS = ("numpy==1.26.4", "onnx==1.16.2", "onnxruntime-training-cpu==1.19.2")
PYTHON = (3, 11)
LIMIT_S = 1800.0


def onnxruntime_training(cache: Path) -> Path:
    """The Python of the environment, which is created if it does not exist.

    Raises:
        ContenderError: it cannot be created; the message says why.
    """
    folder = cache / "onnxruntime-training"
    python, mark = folder / "bin" / "python", folder / "complete.txt"
    wanted = "\n".join(REQUIREMENTS)
    if mark.exists() and mark.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    call([_interpreter(), "-m", "venv", str(folder)])
    call([str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *REQUIREMENTS])
    mark.write_text(wanted)
    return python


def call(command: Sequence[str]) -> None:
    """Run a command to its end.

    Raises:
        ContenderError: it failed; the message quotes its last line that names an error.
    """
    try:
        done = subprocess.run(
            command, env=os.environ | PATHS, capture_output=True, text=True, check=False,
            timeout=LIMIT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as fault:
        raise ContenderError(str(fault)) from fault
    if done.returncode:
        lines = (done.stdout + done.stderr).split("\n")
        errors = [line for line in lines if "error" in line.lower()] or lines
        last = next((line.strip() for line in reversed(errors) if line.strip()), "no output")
        raise ContenderError(f"{' '.join(command[1:4])} ended with {done.returncode}: {last}")


def _interpreter() -> str:
    if sys.version_info[:2] <= PYTHON:
        return sys.executable
    name = f"python{PYTHON[0]}.{PYTHON[1]}"
    path = shutil.which(name)
    if path is None:
        raise ContenderError(
            f"its wheels end with Python {PYTHON[0]}.{PYTHON[1]}, this is "
            f"{sys.version_info[0]}.{sys.version_info[1]}, and there is no {name} on PATH"
        )
    return path
