"""Updates in a Debian 12 of this machine's architecture: installed by the package's own service.

It wants root and mmdebstrap, and takes some ten minutes. systemd does not run there: `Init` stands
in for what it does about the two services, by what their unit files say.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hardware import deb
from hardware import release as releasing
from orchestrator import broker
from tests.e2e.test_run import RUN
from tests.hardware.test_package import inside, run
from wire import release, signing

pytestmark = pytest.mark.hardware

AGENT = """\
device = "pi"
fleet = "fleet"
data = "/srv/images.npz"
state = "/var/lib/stillhouse/state"
threads = 1
retry_s = 2.0
release_key = "{key}"
update_minutes = {minutes}
[broker]
url = "{url}"
"""
SYSTEMCTL = '#!/bin/sh\necho "$@" >> /run/systemctl\n'
ARCH = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]


class Init:
    """What systemd does about the package's units in a root file system."""

    def __init__(self, root: Path) -> None:
        self.root, self.url, self.done = root, "", 0
        self.agent: subprocess.Popen[bytes] | None = None
        self.installer: subprocess.Popen[bytes] | None = None
        (root / "run/systemd/system").mkdir(parents=True, exist_ok=True)
        systemctl = root / "usr/bin/systemctl"
        systemctl.write_text(SYSTEMCTL)
        systemctl.chmod(0o755)
        for name in ("systemctl", "update.log", "agent.log"):
            (root / "run" / name).touch()

    def turn(self) -> None:
        """Do what is due: start the agent again where it was told so, and the update by paths."""
        words = (self.root / "run/systemctl").read_text().splitlines()
        if any("restart stillhouse-edge-agent.service" in line for line in words[self.done :]):
            self.restart_agent()
        self.done = len(words)
        units = self.root / "usr/lib/systemd/system"
        if self.installer is not None and self.installer.poll() is None:
            return
        watched = re.findall(r"PathExists=/(.*)", (units / "stillhouse-update.path").read_text())
        if any((self.root / path).exists() for path in watched):
            self.update(units / "stillhouse-update.service")

    def update(self, unit: Path) -> None:
        """Start the update with the capabilities, and without the network, as the unit says."""
        text = unit.read_text()
        (capabilities,) = re.findall(r"CapabilityBoundingSet=(.*)", text)
        (command,) = re.findall(r"ExecStart=(.*)", text)
        kept = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in capabilities.split())
        assert "PrivateNetwork=yes" in text
        limited = ["setpriv", f"--bounding-set=-all,{kept}", f"--inh-caps=-all,{kept}",
                   "--no-new-privs", command]  # fmt: skip
        with (self.root / "run/update.log").open("ab") as log:
            self.installer = subprocess.Popen(
                ["unshare", "--net", *inside(self.root, *limited)],
                stdout=log, stderr=log, env={"PATH": os.environ["PATH"]}, start_new_session=True,
            )  # fmt: skip

    def restart_agent(self) -> None:
        self.stop_agent()
        user = ["setpriv", "--reuid=stillhouse", "--regid=stillhouse", "--clear-groups"]
        command = ["/usr/bin/edge-agent", "run", "--config", "/etc/stillhouse/agent.toml"]
        with (self.root / "run/agent.log").open("ab") as log:
            self.agent = subprocess.Popen(
                inside(self.root, *user, *command), stdout=log, stderr=log
            )

    def stop_agent(self) -> None:
        if self.agent is not None:
            self.agent.terminate()
            self.agent.wait(20)
            self.agent = None

    def cut_power(self) -> None:
        """Everything ends at once."""
        if self.installer is not None and self.installer.poll() is None:
            # dpkg and its scripts are in the session that the service began.
            os.killpg(self.installer.pid, signal.SIGKILL)
            self.installer.wait()
        if self.agent is not None:
            self.agent.kill()
            self.agent.wait()
        self.installer = self.agent = None

    def wait_for(self, what, condition, timeout_s=240.0):
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not within {timeout_s:g} s\n{self.logs()}")
            self.turn()
            time.sleep(0.1)

    def logs(self) -> str:
        names = ("run/update.log", "run/agent.log")
        return "\n".join((self.root / n).read_text()[-3000:] for n in names)

    def version(self) -> str:
        return run(*inside(self.root, "dpkg-query", "-W", "-f", "${Version}", deb.NAME))

    def idle(self) -> bool:
        """Whether no update is under way."""
        there = (self.root / "var/cache/stillhouse/update.json").exists()
        running = self.installer is not None and self.installer.poll() is None
        return not there and not running


def derived(package: Path, version: str, out: Path, breaks: str = "") -> Path:
    """The same package with a later version, and with a file of it that does not work."""
    tree = out / "tree"
    run("dpkg-deb", "--raw-extract", str(package), str(tree))
    old = run("dpkg-deb", "--field", str(package), "Version").strip()
    for name in ("DEBIAN/control", "opt/stillhouse/package.json"):
        (tree / name).write_text((tree / name).read_text().replace(old, version))
    if breaks:
        (found,) = tree.rglob(breaks)
        found.write_text("raise SystemExit('this version is broken')\n" + found.read_text())
    sums = tree / "DEBIAN/md5sums"
    listed = [line.split("  ", 1)[1] for line in sums.read_text().splitlines()]
    sums.write_text(run("md5sum", *listed, cwd=tree))
    path = out / f"{deb.NAME}_{version}_{ARCH}.deb"
    run("dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", str(tree), str(path))
    shutil.rmtree(tree)
    return path


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The package, two later ones that work, and two that do not: the agent, a script."""
    out = tmp_path_factory.mktemp("dist")
    first = deb.build(ARCH, "3.11", out)
    return {
        "0.1": first,
        "0.2": derived(first, "0.2.0+py311", out),
        "0.3": derived(first, "0.3.0+py311", out, breaks="edge_agent/agent.py"),
        "0.4": derived(first, "0.4.0+py311", out, breaks="DEBIAN/postinst"),
    }


@pytest.fixture(scope="module")
def empty_root(tmp_path_factory):
    wanted = ["mmdebstrap", "unshare", "setpriv", "dpkg-deb"]
    if os.geteuid() != 0 or not all(map(shutil.which, wanted)):
        pytest.skip("wants root, and: apt install mmdebstrap")
    path = tmp_path_factory.mktemp("debian") / "root"
    run("mmdebstrap", f"--architectures={ARCH}", "--variant=apt",
        "--include=python3.11,adduser", "bookworm", str(path))  # fmt: skip
    return path


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return signing.own_key(tmp_path_factory.mktemp("operator") / "release.pem")


@pytest.fixture
def init(tmp_path, empty_root, packages, key, digits):
    """A device with the first package, its agent at work, and a broker."""
    root = tmp_path / "root"
    run("cp", "-a", str(empty_root), str(root))
    shutil.copy(digits / "device-0.npz", root / "srv/images.npz")
    (root / "srv/images.npz").chmod(0o644)
    made = Init(root)
    settings = root / "etc/stillhouse/agent.toml"
    settings.parent.mkdir(mode=0o755)
    shutil.copy(packages["0.1"], root / "root/agent.deb")
    with broker.start("embedded", folder=tmp_path / "broker", fleet="fleet", port=0) as running:
        made.url = running.url
        settings.write_text(AGENT.format(key=signing.public(key), url=running.url, minutes=1))
        settings.chmod(0o644)
        run(*inside(root, "dpkg", "--install", "/root/agent.deb"))
        yield made
        made.cut_power()


def stage(init: Init, package: Path, key) -> None:
    """What the agent does when it has pulled a package."""
    folder = init.root / "var/lib/stillhouse/update"
    folder.mkdir(exist_ok=True)
    owner = (init.root / "var/lib/stillhouse").stat()
    os.chown(folder, owner.st_uid, owner.st_gid)
    shutil.copy(package, folder / "package.deb")
    (folder / "release.json").write_bytes(
        release.dump(release.sign(key, releasing.describe(package)))
    )
    (folder / "ready").touch()


def kept(init: Init) -> list[str]:
    return sorted(path.name for path in (init.root / "var/cache/stillhouse").iterdir())


def test_a_package_is_installed_and_stays_when_its_agent_is_well(init, packages, key):
    stage(init, packages["0.2"], key)
    init.wait_for("0.2.0", lambda: init.version().startswith("0.2.0") and init.idle())
    assert "update: 0.2.0+py311 is well" in init.logs()
    assert kept(init) == ["install.py", "old.deb"]
    assert run(*inside(init.root, "dpkg", "--verify", deb.NAME)) == ""
    healthy = json.loads((init.root / "var/lib/stillhouse/update/healthy").read_text())
    assert healthy["version"] == "0.2.0+py311"
    # The way back is a package like the first one.
    old = init.root / "var/cache/stillhouse/old.deb"
    for package in (old, packages["0.1"]):
        run("dpkg-deb", "--raw-extract", str(package), str(init.root / "root" / package.name))
    first, again = (init.root / "root" / p.name for p in (packages["0.1"], old))
    run("diff", "--recursive", "--no-dereference", str(first / "opt"), str(again / "opt"))
    for name in ("control", "postinst", "prerm", "postrm", "md5sums"):  # dpkg orders fields anew
        one, other = ((tree / "DEBIAN" / name).read_text() for tree in (first, again))
        assert sorted(one.splitlines()) == sorted(other.splitlines()), name


@pytest.mark.parametrize(
    ("package", "reason"),
    [("0.3", "not healthy in 1 minutes"), ("0.4", "cannot be installed: ")],
)
def test_what_does_not_work_is_rolled_back_and_refused(init, packages, key, package, reason):
    stage(init, packages[package], key)
    init.wait_for("an update", lambda: not init.idle())
    init.wait_for("the way back", init.idle)
    assert init.version() == "0.1.0+py311"
    (told,) = json.loads((init.root / "var/cache/stillhouse/refused.json").read_text()).values()
    assert reason in told
    init.wait_for("the old agent at work", lambda: init.logs().count("connected to") >= 1)
    assert run(*inside(init.root, "dpkg", "--verify", deb.NAME)) == ""
    stage(init, packages[package], key)
    init.wait_for("a refusal", lambda: "was refused before" in init.logs())
    assert init.version() == "0.1.0+py311"


def test_root_installs_nothing_on_the_word_of_the_agent_alone(init, packages, key, tmp_path):
    folder = init.root / "var/lib/stillhouse/update"
    settings = init.root / "etc/stillhouse/agent.toml"
    stage(init, packages["0.2"], signing.own_key(tmp_path / "other.pem"))
    init.wait_for("a refusal", lambda: "this is not signed by" in init.logs())
    init.wait_for("its end", init.idle)
    assert not {"ready", "package.deb", "release.json"} & {path.name for path in folder.iterdir()}
    settings.chmod(0o666)  # the agent could have put its own key there
    stage(init, packages["0.2"], key)
    init.wait_for("a refusal", lambda: "can be written by others than root" in init.logs())
    init.wait_for("its end", init.idle)
    settings.chmod(0o644)
    stage(init, packages["0.2"], key)
    shutil.copy(packages["0.3"], folder / "package.deb")
    init.wait_for("a refusal", lambda: "package.deb: expected" in init.logs())
    init.wait_for("its end", init.idle)
    assert (init.version(), kept(init)) == ("0.1.0+py311", [])
    init.stop_agent()
    run(*inside(init.root, "dpkg", "--purge", deb.NAME))
    assert run("find", str(init.root), "-xdev", "-iname", "*stillhouse*") == ""


@pytest.mark.parametrize("moment", ["dpkg", "wait", "rollback"])
def test_a_power_cut_is_no_more_than_a_pause(init, packages, key, moment):
    stage(init, packages["0.3" if moment == "rollback" else "0.2"], key)
    state = init.root / "var/cache/stillhouse/update.json"

    def at(step: str) -> bool:
        return state.exists() and json.loads(state.read_text())["step"] == step

    if moment == "dpkg":
        # dpkg unpacks all files beside the old ones, then gives them their names.
        unpacked = init.root / "opt/stillhouse/bin/edge-agent.dpkg-new"
        init.wait_for("dpkg at work", unpacked.exists)
    else:
        init.wait_for(moment, lambda: at(moment))
    init.cut_power()
    assert state.exists()
    init.restart_agent()  # as at boot
    init.wait_for("the end", init.idle)
    expected = "0.1.0+py311" if moment == "rollback" else "0.2.0+py311"
    assert init.version() == expected
    assert run(*inside(init.root, "dpkg", "--audit")) == ""
    assert run(*inside(init.root, "dpkg", "--verify", deb.NAME)) == ""


def test_a_device_is_updated_by_the_orchestrator_in_the_middle_of_a_run(
    init, packages, key, digits, processes
):
    """All of it: told over the broker, pulled, staged, installed, born again with the new one."""
    signed = processes.folder / packages["0.2"].name
    shutil.copy(packages["0.2"], signed)
    release.beside(signed).write_bytes(release.dump(release.sign(key, releasing.describe(signed))))
    text = RUN.format(
        strategy="fedavg", rounds=200, digits=digits, url=init.url, model="caldas_cnn", epochs=1
    ).replace("min_devices = 3", "min_devices = 1")
    text += f'[release]\nkey = "{signing.public(key)}"\npackages = ["{signed.name}"]\n'
    (processes.folder / "run.toml").write_text(text)
    init.restart_agent()
    processes.start("run", "orchestrator.main", "start", "--config", "run.toml")
    status = processes.folder / "runs/run/status.json"

    def package() -> str:
        devices = json.loads(status.read_text())["devices"] if status.exists() else {}
        return str(devices.get("pi", {}).get("package", ""))

    init.wait_for("birth", lambda: package() == "0.1.0+py311")
    init.wait_for("birth with 0.2.0", lambda: package() == "0.2.0+py311")
    init.wait_for("health", init.idle)
    assert "pi is told of 0.2.0+py311" in processes.log("run")
    assert "is well" in init.logs()
    rounds = json.loads(status.read_text())["round"]
    init.wait_for("rounds with 0.2.0", lambda: json.loads(status.read_text())["round"] > rounds + 1)
    history = json.loads(status.read_text())["history"]
    assert all(entry["devices"]["pi"]["accepted"] for entry in history)
