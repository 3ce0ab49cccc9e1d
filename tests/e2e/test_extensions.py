"""A user's own strategy and network, each one file outside Stillhouse, do a whole run."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator import strategies
from orchestrator.config import load
from orchestrator.run_folder.store import last_checkpoint
from orchestrator.simulation import simulate
from tests.e2e.test_run import Fleet, check_every_round_counts_each_device_once
from wire.artifact import open_artifact

EXTENSIONS = Path(__file__).parents[1] / "extensions"
ENTRY_POINTS = """\
[stillhouse.strategies]
fedavgm = theirs.momentum:FedAvgM
[stillhouse.models]
tiny = theirs.nets:Tiny
"""


def install(folder: Path) -> None:
    """Make a user's package in the current folder, where `python -m` looks for packages."""
    shutil.copytree(EXTENSIONS, folder / "theirs")
    info = folder / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)


@pytest.mark.e2e
@pytest.mark.parametrize("any_broker", ["embedded"], indirect=True)
def test_an_installed_strategy_and_network_run_over_the_wire_and_from_files_by_simulation(
    processes, digits, any_broker
):
    install(processes.folder)
    fleet = Fleet(processes, digits, any_broker.url, strategy="fedavgm", model="tiny")
    path = fleet.folder / "run.toml"
    codecs = 'state = "float32"\nupdate = "float32"\n[server]'
    text = path.read_text().replace("[server]", codecs) + "[strategy_settings]\nbeta = 0.5\n"
    path.write_text(text)
    fleet.start()
    report = fleet.finish()
    check_every_round_counts_each_device_once(report, 2)
    assert all(0 <= entry["server_accuracy"] <= 1 for entry in report["rounds"])
    assert set(report["sources"]) == {"fedavgm", "tiny"}

    text = text.replace('"fedavgm"', '"theirs/momentum.py:FedAvgM"')
    text = text.replace('"tiny"', '"theirs/nets.py:Tiny"')
    path.write_text(text.replace('name = "run"', 'name = "simulated"'))
    config = load(path, strategies.check)
    simulate.run(replace(config, rounds=1), digits)
    simulate.run(config, digits)  # continues with the saved velocity
    _, real = last_checkpoint(fleet.folder / "runs/run")
    _, simulated = last_checkpoint(config.folder)
    assert real.tensors.keys() == simulated.tensors.keys()
    for name, array in simulated.under("velocity").items():
        apart = np.linalg.norm(real.under("velocity")[name] - array)
        assert apart < 0.05 * np.linalg.norm(array), name


@pytest.mark.e2e
@pytest.mark.parametrize("any_broker", ["embedded"], indirect=True)
def test_agents_learn_from_the_teacher_of_a_users_strategy(processes, digits, any_broker):
    install(processes.folder)
    strategy = "theirs/born_again.py:BornAgain"
    fleet = Fleet(processes, digits, any_broker.url, strategy=strategy, model="theirs/nets.py:Tiny")
    fleet.start()
    report = fleet.finish()
    check_every_round_counts_each_device_once(report, 2)
    assert open_artifact(fleet.folder / "runs/run/artifact").manifest.task == "distill"
