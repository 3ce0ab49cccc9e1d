"""What every command offers its users: help, a version, JSON, and what to install."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib import util

import pytest
import typer.main
import typer.testing

import wire
from edge_agent import main as agent
from ondevice import config as agent_config
from orchestrator import config, demo, main, strategies
from orchestrator.datasets import __main__ as datasets
from tests.conftest import ROOT
from tests.models.test_foreign import install
from tools.export import __main__ as export
from wire import extras
from wire.errors import DataError, StillhouseError


def run(*arguments):
    return typer.testing.CliRunner().invoke(main.app, arguments, catch_exceptions=False)


def parameters():
    """Every option and argument of both programs' commands, with its help."""
    group = typer.main.get_command(main.app)
    shards = typer.Typer(add_completion=False)
    shards.command()(datasets.shards)
    commands = {**group.commands, "datasets": typer.main.get_command(shards), "": group}
    for name, command in commands.items():
        for parameter in command.params:
            yield f"{name} {parameter.name}", getattr(parameter, "help", None)
    parsers = {"export": export._parser(), "agent": agent._parser()}
    for action in parsers["agent"]._actions:
        if isinstance(action.choices, dict):
            parsers |= action.choices
    for name, parser in parsers.items():
        for action in parser._actions:
            yield f"{name} {action.dest}", action.help or getattr(action, "choices", None)


def test_every_option_of_every_command_has_a_help():
    without = [name for name, told in parameters() if not told]
    assert not without
    assert len(list(parameters())) > 80


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("orchestrator.main", "orchestrator"),
        ("orchestrator.datasets", "orchestrator.datasets"),
        ("tools.export", "tools.export"),
        ("edge_agent.main", "edge-agent"),
    ],
)
def test_every_program_says_its_version(module, name):
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.strip() == f"{name} {wire.__version__}"


def test_a_shell_can_learn_the_commands():
    typed = {"COMP_WORDS": "orchestrator st", "COMP_CWORD": "1"}
    told = typer.testing.CliRunner().invoke(
        main.app,
        [],
        prog_name="orchestrator",
        env=typed | {"_ORCHESTRATOR_COMPLETE": "complete_bash"},
    )
    assert told.output.split() == ["start", "status"]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("edge-agent in", ["init"]),
        ("edge-agent --pr", ["--print-completion"]),
        ("edge-agent --print-completion ", ["bash", "zsh"]),
        ("edge-agent --print-completion z", ["zsh"]),
        ("edge-agent doctor --", ["--help", "--config", "--json"]),
        ("edge-agent measure --with", ["--with-pytorch"]),
        ("edge-agent run --config ag", []),  # a path, which the shell completes
    ],
)
def test_a_shell_can_learn_the_agents_commands(typed, told, capsys):
    with pytest.raises(SystemExit) as end:
        agent.main(["--print-completion", "bash"])
    assert not end.value.code
    words = typed.split(" ")
    asked = (
        f"{capsys.readouterr().out}\n"
        f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}\n"
        '_edge_agent; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-eu"], input=asked, capture_output=True, text=True, check=False)
    assert done.stdout.split() == told, done.stderr


def test_without_its_extra_a_command_says_what_to_install(tmp_path):
    """Only the modules of the base install are there, as on a device."""
    hide = (
        "import importlib.util, runpy, sys\n"
        "known = importlib.util.find_spec\n"
        "def find(name, *rest):\n"
        f"    return None if name in {extras.MODULES!r} else known(name, *rest)\n"
        "importlib.util.find_spec = find\n"
        "sys.argv[0] = '-m'\n"
        "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=False)\n"
    )
    for module in ("orchestrator.main", "orchestrator.datasets", "tools.export"):
        done = subprocess.run(
            [sys.executable, "-c", hide, module, "--help"], capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.endswith("in a checkout pip install '.[orchestrator]'")
        assert "torch" in line
        assert ("typer" in line) == (module != "tools.export")  # which needs no typer


def test_workers_of_measurements_need_none_of_the_extra():
    """PyTorch's worker beside an agent needs only torch; onnxruntime-training's not even that."""
    refused = [*extras.MODULES, "edge_agent", "models"]
    code = f"import sys; sys.modules |= dict.fromkeys({refused!r}); import tools.worker"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_commands_are_told_by_one_line_that_a_folder_is_none(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StillhouseError, match="holds no run"):
        run("status", str(file))
    with pytest.raises(StillhouseError, match="is no folder"):
        run("init", str(file))


@pytest.mark.parametrize("content", ["", "[]", "{}", "3"])
def test_a_damaged_status_is_told_by_one_line(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(StillhouseError, match=r"status\.json is damaged"):
        run("status", str(tmp_path))


@pytest.mark.parametrize("module", ["orchestrator.main", "edge_agent.main"])
def test_a_command_runs_in_a_folder_that_is_gone(tmp_path, module):
    there = tmp_path / "there"
    there.mkdir()
    command = ["sh", "-c", 'rmdir "$1" && exec "$2" -m "$3" init "$4"', "sh", there, sys.executable,
               module, tmp_path / "new"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=there, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_program_that_imports_it_gets_an_import_error(monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(ModuleNotFoundError, match="torch is not installed here") as caught:
        extras.check("orchestrator")
    assert caught.value.name == "torch"


def test_the_default_preset_is_named_and_its_reason(tmp_path):
    told = " ".join(run("init", "--help").output.replace("│", " ").split())
    assert f"[default: {config.DEFAULT}]" in told
    assert " ".join(config.WHY_DEFAULT.split()) in told
    assert run("init", str(tmp_path)).exit_code == 0
    assert (tmp_path / "run.toml").read_text() == config.template(config.DEFAULT)
    assert {"dropout", "fedavg", "fedgkt", "frugal", "paper", "shared"} == set(config.presets())


def test_each_command_shows_a_value_that_its_file_takes():
    for command, example in (("init", "device.lr=0.05"), ("enroll", "threads=2")):
        told = " ".join(run(command, "--help").output.replace("│", " ").split())
        assert f"such as {example}; may be repeated" in told


def test_init_takes_other_values_and_tells_scripts_what_it_wrote(tmp_path):
    chosen = ("--set", "device.lr=0.1", "--set", "rounds=20", "--set", "name=trial")
    told = json.loads(run("init", str(tmp_path), "--preset", "fedavg", *chosen, "--json").output)
    assert told == {"file": str(tmp_path / "run.toml"), "preset": "fedavg"}
    made = config.load(tmp_path / "run.toml")
    assert (made.device.lr, made.rounds, made.name, made.strategy) == (0.1, 20, "trial", "fedavg")


def test_init_writes_nothing_where_a_value_is_wrong(tmp_path):
    with pytest.raises(StillhouseError, match=r"did you mean 'device.lr' or 'server.lr'\?"):
        run("init", str(tmp_path / "new"), "--set", "lr=0.1")
    with pytest.raises(StillhouseError, match="--set: rounds: expected int, got str 'many'"):
        run("init", str(tmp_path / "new"), "--set", "rounds=many")
    together = "--set: transfer: strategy 'fedavg' sends no feature"
    with pytest.raises(StillhouseError, match=together):
        run("init", str(tmp_path / "new"), "--set", "strategy=fedavg")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            ["device.model=resnet9"],
            "--set: device.model: no model is named 'resnet9'; did you mean",
        ),
        (["device.model=resnt8@stem"], "device.model: .* did you mean 'resnet8'"),
        (["server.model=resnet56x"], "--set: server.model: no model is named"),
        (['device.others=[{ model = "nosuch", devices = "a*" }]'], "device.others: no model is"),
    ],
)
def test_init_refuses_a_network_that_there_cannot_be(tmp_path, changes, reason):
    with pytest.raises(StillhouseError, match=reason):
        run("init", str(tmp_path / "new"), *(f"--set={change}" for change in changes))
    assert not (tmp_path / "new").exists()


def test_init_takes_every_name_of_a_network_that_there_may_be(tmp_path, monkeypatch):
    """Files that are not written yet, modules, entry points, and a model that nothing uses."""
    site = install(tmp_path, "theirs", "[stillhouse.models]\nmy-net = theirs.nets:Net\n")
    monkeypatch.syspath_prepend(str(site))
    for number, model in enumerate(["later.py:Net", "theirs.nets:Net", "my-net", "my-net@stem"]):
        assert (
            run("init", str(tmp_path / str(number)), f"--set=device.model={model}").exit_code == 0
        )
    unused = ("--preset", "fedavg", "--set", "server.model=nosuch")
    assert run("init", str(tmp_path / "unused"), *unused).exit_code == 0


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--name", "a b", "demo: run name 'a b': use 1 to 64 letters"),
        ("--name", "x" * 43, "demo: name: expected up to 48 characters, got x*-alone"),
        ("--seed", "-1", "demo: seed: expected 0 to 1048575, got -1"),
        ("--rounds", "2000000", "demo: rounds: expected 1 to 1048575"),
        ("--batch", "0", "demo: device: batch: expected 1 or more"),
        ("--broker", "nosuch", "demo: broker: kind: expected one of"),
    ],
)
def test_a_demo_that_cannot_be_is_told_by_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, option, value, reason
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StillhouseError, match=reason):
        run("demo", option, value)
    assert not list(tmp_path.iterdir())


def test_a_demo_takes_a_name_by_which_neither_of_its_runs_is_there(tmp_path):
    assert demo.free_name(tmp_path, "demo") == "demo"
    for folder, free in (("demo", "demo-2"), ("demo-2-alone", "demo-3"), ("demo-4", "demo-3")):
        (tmp_path / folder).mkdir()
        assert demo.free_name(tmp_path, "demo") == free


def test_init_finds_a_strategy_of_ones_own_beside_run_toml_with_its_settings(tmp_path, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project, elsewhere):
        folder.mkdir()
    shutil.copy(ROOT / "tests/extensions/momentum.py", project)
    monkeypatch.chdir(elsewhere)
    chosen = ("--preset", "fedavg", "--set", "strategy=momentum.py:FedAvgM")
    with pytest.raises(StillhouseError, match="beta: expected 0 to below 1, got 2"):
        run("init", str(project), *chosen, "--set", "strategy_settings.beta=2")
    run("init", str(project), *chosen, "--set", "strategy_settings.beta=0.5")
    made = config.load(project / "run.toml", strategies.check)
    assert made.strategy_settings == {"beta": 0.5}
    with pytest.raises(StillhouseError, match=r"no file .*momentum.py"):
        run("init", str(elsewhere), *chosen)


def test_the_agents_init_takes_other_values(tmp_path, capsys):
    path = tmp_path / "agent.toml"
    chosen = ["--set", "device=pi-3", "--set", "broker.url=mqtt://barn", "--set", "threads=2"]
    assert agent.main(["init", str(path), *chosen]) == 0
    made = agent_config.load(path)
    assert (made.device, made.broker.url, made.threads) == ("pi-3", "mqtt://barn:1883", 2)
    assert agent.main(["init", str(tmp_path / "b.toml"), "--set", "devise=pi-3"]) == 2
    assert "unknown key 'devise'; did you mean 'device'?" in capsys.readouterr().err
    assert not (tmp_path / "b.toml").exists()


def test_the_agents_init_makes_the_folder_of_its_file_and_tells_scripts(tmp_path, capsys):
    path = tmp_path / "new/agent.toml"
    assert agent.main(["init", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(path)}
    assert agent_config.load(path).device == "device-0"
    assert agent.main(["init", str(path.parent)]) == 2
    assert f"{path.parent} is a folder; name the file, {path}, say" in capsys.readouterr().err


def test_missing_held_out_images_are_named_by_their_key(tmp_path):
    (tmp_path / "run.toml").write_text(config.template())
    with pytest.raises(DataError, match=r"heldout: .*heldout.npz is not there; .*datasets"):
        run("start", "--config", str(tmp_path / "run.toml"))
    assert not (tmp_path / "runs").exists()


def test_doctor_and_datasets_speak_json(tmp_path, capsys):
    assert agent.main(["doctor", "--config", str(tmp_path / "no.toml"), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert findings[-1]["level"] == "bad"
    assert "no.toml" in findings[-1]["what"]
    datasets.shards("digits", tmp_path / "data", 2, per_device=20, held_out=20, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "data/split.json").read_text())
