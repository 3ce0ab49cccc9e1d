"""The agent needs neither torch nor onnx nor the server's code; a Raspberry Pi has none of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("edge_agent", "ondevice", "wire")
    for path in (ROOT / folder).rglob("*.py")
    if path.stem != "__init__"
)
FOREIGN = ("torch", "torchvision", "onnx", "onnxscript", "orchestrator", "models", "tools", "rich")


def test_there_are_modules_to_look_at():
    assert {"edge_agent.main", "ondevice.trainer", "wire.frames"} <= set(MODULES)


@pytest.mark.parametrize("modules", [MODULES], ids=["all"])
def test_importing_the_agent_imports_nothing_of_the_server(modules):
    script = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
print(sorted(set({FOREIGN!r}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_an_agent_that_waits_has_not_loaded_onnxruntime():
    script = "import edge_agent.agent, edge_agent.main, sys; print('onnxruntime' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("module", ["ondevice.trainer", "orchestrator.deploy.export"])
def test_what_runs_on_a_device_is_reported_to_nobody(module, tmp_path):
    """By default, ONNX Runtime would give the device an identifier, and store reports to send."""
    script = f"import {module}, onnxruntime as ort; ort.get_available_providers()"
    quiet = ("ORT_DISABLE_TELEMETRY", "CI", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in quiet}
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment | {"HOME": str(tmp_path)},
        check=True,
    )
    assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in str(path)]
