import platform
import subprocess
import sys
import threading

import numpy as np
import pytest

from ondevice.denormals import Denormals
from tests.ondevice.test_work import compiled

SMALL = np.full(64, 1e-39, np.float32)
ONE = np.float32(1)

x86 = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc",
    reason="denormals are slow on x86 alone",
)


@x86
def test_denormals_are_zero_inside_and_themselves_outside_in_any_thread():
    seen = []

    def look():
        with Denormals(flush=True):
            seen.append((SMALL * ONE).any())
            with Denormals(flush=False):
                seen.append((SMALL * ONE).any())
            seen.append((SMALL * ONE).any())
        seen.append((SMALL * ONE).any())

    look()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [False, True, False, True] * 2


TRAIN = """
import sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file
from ondevice.trainer import Inference, TrainStep
from wire.artifact import open_artifact

artifact = open_artifact(Path(sys.argv[1]))
step = TrainStep(artifact, load_file(artifact.weights), threads=1)
step()
Inference(artifact, "eval", step.state, threads=1)()
small = np.full(64, 1e-39, np.float32)
assert (small * np.float32(1)).any(), "payloads keep numbers under 1.2e-38"
"""


def test_a_training_step_leaves_the_numbers_of_its_thread_alone(tmp_path):
    artifact = compiled(tmp_path / "a")
    # In a new process, because ONNX Runtime sets the mode with a process's first session.
    subprocess.run([sys.executable, "-c", TRAIN, str(artifact.folder)], check=True)
