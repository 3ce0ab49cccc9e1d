"""Updates in a Debian 12 of this machine's architecture, booted with its own systemd.

It needs root, mmdebstrap and cgroup v2, and takes about ten minutes. The system runs in namespaces,
with the host's network; a power cut is a SIGKILL of all its processes.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from hardware import deb
from hardware import release as releasing
from orchestrator import broker
from tests.e2e.test_run import RUN
from tests.hardware.test_package import inside, run
from wire import __version__, release, signing

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
ARCH = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
# The container interface that systemd expects: https://systemd.io/CONTAINER_INTERFACE
BOOT = """
set -e
echo $$ > "$2/cgroup.procs"
exec unshare --mount --uts --ipc --pid --fork --kill-child --cgroup sh -ec '
mount --make-rprivate /
mount --bind "$1" "$1" && cd "$1"
mount -t proc proc proc
mount --bind proc/sys proc/sys && mount -o remount,ro,bind proc/sys
mount -t sysfs -o ro sysfs sys && mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run && mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do
    touch dev/$name && mount --bind /dev/$name dev/$name
done
mkdir dev/shm dev/pts && mount -t tmpfs tmpfs dev/shm && touch dev/console
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts && ln -s pts/ptmx dev/ptmx
mkdir -p old && pivot_root . old && umount -l old
exec setpriv --bounding-set=-sys_time,-sys_module,-sys_rawio,-syslog \
    env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin /sbin/init' sh "$1"
"""


class Device:
    """A root file system, and the system that runs in it while its power is on."""

    def __init__(self, root: Path, url: str) -> None:
        self.root, self.url = root, url
        self.cache, self.staged = root / "var/cache/stillhouse", root / "var/lib/stillhouse/update"
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        groups = next(Path(mount[1]) for mount in mounts if mount[2] == "cgroup2")
        self.group = groups / f"stillhouse-{os.getpid()}-{root.parent.name}"
        self.power: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        self.group.mkdir()
        with (self.root.parent / "boot.log").open("ab") as log:
            self.power = subprocess.Popen(
                ["sh", "-c", BOOT, "sh", str(self.root), str(self.group)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def cut_power(self) -> None:
        """Kill all processes of the device at once."""
        if self.power is None:
            return
        self.power.kill()
        self.power.wait()
        self.power = None
        empty = self.group / "cgroup.events"
        wait_for("the end of all", lambda: "populated 0" in empty.read_text(), str)
        for folder, _, _ in os.walk(self.group, topdown=False):
            Path(folder).rmdir()

    def do(self, *command: str) -> str:
        """The output of a command that is run on the device."""
        first = (self.group / "init.scope/cgroup.procs").read_text().split()[0]
        spaces = ("--mount", "--uts", "--ipc", "--pid", "--cgroup")
        return run("nsenter", "--target", first, *spaces, *command)

    def wait_for(self, what, condition, timeout_s=240.0):
        wait_for(what, condition, self.logs, timeout_s)

    def logs(self) -> str:
        """The log of the package's units since the first boot."""
        units = [f"--unit={name}" for name in deb.UNITS]
        command = ("journalctl", "--directory=/var/log/journal", "--output=cat", *units)
        return run(*inside(self.root, *command))

    def version(self) -> str:
        return run(*inside(self.root, "dpkg-query", "-W", "-f", "${Version}", deb.NAME))

    def idle(self) -> bool:
        """Whether no update is under way."""
        return not (self.staged / "ready").exists() and not (self.cache / "update.json").exists()


def wait_for(what, condition, logs, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {timeout_s:g} s\n{logs()[-4000:]}")
        time.sleep(0.1)


def derived(package: Path, version: str, out: Path, breaks: str = "") -> Path:
    """The same package with a later version, and with one broken file if `breaks` names one."""
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
    """The package, later ones that work, and two with a broken agent or a broken script."""
    out = tmp_path_factory.mktemp("dist")
    first = deb.build(ARCH, "3.11", out)
    return {
        "0.1": first,
        "anew": derived(first, f"{__version__}+py311.1", out),
        "0.2": derived(first, "0.2.0+py311", out),
        "0.3": derived(first, "0.3.0+py311", out, breaks="edge_agent/agent.py"),
        "0.4": derived(first, "0.4.0+py311", out, breaks="DEBIAN/postinst"),
    }


@pytest.fixture(scope="module")
def empty_root(tmp_path_factory):
    wanted = ["mmdebstrap", "unshare", "setpriv", "dpkg-deb"]
    if os.geteuid() != 0 or not all(map(shutil.which, wanted)):
        pytest.skip("wants root, and: apt install mmdebstrap")
    if "cgroup2" not in Path("/proc/mounts").read_text():
        pytest.skip("wants control groups, version 2")
    path = tmp_path_factory.mktemp("debian") / "root"
    run("mmdebstrap", f"--architectures={ARCH}", "--variant=apt",
        "--include=python3.11,adduser,systemd-sysv", "bookworm", str(path))  # fmt: skip
    (path / "etc/machine-id").write_text("5711" * 8 + "\n")
    (path / "etc/systemd/system/console-getty.service").symlink_to("/dev/null")
    return path


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return signing.own_key(tmp_path_factory.mktemp("operator") / "release.pem")


@pytest.fixture
def device(tmp_path, empty_root, packages, key, digits):
    """A running device with the first package, and a broker for it."""
    root = tmp_path / "root"
    run("cp", "-a", str(empty_root), str(root))
    shutil.copy(digits / "device-0.npz", root / "srv/images.npz")
    (root / "srv/images.npz").chmod(0o644)
    settings = root / "etc/stillhouse/agent.toml"
    settings.parent.mkdir()
    shutil.copy(packages["0.1"], root / "root/agent.deb")
    run(*inside(root, "dpkg", "--install", "/root/agent.deb"))
    with broker.start("embedded", folder=tmp_path / "broker", fleet="fleet", port=0) as running:
        settings.write_text(AGENT.format(key=signing.public(key), url=running.url, minutes=1))
        settings.chmod(0o644)
        made = Device(root, running.url)
        made.boot()
        try:
            made.wait_for("the agent at work", lambda: "connected to" in made.logs())
            yield made
        finally:
            made.cut_power()


def stage(device: Device, package: Path, key, content: Path | None = None) -> None:
    """Stage a package as the agent does after its pull; `content` replaces the package file."""
    owner = (device.root / "var/lib/stillhouse").stat()
    device.staged.mkdir(exist_ok=True)
    os.chown(device.staged, owner.st_uid, owner.st_gid)
    shutil.copy(content or package, device.staged / "package.deb")
    signed = release.sign(key, releasing.describe(package))
    (device.staged / "release.json").write_bytes(release.dump(signed))
    (device.staged / "ready").touch()


def kept(device: Device) -> list[str]:
    return sorted(path.name for path in device.cache.iterdir()) if device.cache.exists() else []


def test_a_package_is_installed_and_stays_when_its_agent_is_well(device, packages, key):
    stage(device, packages["0.2"], key)
    device.wait_for("health", lambda: "update: 0.2.0+py311 is well" in device.logs())
    device.wait_for("the end", device.idle)
    assert kept(device) == ["install.py", "old.deb"]
    assert run(*inside(device.root, "dpkg", "--verify", deb.NAME)) == ""
    healthy = json.loads((device.staged / "healthy").read_text())
    assert healthy["version"] == "0.2.0+py311"
    # The package for the rollback is like the first one.
    old = device.cache / "old.deb"
    for package in (old, packages["0.1"]):
        run("dpkg-deb", "--raw-extract", str(package), str(device.root / "root" / package.name))
    first, again = (device.root / "root" / p.name for p in (packages["0.1"], old))
    run("diff", "--recursive", "--no-dereference", str(first / "opt"), str(again / "opt"))
    for name in ("control", "postinst", "prerm", "postrm", "md5sums"):  # dpkg orders fields anew
        one, other = ((tree / "DEBIAN" / name).read_text() for tree in (first, again))
        assert sorted(one.splitlines()) == sorted(other.splitlines()), name


@pytest.mark.parametrize(
    ("package", "reason"),
    [("0.3", "not healthy in 1 minutes"), ("0.4", "cannot be installed: ")],
)
def test_what_does_not_work_is_rolled_back_and_refused(device, packages, key, package, reason):
    stage(device, packages[package], key)
    device.wait_for("the way back", device.idle)
    assert device.version() == "0.1.0+py311"
    (told,) = json.loads((device.cache / "refused.json").read_text()).values()
    assert reason in told
    device.wait_for("the old agent at work", lambda: device.logs().count("connected to") > 1)
    assert run(*inside(device.root, "dpkg", "--verify", deb.NAME)) == ""
    stage(device, packages[package], key)
    device.wait_for("a refusal", lambda: "was refused before" in device.logs())
    assert device.version() == "0.1.0+py311"


def test_root_installs_nothing_on_the_word_of_the_agent_alone(device, packages, key, tmp_path):
    settings = device.root / "etc/stillhouse/agent.toml"
    stage(device, packages["0.2"], signing.own_key(tmp_path / "other.pem"))
    device.wait_for("a refusal", lambda: "this is not signed by" in device.logs())
    device.wait_for("its end", device.idle)
    assert not {"ready", "package.deb", "release.json"} & {
        path.name for path in device.staged.iterdir()
    }
    settings.chmod(0o666)  # the agent could have put its own key there
    stage(device, packages["0.2"], key)
    device.wait_for("a refusal", lambda: "can be written by others than root" in device.logs())
    device.wait_for("its end", device.idle)
    settings.chmod(0o644)
    stage(device, packages["0.2"], key, content=packages["0.3"])
    device.wait_for("a refusal", lambda: "package.deb: expected" in device.logs())
    device.wait_for("its end", device.idle)
    assert (device.version(), kept(device)) == ("0.1.0+py311", ["last.json"])
    device.do("dpkg", "--purge", deb.NAME)
    assert run("find", str(device.root), "-xdev", "-iname", "*stillhouse*") == ""


@pytest.mark.parametrize("moment", ["dpkg", "wait", "rollback"])
def test_a_power_cut_is_no_more_than_a_pause(device, packages, key, moment):
    stage(device, packages["0.3" if moment == "rollback" else "0.2"], key)
    state = device.cache / "update.json"

    def at(step: str) -> bool:
        return state.exists() and json.loads(state.read_text())["step"] == step

    if moment == "dpkg":
        # dpkg unpacks all new files beside the old ones, then renames them.
        unpacked = device.root / "opt/stillhouse/bin/edge-agent.dpkg-new"
        device.wait_for("dpkg at work", unpacked.exists)
    else:
        device.wait_for(moment, lambda: at(moment))
    device.cut_power()
    assert state.exists()
    device.boot()
    device.wait_for("the end", device.idle)
    expected = "0.1.0+py311" if moment == "rollback" else "0.2.0+py311"
    assert device.version() == expected
    assert run(*inside(device.root, "dpkg", "--audit")) == ""
    assert run(*inside(device.root, "dpkg", "--verify", deb.NAME)) == ""


def test_a_device_is_updated_by_the_orchestrator_in_the_middle_of_a_run(
    device, packages, key, digits, processes
):
    """The whole update: told over the broker, pulled, staged, installed; then a new birth."""
    anew = f"{__version__}+py311.1"  # not newer than the orchestrator
    signed = processes.folder / packages["anew"].name
    shutil.copy(packages["anew"], signed)
    release.beside(signed).write_bytes(release.dump(release.sign(key, releasing.describe(signed))))
    text = RUN.format(
        strategy="fedavg", rounds=200, digits=digits, url=device.url, model="caldas_cnn", epochs=1
    ).replace("min_devices = 3", "min_devices = 1")
    text += f'[release]\nkey = "{signing.public(key)}"\npackages = ["{signed.name}"]\n'
    (processes.folder / "run.toml").write_text(text)
    processes.start("run", "orchestrator.main", "start", "--config", "run.toml")
    status = processes.folder / "runs/run/status.json"

    def package() -> str:
        devices = json.loads(status.read_text())["devices"] if status.exists() else {}
        return str(devices.get("pi", {}).get("package", ""))

    device.wait_for("birth", lambda: package() == "0.1.0+py311")
    device.wait_for("birth with the new one", lambda: package() == anew)
    device.wait_for("health", device.idle)
    assert f"pi is told of {anew}" in processes.log("run")
    device.wait_for("its word", lambda: "is well" in device.logs())
    rounds = json.loads(status.read_text())["round"]
    device.wait_for(
        "rounds with the new one", lambda: json.loads(status.read_text())["round"] > rounds + 1
    )
    history = json.loads(status.read_text())["history"]
    assert all(entry["devices"]["pi"]["accepted"] for entry in history)
