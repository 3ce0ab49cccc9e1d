"""The Debian package in an arm64 system under emulation: installed, at work, purged.

`make test-hardware` runs this; it takes about ten minutes. It needs root, mmdebstrap and
qemu-user-static with binfmt_misc, which runs arm64 programs under emulation.
"""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from hardware import deb
from orchestrator.config import load
from orchestrator.simulation import simulate
from tests.e2e.test_run import AGENT, Fleet, check_every_round_counts_each_device_once
from wire import measurement

pytestmark = pytest.mark.hardware

ENTER = 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'


def run(*command, timeout_s=900, **more):
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout_s, **more
    )
    assert done.returncode == 0, f"{command[0]}: {done.stderr[-2000:]}"
    return done.stdout


def inside(root, *command):
    """The command line that runs `command` in a root file system with its own /proc."""
    return ["unshare", "--mount", "sh", "-c", ENTER, str(root), *command]


def emulation(*tools):
    """Skip the test unless arm64 programs run here and these tools are installed."""
    missing = [tool for tool in (*tools, "qemu-aarch64-static") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"wants root, and: apt install mmdebstrap qemu-user-static binfmt-support "
                    f"qemu-system-arm fdisk mtools e2fsprogs; missing: {missing}")  # fmt: skip
    binfmt = Path("/proc/sys/fs/binfmt_misc")
    if not (binfmt / "status").exists():
        run("mount", "-t", "binfmt_misc", "binfmt_misc", str(binfmt))
    if not (binfmt / "qemu-aarch64").exists():
        run("update-binfmts", "--enable", "qemu-aarch64")


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    return {arch: deb.build(arch, "3.11", out) for arch in deb.MACHINES}


@pytest.fixture(scope="module")
def root(tmp_path_factory, packages):
    """Debian 12 for arm64 with the package."""
    emulation("mmdebstrap", "unshare")
    path = tmp_path_factory.mktemp("arm64") / "root"
    run("mmdebstrap", "--architectures=arm64", "--variant=apt",
        "--include=python3.11,adduser", "bookworm", str(path))  # fmt: skip
    shutil.copy(packages["arm64"], path / "root/agent.deb")
    run(*inside(path, "dpkg", "--install", "/root/agent.deb"))
    return path


@pytest.mark.parametrize("arch", deb.MACHINES)
def test_lintian_finds_no_error(packages, arch):
    if shutil.which("lintian") is None:
        pytest.skip("lintian is not installed: sudo apt install lintian")
    told = run("lintian", "--allow-root", "--fail-on", "error", str(packages[arch]))
    assert "E: " not in told


def test_it_is_small_and_the_files_are_whole(root):
    fields = run(*inside(root, "dpkg-query", "-W", "-f", "${Installed-Size}", deb.NAME))
    assert 50_000 < int(fields) < 150_000  # kB
    assert run(*inside(root, "dpkg", "--verify", deb.NAME)) == ""
    assert run(*inside(root, "edge-agent", "--version")).startswith("edge-agent ")
    assert (root / "opt/stillhouse/share/stillhouse/resnet8/manifest.json").exists()
    owner = run(*inside(root, "stat", "-c", "%U:%G %a", "/etc/stillhouse", "/var/lib/stillhouse"))
    assert owner == "root:stillhouse 750\nstillhouse:stillhouse 750\n"


def test_it_measures_itself_and_signs_what_it_found(root):
    """A board can be measured as soon as the package is installed, without settings or a run."""
    told = "/var/lib/stillhouse/measured.json"
    command = f"edge-agent measure --threads 1 --steps 2 --json {told}"
    run(*inside(root, "su", "-s", "/bin/sh", "stillhouse", "-c", command))
    measured = measurement.verify((root / told[1:]).read_bytes(), where=told)
    assert measured.platform.machine == "aarch64"
    assert measured.artifact.model.name == "resnet8"
    assert measured.artifact.step_flops > 32 * 2.9 * 19.24e6  # forward pass and both gradients
    assert all(layer.seconds > 0 for layer in measured.layers if layer.flops)


def test_a_round_of_fedgkt_with_an_arm64_device_is_the_simulated_one(
    root, processes, digits, any_broker
):
    """Two agents of this machine and one from the package get the numbers of PyTorch."""
    fleet = Fleet(processes, digits, any_broker.url, rounds=2)
    toml = fleet.folder / "run.toml"
    toml.write_text(toml.read_text().replace("deadline_s = 1000.0", "deadline_s = 600.0"))
    home = root / "var/lib/stillhouse"
    shutil.rmtree(home / "state", ignore_errors=True)
    shutil.copy(digits / "device-2.npz", home / "device-2.npz")
    settings = AGENT.format(digits="/var/lib/stillhouse", url=any_broker.url, n=2)
    settings = settings.replace('"state-2"', '"/var/lib/stillhouse/state"')
    kit = root / "etc/stillhouse/agent.toml"
    kit.write_text(settings)
    run(*inside(root, "chown", "root:stillhouse", "/etc/stillhouse/agent.toml"))
    kit.chmod(0o640)
    run(*inside(root, "chown", "-R", "stillhouse:", "/var/lib/stillhouse"))
    fleet.orchestrator()
    fleet.agent(0)
    fleet.agent(1)
    agent = "exec /usr/bin/edge-agent run --config /etc/stillhouse/agent.toml"
    with (fleet.folder / "agent-2.log").open("wb") as log:
        processes.running["agent-2"] = subprocess.Popen(
            inside(root, "su", "-s", "/bin/sh", "stillhouse", "-c", agent), stdout=log, stderr=log
        )
    process = processes.running["run"]
    processes.wait_for("end of the run", lambda: process.poll() is not None, 600.0)
    report = fleet.report()
    check_every_round_counts_each_device_once(report, 2)
    assert run(*inside(root, "uname", "-m")) == "aarch64\n"
    simulated = replace(load(toml), runs=fleet.folder / "simulated")
    expected = simulate.run(simulated, digits).entries
    for entry, same in zip(report["rounds"], expected, strict=True):
        real, torchs = (e["devices"]["device-2"] for e in (entry, same))
        assert real["train_loss"] == pytest.approx(torchs["train_loss"], rel=0.03)


def test_purge_leaves_nothing_but_the_images(root):
    home = root / "var/lib/stillhouse"
    (home / "state").mkdir(exist_ok=True)
    (home / "mine.npz").touch()
    run(*inside(root, "dpkg", "--purge", deb.NAME))
    for path in ("opt/stillhouse", "etc/stillhouse", "usr/bin/edge-agent"):
        assert not (root / path).exists(), path
    assert "stillhouse" not in (root / "etc/passwd").read_text()
    assert (home / "mine.npz").exists()
    assert not (home / "state").exists()
    shutil.rmtree(home)
    left = run("find", str(root), "-xdev", "-iname", "*stillhouse*")
    assert left == ""
