"""The agent stands alone: a Raspberry Pi has no torch, no onnx, nothing of the server."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    f"{folder}.{path.stem}"
    for folder in ("edge_agent", "wire")
    for path in (ROOT / folder).glob("*.py")
    if path.stem != "__init__"
)
FOREIGN = ("torch", "torchvision", "onnx", "onnxscript", "orchestrator", "models", "tools", "rich")


def test_there_are_modules_to_look_at():
    assert {"edge_agent.main", "edge_agent.trainer", "wire.frames"} <= set(MODULES)


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
