"""The command `python -m tools.export`, as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.export.__main__ import main
from wire.artifact import open_artifact

ROOT = Path(__file__).parents[2]


def test_command_exports_a_users_own_model(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(classes):\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),\n"
        "                         nn.Linear(36, classes))\n"
    )
    command = [
        sys.executable, "-W", "error::UserWarning", "-m", "tools.export", "--model", "mine:net",
        "--classes", "3", "--batch", "4", "--input", "1,8,8", "--optimizer", "adam",
        "--task", "classify", "--mean", "0.1", "--std", "0.3", "--out", str(tmp_path / "art"),
    ]  # fmt: skip
    path = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run(
        command, cwd=tmp_path, env=path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    artifact = open_artifact(tmp_path / "art")
    assert artifact.digest in done.stdout
    assert artifact.manifest.optimizer.beta2 == 0.999
    assert artifact.manifest.preprocess.mean == (0.1,)


def test_keep_rate_compiles_a_sub_model(tmp_path, capsys):
    small = ["--model", "caldas_cnn", "--classes", "10", "--batch", "2", "--task", "classify"]
    out = tmp_path / "art"
    assert main([*small, "--keep-rate", "0.25", "--out", str(out)]) == 0
    manifest = open_artifact(out).manifest
    shapes = {spec.name: spec.shape for spec in manifest.state}
    assert manifest.model.keep_rate == 0.25
    assert shapes["conv2.weight"] == (16, 8, 5, 5)
    assert shapes["fc2.weight"] == (10, 128)
    assert main([*small, "--keep-rate", "1.5", "--out", str(tmp_path / "none")]) == 2
    assert "keep_rate: expected more than 0 and at most 1" in capsys.readouterr().err


def test_bad_input_ends_with_two_and_a_reason(tmp_path, capsys):
    rest = ["--classes", "3", "--batch", "4", "--out", str(tmp_path / "art")]
    assert main(["--model", "resnet_55", *rest]) == 2
    assert "did you mean 'resnet55'" in capsys.readouterr().err
    assert main(["--model", "nowhere:net", *rest]) == 2
    assert "cannot be imported" in capsys.readouterr().err
    assert main(["--model", "resnet8", "--momentum", "2", *rest]) == 2
    assert "momentum: expected 0 or more" in capsys.readouterr().err
    assert not (tmp_path / "art").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--input", "3,x"], "--input: expected numbers like 3,32,32, got '3,x'"),
        (["--mean", "0.5,"], "--mean: expected numbers like 0.5,0.5,0.5, got '0.5,'"),
        *(
            (
                ["--memory-mb", value],
                f"--memory-mb: expected megabytes over 0, like 250, got '{value}'",
            )
            for value in ("nan", "inf", "0", "-1", "much")
        ),
    ],
)
def test_argument_that_is_no_number_ends_with_two_and_a_reason(tmp_path, arguments, reason, capsys):
    out = tmp_path / "art"
    rest = ["--model", "resnet8", "--classes", "3", "--batch", "4", "--out", str(out)]
    with pytest.raises(SystemExit) as end:
        main([*rest, f"{arguments[0]}={arguments[1]}"])
    assert end.value.code == 2
    assert reason in capsys.readouterr().err
    assert not out.exists()


def test_help_says_what_the_command_does_and_what_less_memory_costs(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Compile a model's training step into an artifact" in text
    assert "activations are computed again, and if that is not enough the batch is split" in text
    assert text.count("batch norm then sees one part at a time") == 2
