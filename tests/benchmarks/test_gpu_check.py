"""The check of a GPU: it tells runs that agree from runs that do not, here on the CPU."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_runs_that_agree_are_told_from_runs_that_do_not(monkeypatch, capsys):
    (muon,) = (check for check in gpu_check.CHECKS if check.name == "muon")
    assert main(["--device", "cpu", "--only", "muon"]) == 0
    assert "muon: agrees; largest difference 0, allowed 0.15" in capsys.readouterr().out
    other = replace(muon, change={"lr": 0.001}, within=0.0)
    monkeypatch.setattr(gpu_check, "CHECKS", (other,))
    assert main(["--device", "cpu", "--only", "muon"]) == 1
    assert "muon: DISAGREES; largest difference" in capsys.readouterr().out


def test_a_machine_without_a_gpu_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "PyTorch finds no GPU here" in capsys.readouterr().err
