"""Strategies by name: ours, and those of a user, which are refused before anything begins."""

import re
import shutil
from pathlib import Path

import pytest

from models.foreign import Found
from orchestrator import strategies
from orchestrator.config import BrokerConfig, RunConfig, changes, load
from orchestrator.launch import start
from orchestrator.strategies import registry
from tests.models.test_foreign import install
from wire import records
from wire.errors import SettingsError

MOMENTUM = Path(__file__).parents[1] / "extensions/momentum.py"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with a strategy, and the current one."""
    shutil.copy(MOMENTUM, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_toml(folder, strategy="momentum.py:FedAvgM", more=""):
    path = folder / "run.toml"
    path.write_text(f'name = "run"\nstrategy = "{strategy}"\nheldout = "held.npz"\n{more}')
    return path


def changed(folder, *pairs):
    """The user's strategy, edited."""
    text = MOMENTUM.read_text()
    for before, after in pairs:
        assert before in text
        text = text.replace(before, after)
    (folder / "momentum.py").write_text(text)


def test_a_users_strategy_has_settings_of_its_own(folder):
    (folder / "elsewhere").mkdir()
    path = run_toml(folder, more="[strategy_settings]\nbeta = 0.25\n")
    config = load(path, strategies.check)
    assert config.strategy == f"{folder}/./momentum.py:FedAvgM"
    assert strategies.sources(config.strategy).keys() == {"momentum.py"}
    assert strategies.sources("fedavg") == {}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (
            "[strategy_settings]\nbetta = 0.5",
            "unknown key 'betta'; did you mean 'beta'",
        ),
        ("[strategy_settings]\nbeta = 2", "strategy_settings: beta: expected 0 to below 1, got 2"),
        ('[strategy_settings]\nbeta = "a"', "strategy_settings: beta: expected float, got str 'a'"),
        ("[transfer]\nviews = true", r"sends no feature maps; remove \[transfer\], or begin"),
    ],
)
def test_settings_that_a_users_strategy_does_not_take_are_refused_with_the_file(folder, more, text):
    path = run_toml(folder, more=more)
    with pytest.raises(SettingsError, match=f"^{path}: .*{text}"):
        load(path, strategies.check)


def test_a_strategy_of_ours_has_no_settings_of_its_own(folder):
    path = run_toml(folder, "fedavg", "[strategy_settings]\nbeta = 0.5")
    with pytest.raises(
        SettingsError, match="strategy_settings: strategy 'fedavg' has no settings of"
    ):
        load(path, strategies.check)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (("import numpy as np", "import nunpy as np"), "importing it fails with ModuleNotFound"),
        (("class FedAvgM:", "class Other:"), "py has no 'FedAvgM'; it has Settings"),
        (("class FedAvgM:", "FedAvgM = 3\nclass Other:"), "expected a class, got int"),
        (("def admit(self", "def other(self"), r"has no function admit\(state, order, result\)"),
        (
            ("def admit(self, state: Momentum, order: Order,", "def admit(self, order: Order,"),
            r"admit: expected it to take \(self, state, order, result\), got \(self, order: .*too",
        ),
        (
            ("        contributions: Iterable[Update],\n", ""),
            r"aggregate: expected it to take \(.*, results, contributions\), got \(self, ",
        ),
        (("self, task: Task", "self"), r": expected it to take \(task\), got \(\)"),
        (("    settings = Settings\n", ""), "expected a dataclass as its attribute `settings`"),
    ],
)  # fmt: skip
def test_a_strategy_that_is_none_is_named_with_its_entry_point_before_a_broker_starts(
    folder, monkeypatch, edit, text
):
    changed(folder, edit)
    name = folder.name  # another one in each test: what is imported stays
    site = install(folder, name, f"[stillhouse.strategies]\n{name} = {name}:FedAvgM\n")
    shutil.move(folder / "momentum.py", site / f"{name}.py")
    monkeypatch.syspath_prepend(str(site))
    path = run_toml(folder, name)
    found = f"strategy: {name} = {name}:FedAvgM.*{text}"
    with pytest.raises(SettingsError, match=f"^{re.escape(str(path))}: {found}"):
        load(path, strategies.check)
    config = RunConfig("run", path, strategy=name, runs=folder / "runs", broker=BrokerConfig())
    with pytest.raises(SettingsError, match=f"^{found}"):
        start.run(config)
    assert not config.runs.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fedavgg", "strategy: expected one of 'fedgkt', .*, got 'fedavgg'; did you mean 'fedavg'"),
        ("other", "got 'other'; or name path/to/file.py:Class or package.module:Class"),
        (
            "momenta.py:FedAvgM",
            "strategy: momenta.py:FedAvgM: no file .*mean 'momentum.py'",
        ),
        ("momentum.py:", "expected a Class behind the colon"),
    ],
)
def test_a_name_of_no_strategy_is_answered_with_the_nearest(folder, name, text):
    with pytest.raises(SettingsError, match=text):
        load(run_toml(folder, name), strategies.check)


def test_a_run_that_has_begun_keeps_the_settings_of_its_strategy(folder):
    before, now = (
        records.plain(load(run_toml(folder, more=more)))
        for more in ("[strategy_settings]\nbeta = 0.25", "")
    )
    (change,) = changes.refused(before, now, 1)
    assert str(change) == ("strategy_settings: the run began with {'beta': 0.25}, run.toml says {}")


def test_our_strategies_pass_the_inspection_of_a_users():
    for name, cls in registry._OURS.items():
        assert registry._checked(Found(name, None, cls)) is cls
