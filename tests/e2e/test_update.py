"""A signed package on its way to a real agent: pulled between orders, checked, staged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hardware import release as releasing
from tests.conftest import ROOT, Processes
from tests.e2e.test_run import AGENT, RUN
from wire import release, signing

NEWER = "0.1.0+py311.1"  # not newer than the orchestrator, which would refuse it
OWN = {"version": "0.1.0", "architecture": "amd64", "python": "3.11"}


def package(folder: Path, version: str) -> Path:
    """A small package with the agent's name."""
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True, exist_ok=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {release.NAME}\nVersion: {version}\nArchitecture: amd64\n"
        "Maintainer: Test <test@example.org>\nDepends: python3.11\nDescription: a test\n"
    )
    (tree / "content").write_bytes(bytes(range(256)) * 4000)
    path = folder / f"{version}.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def environment(folder: Path) -> Path:
    """The interpreter of a Python environment that names the package to which it belongs."""
    site = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (folder / site).mkdir(parents=True)
    own = Path(sys.prefix) / site
    (folder / site / "all.pth").write_text(f"{ROOT}\n{own}\n")
    (folder / "bin").mkdir()
    base = Path(sys._base_executable)
    (folder / "bin/python3").symlink_to(base)
    (folder / "pyvenv.cfg").write_text(f"home = {base.parent}\n")
    (folder / "package.json").write_text(json.dumps(OWN))
    return folder / "bin/python3"


@pytest.mark.e2e
def test_an_agent_stages_a_newer_signed_package_and_refuses_one_of_another_key(
    processes: Processes, digits, any_broker, monkeypatch
):
    folder = processes.folder
    deb = package(folder, NEWER)
    assert releasing.main([str(deb), "--key", str(folder / "release.pem")]) == 0
    key = signing.public(signing.own_key(folder / "release.pem"))
    other = signing.public(signing.own_key(folder / "other.pem"))
    text = RUN.format(
        strategy="fedavg", rounds=2, digits=digits, url=any_broker.url, model="caldas_cnn", epochs=1
    )
    run = f'{text}[release]\nkey = "{key}"\npackages = ["{deb.name}"]\n'
    (folder / "run.toml").write_text(run)
    own_python = str(environment(folder / "environment"))

    def agent(n: int, trusted: str) -> None:
        settings = AGENT.format(digits=digits, url=any_broker.url, n=n)
        own = f'updates = "update-{n}"\nupdates_kept = "kept"\nrelease_key = "{trusted}"\n'
        (folder / f"agent-{n}.toml").write_text(settings.replace("[broker]", f"{own}[broker]"))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", own_python)
            processes.start(f"agent-{n}", "edge_agent.main", "run", "--config", f"agent-{n}.toml")

    def told() -> dict:
        """The orchestrator's status of each device."""
        try:
            return json.loads((folder / "runs/run/status.json").read_text())["devices"]
        except FileNotFoundError:
            return {}

    agent(0, key)
    agent(1, other)
    process = processes.start("run", "orchestrator.main", "start", "--config", "run.toml")
    processes.wait_for("the package", (folder / "update-0/ready").exists)
    processes.wait_for("the refusal", lambda: told().get("device-1", {}).get("update"))
    agent(2, key)  # a round begins with three, so the other two had no work until here
    assert (folder / "update-0/package.deb").read_bytes() == deb.read_bytes()
    staged = release.parse((folder / "update-0/release.json").read_bytes(), "")
    assert staged.package.version == NEWER
    processes.wait_for("the end of the run", lambda: process.poll() is not None)
    report = json.loads((folder / "runs/run/report.json").read_text())
    devices = [device for entry in report["rounds"] for device in entry["devices"].values()]
    assert len(devices) == 6
    assert all(device["accepted"] for device in devices)
    # An agent writes a file here once it is up for ten seconds; the run may have ended sooner.
    assert {path.name for path in (folder / "update-1").glob("*")} <= {"healthy", "up"}
    status = told()
    assert [status[f"device-{n}"]["package"] for n in range(2)] == ["0.1.0", "0.1.0"]
    assert status["device-0"]["update"] == ""
    assert status["device-1"]["update"].endswith(f"this is not signed by {other}")
