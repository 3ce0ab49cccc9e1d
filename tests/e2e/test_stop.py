"""Ctrl-C is answered at once, with what is kept; a second one ends the program at once."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, Processes
from tests.e2e.test_run import Fleet, check_every_round_counts_each_device_once

SOON_S = 60.0  # enough for a busy machine; the tests show that nothing else is waited for


def interrupted(folder: Path, when: str, *arguments: str, times: int = 1) -> tuple[int, str]:
    """Send Ctrl-C to `python -m ARGUMENTS` once it prints `when`; return exit code and output."""
    with subprocess.Popen(
        [sys.executable, "-u", "-m", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = ""
        while not re.search(when, said):
            line = process.stdout.readline()
            assert line, said
            said += line
        for _ in range(times):
            process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=SOON_S)
    assert "Traceback" not in said + rest, said + rest
    return process.returncode, said + rest


SWALLOWED = """
import signal, sys
from wire import stopping

def work():
    try:
        signal.raise_signal(signal.SIGINT)
        while True:
            pass
    except BaseException:
        print("swallowed", flush=True)
    with stopping.instead(lambda: "", lambda: None):
        print("went on", flush=True)

stopping.listen()
sys.exit(stopping.run(work))
"""


def test_a_ctrl_c_that_a_library_swallows_is_not_lost(tmp_path):
    (tmp_path / "swallows.py").write_text(SWALLOWED)
    program = [sys.executable, "swallows.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(  # noqa: PLW1510
        program, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=SOON_S
    )
    assert (done.returncode, done.stdout) == (130, "swallowed\n")
    assert done.stderr.startswith("stopping")


HEARD_LATE = """
import signal, sys
from wire import stopping

stopping.listen()
sys.setswitchinterval(10)  # the listening thread comes to hear only after `run` has begun
signal.raise_signal(signal.SIGINT)
sys.exit(stopping.run(lambda: print("went on", flush=True)))
"""
TURNED = """
import signal, sys
from wire import stopping

def work():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        raise ImportError("PyCapsule_Import could not import module") from None

stopping.listen()
sys.exit(stopping.run(work))
"""
IGNORED = """
import signal, sys, weakref
from wire import stopping

class Module:
    pass

def work():
    module = Module()
    watched = weakref.ref(module, lambda _: signal.raise_signal(signal.SIGINT))
    del module
    print("went on", flush=True)

stopping.listen()
sys.exit(stopping.run(work))
"""


@pytest.mark.parametrize(
    "program", [HEARD_LATE, TURNED, IGNORED], ids=["heard_late", "turned", "ignored"]
)
def test_a_ctrl_c_among_imports_ends_the_program(program, tmp_path):
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=SOON_S,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr


def test_a_program_that_is_being_imported_ends_at_once(tmp_path):
    for module in ("orchestrator.main", "edge_agent.main", "tools.export", "orchestrator.datasets"):
        # -v prints imports. Once our package is imported, signals are handled.
        with subprocess.Popen(
            [sys.executable, "-v", "-m", module, "--help"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            package = module.partition(".")[0]
            for line in process.stderr:
                if line.startswith(f"import '{package}' "):
                    break
            process.send_signal(signal.SIGINT)
            rest = process.stderr.read()
        assert process.returncode == 130, rest[-2000:]
        assert "Traceback" not in rest


INTERRUPTING = """
import os, signal, sys

class Interrupt:
    def find_spec(name, path, target=None):
        if name == "threading":  # `wire.stopping` needs it before it can listen
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt)
"""


@pytest.mark.parametrize("module", ["orchestrator.main", "edge_agent.main", "tools.export"])
def test_a_program_whose_first_modules_are_being_imported_ends_without_a_traceback(
    module, tmp_path
):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING)
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        capture_output=True,
        check=False,
        timeout=SOON_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.parametrize("times", [1, 2])
def test_doctor_ends_with_130_and_no_traceback(tmp_path, times):
    doctor = ("edge_agent.main", "doctor", "--config", "agent.toml")
    code, said = interrupted(tmp_path, "processor", *doctor, times=times)
    assert code == 130
    assert times == 2 or "stopping (Ctrl-C again ends at once)" in said


def test_an_agent_that_waits_for_its_broker_ends_well(tmp_path, digits):
    (tmp_path / "agent.toml").write_text(
        f'device = "pi"\nfleet = "fleet"\ndata = "{digits}/device-0.npz"\nstate = "state"\n'
        '[broker]\nurl = "mqtt://127.0.0.1:9"\n'
    )
    run = ("edge_agent.main", "run", "--config", "agent.toml")
    code, said = interrupted(tmp_path, "cannot be reached", *run)
    assert code == 0
    assert "go on with: python -m edge_agent.main run --config agent.toml" in said


def test_an_agent_does_not_read_all_its_photos_first(processes: Processes):
    for name in ("bolt", "nut"):
        folder = processes.folder / "images" / name
        folder.mkdir(parents=True)
        Image.effect_noise((1500, 1500), 50).save(folder / "0.jpg")
        for n in range(1, 300):
            os.link(folder / "0.jpg", folder / f"{n}.jpg")
    (processes.folder / "agent.toml").write_text(
        'device = "pi"\nfleet = "fleet"\ndata = "images"\nstate = "state"\n'
        '[broker]\nurl = "mqtt://127.0.0.1:9"\n'
    )
    agent = processes.start("pi", "edge_agent.main", "run", "--config", "agent.toml")
    lock = processes.folder / "state/lock"
    processes.wait_for("the agent's start", lambda: lock.exists() and bool(lock.read_text()))
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(SOON_S) == 0
    assert "stopping" in processes.log("pi")
    assert "600 images" not in processes.log("pi")


@pytest.mark.e2e
@pytest.mark.parametrize("any_broker", ["embedded"], indirect=True)
def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(
    processes: Processes, digits, any_broker
):
    fleet = Fleet(processes, digits, any_broker.url, rounds=2, epochs=6)
    fleet.start()
    processes.wait_for("training in round 2", lambda: fleet.reached("train", 2))
    for name in ("run", "agent-0"):
        processes.running[name].send_signal(signal.SIGINT)
    assert processes.running["run"].wait(SOON_S) == 130
    assert processes.running["agent-0"].wait(SOON_S) == 0
    said = processes.log("run")
    assert f"stopping; kept: 1 closed round in {fleet.folder}/runs/run" in said
    assert "go on with: python -m orchestrator.main start --config run.toml" in said
    assert "an order that is open is kept" in processes.log("agent-0")
    fleet.orchestrator()
    fleet.agent(0)
    check_every_round_counts_each_device_once(fleet.finish(), 2)


@pytest.mark.e2e
@pytest.mark.parametrize("any_broker", ["embedded"], indirect=True)
@pytest.mark.parametrize("times", [1, 2])
def test_an_aggregation_is_finished_by_the_first_and_left_by_the_second(
    processes: Processes, digits, any_broker, times
):
    fleet = Fleet(processes, digits, any_broker.url, rounds=2)
    path = fleet.folder / "run.toml"
    server = "epochs = 1\nbatch = 32\n"
    path.write_text(path.read_text().replace(server, "epochs = 30\nbatch = 32\n"))
    fleet.start()
    processes.wait_for("aggregation", lambda: "aggregating 3 results" in processes.log("run"))
    process = processes.running["run"]
    process.send_signal(signal.SIGINT)
    processes.wait_for("an answer", lambda: "which is aggregated first" in processes.log("run"))
    if times == 2:
        process.send_signal(signal.SIGINT)
    assert process.wait(180) == 130
    assert ("round 1 of 2: server" in processes.log("run")) == (times == 1)
    assert (fleet.folder / "runs/run/checkpoints/0001").exists() == (times == 1)


@pytest.mark.e2e
def test_a_demo_leaves_no_process_behind(tmp_path):
    demo = ("orchestrator.main", "demo", "--samples", "32", "--heldout-samples", "64")
    code, said = interrupted(tmp_path, "round 1 of", *demo, "--devices", "2", times=2)
    assert code == 130
    agents = str(tmp_path / "runs/demo/agents")
    deadline = time.monotonic() + SOON_S
    while any(agents in line for line in running()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(agents in line for line in running()), said


def running() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text().replace("\0", " "))
        except OSError:
            continue
    return found
