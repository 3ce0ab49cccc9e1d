"""Strategies by name: ours, and a user's own; a faulty one is refused before anything begins."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.foreign import Found
from orchestrator import strategies
from orchestrator.config import BrokerConfig, RunConfig, changes, load
from orchestrator.deploy import export
from orchestrator.launch import artifacts, networks, start
from orchestrator.run_folder.store import last_checkpoint
from orchestrator.simulation import simulate
from orchestrator.strategies import registry
from tests.models.test_foreign import install
from wire import records
from wire.artifact import open_artifact
from wire.errors import RunError, SettingsError, StillhouseError

SMALL = """
rounds = 1
[device]
model = "nets.py:Tiny"
"""
MOMENTUM = Path(__file__).parents[1] / "extensions/momentum.py"
BORN_AGAIN = MOMENTUM.with_name("born_again.py")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with a strategy, as the current folder."""
    shutil.copy(MOMENTUM, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_toml(folder, strategy="momentum.py:FedAvgM", more=""):
    path = folder / "run.toml"
    path.write_text(f'name = "run"\nstrategy = "{strategy}"\nheldout = "held.npz"\n{more}')
    return path


def changed(folder, *pairs):
    """Edit the user's strategy: replace each pair's first text by its second."""
    text = MOMENTUM.read_text()
    for before, after in pairs:
        assert before in text
        text = text.replace(before, after)
    (folder / "momentum.py").write_text(text)


def simulated(path, digits):
    """Simulate a run of two rounds; the second goes on from a checkpoint."""
    config = load(path, strategies.check)
    for rounds in (1, 2):
        simulate.run(replace(config, rounds=rounds), digits)


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
        (
            ("    settings = Settings\n", "    settings = Settings\n    needs = {'techer'}\n"),
            "`needs` to be a set of some of 'feature maps', 'teacher', got {'techer'}",
        ),
    ],
)  # fmt: skip
def test_a_strategy_that_is_none_is_named_with_its_entry_point_before_a_broker_starts(
    folder, monkeypatch, edit, text
):
    changed(folder, edit)
    name = folder.name  # differs in each test, because modules stay imported
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
        registry._inspect(Found(name, None, cls))


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            ("self.task = task", "self.task = task[0]"),
            r"__init__ fails at .*momentum.py:\d+: TypeError: 'Task' object is not",
        ),
        (
            ("unused.need_heldout(config)", "config.no_such_key"),
            r"check fails at .*momentum.py:\d+: AttributeError: .*no_such_key",
        ),
        (
            ("w = self.task.initial\n", "w = {}['w']\n"),
            r"begin fails at .*momentum.py:\d+: KeyError: 'w'",
        ),
        (
            ("named = tensors", "open('no.json')\n        named = tensors"),
            r"orders fails at .*momentum.py:\d+: FileNotFoundError: \[Errno 2\] No such file",
        ),
        (
            ('update = read_payload(self.task, order, result, "update")', "update = 1 / 0"),
            r"admit fails at .*momentum.py:\d+: ZeroDivisionError: division by zero",
        ),
        (
            ("limit = self.task.config.cohort.max_weight", "limit = results[99]"),
            r"aggregate fails at .*momentum.py:\d+: IndexError: ",
        ),
        (
            ("        return Momentum(w, {name", "        Momentum(w, {name"),
            r"begin: expected it to return a state with a function pack\(\), got NoneType",
        ),
        (
            (
                "        return {\n            name: self",
                "        return None, {\n            name: self",
            ),
            "orders: expected it to return a dict of one Order a device, got tuple",
        ),
        (
            ("            for name in cohort", "            for name in ['stranger', *cohort]"),
            "orders: expected orders to devices of the cohort, got one to 'stranger'",
        ),
        (
            ("        return Update(update)", "        return update"),
            "admit: expected it to return a contribution with a number `nbytes`, got dict",
        ),
        (
            ("return Momentum(w, v), metrics", "return Momentum(w, v)"),
            "aggregate: expected it to return a pair of the next state and a dict of metrics, got",
        ),
        (
            ("return Momentum(w, v), metrics", "return w, metrics"),
            r"aggregate: expected it to return a state with a function pack\(\), got dict",
        ),
        (
            ("self.beta < 1", "self.beta < self.most"),
            r"settings fails at .*momentum.py:\d+: AttributeError: .*no attribute 'most'",
        ),
        (
            ("beta: float = 0.9", "beta: 'Beta' = 0.9"),
            r"settings fails with NameError: name 'Beta' is not defined",
        ),
        (
            ('"global", self.weights', '"global", self.w'),
            r"pack fails at .*momentum.py:\d+: AttributeError: .*no attribute 'w'",
        ),
        (
            ("return Checkpoint(packed |", "Checkpoint(packed |"),
            "pack: expected it to return a Checkpoint, got NoneType",
        ),
        (
            ('("velocity", self.velocity))', '("velocity", self.velocity), {"w": np.int64(1)})'),
            "pack fails with TypeError: Object of type int64 is not JSON serializable",
        ),
        (
            ('("velocity", self.velocity)', '("velocity", {"v": None})'),
            "pack: expected arrays of numbers, got object in 'velocity/v'",
        ),
        (
            ('checkpoint.under("velocity")', 'checkpoint.tensors["velocity"]'),
            r"restore fails at .*momentum.py:\d+: KeyError: 'velocity'",
        ),
        (
            ('{"devices": {}}', '{"devices": {}, "w": np.float32(1)}'),
            "aggregate fails with TypeError: Object of type float32 is not JSON serializable",
        ),
        (
            ('{"devices": {}}', '{"devices": {"device-0": 0.5}}'),
            r"aggregate: expected it to return a dict of metrics for each device in \['devices'\]",
        ),
    ],
)
def test_a_strategy_that_fails_is_told_by_one_line_of_its_file(folder, digits, edit, text):
    changed(folder, edit)
    path = run_toml(folder, more=SMALL)
    shutil.copy(MOMENTUM.with_name("nets.py"), folder)
    (folder / "held.npz").symlink_to(digits / "heldout.npz")
    with pytest.raises(StillhouseError, match=rf"strategy: momentum.py:FedAvgM: {text}") as caught:
        simulated(path, digits)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.type in (RunError, SettingsError)


def test_what_a_users_strategy_refuses_of_a_device_is_refused(folder, digits):
    changed(
        folder,
        ("return Update(update)", 'raise AdmissionError("too far away")'),
        ("from wire.mess", "from wire.errors import AdmissionError\nfrom wire.mess"),
    )
    path = run_toml(folder, more=SMALL)
    shutil.copy(MOMENTUM.with_name("nets.py"), folder)
    (folder / "held.npz").symlink_to(digits / "heldout.npz")
    with pytest.raises(RunError, match="no result can be used; the first: too far away"):
        simulate.run(load(path, strategies.check), digits)


@pytest.mark.parametrize(
    ("strategy", "task"),
    [("momentum.py:FedAvgM", "classify"), ("born_again.py:BornAgain", "distill")],
)
def test_devices_get_a_training_step_with_a_teacher_if_the_strategy_needs_it(
    folder, strategy, task
):
    for file in (BORN_AGAIN, MOMENTUM.with_name("nets.py")):
        shutil.copy(file, folder)
    config = load(run_toml(folder, strategy, SMALL), strategies.check)
    with artifacts.compiled(config) as made:
        (artifact,) = made.iterdir()
        assert open_artifact(artifact).manifest.task == task


def test_a_users_strategy_with_a_teacher_does_a_run_and_exports_a_devices_network(folder, digits):
    for file in (BORN_AGAIN, MOMENTUM.with_name("nets.py")):
        shutil.copy(file, folder)
    (folder / "held.npz").symlink_to(digits / "heldout.npz")
    path = run_toml(folder, "born_again.py:BornAgain", SMALL)
    config = load(path, strategies.check)
    alone = replace(config, name="alone", device=replace(config.device, alpha=0.0))
    learnt = []
    for one in (config, alone):
        simulate.run(one, digits)
        simulate.run(replace(one, rounds=2), digits)  # from a checkpoint
        learnt.append(last_checkpoint(one.folder)[1].under("device/device-1"))
    taught, untaught = learnt
    assert not np.allclose(taught["fc.weight"], untaught["fc.weight"], atol=1e-4)
    done = export.export_run(config.folder, folder / "m.onnx", "device-1", small=True)
    assert done.card.device == "device-1"
    with pytest.raises(RunError, match="born_again:BornAgain has no model of the whole fleet; --s"):
        export.export_run(config.folder, folder / "m.onnx")


def test_networks_are_cut_if_a_users_strategy_needs_feature_maps(folder):
    declared = "    settings = Settings\n"
    changed(folder, (declared, f"{declared}    needs = {{'feature maps'}}\n"))
    shutil.copy(MOMENTUM.with_name("nets.py"), folder)
    config = load(run_toml(folder, more=SMALL), strategies.check)
    with pytest.raises(RunError, match=r"nets:Tiny has no feature extractor, which momentum:FedAv"):
        networks.check(config)
    networks.check(replace(config, device=replace(config.device, model="resnet8")))
