"""An image is built, personalized and booted; the emulated board joins and does a round.

`make boot-test` runs this. It takes about twenty minutes, most of them to install Debian with
emulated arm64 programs. It needs root, mmdebstrap, qemu-user-static with binfmt_misc, and
qemu-system-arm. The base is a Debian 12 for arm64 in the layout of Raspberry Pi OS, with a kernel
for QEMU's machine `virt`; only firmware and drivers differ from a Raspberry Pi.
"""

import os
import shutil
import socket
import subprocess

import numpy as np
import pytest
from PIL import Image

from hardware import deb
from hardware.image.__main__ import main
from hardware.image.disk import open_disk
from orchestrator.main import app
from tests.hardware import images
from tests.hardware.test_package import emulation

pytestmark = pytest.mark.hardware

PACKAGES = "python3.11,adduser,systemd-sysv,udev,apt,kmod,iproute2,linux-image-arm64"
# An initial file system with only these is packed in a tenth of the time.
MODULES = (
    'mkdir -p "$1/etc/initramfs-tools/conf.d"; '
    'echo MODULES=list > "$1/etc/initramfs-tools/conf.d/small"; '
    "printf '%s\\n' virtio_pci virtio_blk ext4 > \"$1/etc/initramfs-tools/modules\""
)
RUN = """\
name = "run"
fleet = "mill"
rounds = 1
heldout = "{digits}/heldout.npz"
[broker]
kind = "mosquitto"
port = {port}
[cohort]
min_devices = 1
deadline_s = 1200.0
[device]
model = "resnet8"
classes = 10
batch = 16
[server]
model = "resnet10"
epochs = 1
batch = 32
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory, digits):
    """The image, and the kernel and initial file system that boot it."""
    emulation("mmdebstrap", "qemu-system-aarch64", *images.TOOLS)
    folder = tmp_path_factory.mktemp("base")
    root = folder / "root"
    images.run(
        "mmdebstrap", "--architectures=arm64", "--variant=minbase", f"--include={PACKAGES}",
        f"--essential-hook={MODULES}", "bookworm", str(root),
    )  # fmt: skip
    (root / "etc/fstab").write_text(
        "/dev/vda2 / ext4 defaults 0 1\n/dev/vda1 /boot/firmware vfat defaults 0 2\n"
    )
    (root / "boot/firmware").mkdir(exist_ok=True)
    (root / "etc/systemd/network/20-wired.network").write_text(
        "[Match]\nType=ether\n[Network]\nDHCP=yes\n"
    )
    images.run("chroot", str(root), "systemctl", "enable", "systemd-networkd.service")
    with np.load(digits / "device-2.npz") as shard:
        for number, (x, y) in enumerate(zip(shard["x"], shard["y"], strict=True)):
            path = root / f"srv/stillhouse/images/{y}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x.squeeze()).save(path)
    for name in ("vmlinuz", "initrd.img"):
        shutil.copyfile((root / name).resolve(), folder / name)
    boot = folder / "boot"
    boot.mkdir()
    (boot / "cmdline.txt").write_text("console=ttyAMA0 root=/dev/vda2 rw rootwait\n")
    (boot / "config.txt").write_text("arm_64bit=1\n")
    used = int(images.run("du", "-sm", str(root)).split()[0])
    images.make(folder / "base.img", root, boot, boot_mib=96, root_mib=used + 500)
    shutil.rmtree(root)
    return folder


@pytest.fixture
def board(base, tmp_path, processes):
    """Starts an emulated board with an image; its console is a log."""

    def start(image):
        boot, _ = open_disk(image)
        command = boot.read("cmdline.txt").decode().strip()
        with (tmp_path / "board.log").open("wb") as log:
            processes.running["board"] = subprocess.Popen(
                [
                    *("qemu-system-aarch64", "-machine", "virt", "-cpu", "cortex-a72", "-smp", "2"),
                    *("-m", "1536", "-nographic", "-no-reboot", "-append", command),
                    *("-kernel", str(base / "vmlinuz"), "-initrd", str(base / "initrd.img")),
                    *("-drive", f"if=virtio,format=raw,file={image}"),
                    *("-nic", "user,model=virtio-net-pci"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    return start


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.timeout(3600)
def test_a_board_joins_by_itself_and_finishes_a_round(base, board, digits, processes, tmp_path):
    port = free_port()
    run = tmp_path / "run.toml"
    run.write_text(RUN.format(digits=digits, port=port))
    kits = tmp_path / "kits"
    kits.mkdir()
    os.chdir(tmp_path)
    app(
        ["enroll", "pi-3", "--config", str(run), "--packaged", "--out", str(kits / "pi-3.toml"),
         "--url", f"mqtt://10.0.2.2:{port}"],
        standalone_mode=False,
    )  # fmt: skip
    package = deb.build("arm64", "3.11", tmp_path)
    fleet, image = tmp_path / "fleet.img", tmp_path / "pi-3.img"
    assert main(["build", "--base", str(base / "base.img"), "--deb", str(package), "--out",
                 str(fleet), "--fleet", "mill"]) == 0  # fmt: skip
    assert main(["personalize", str(fleet), "--device", "pi-3", "--kit", str(kits), "--out",
                 str(image)]) == 0  # fmt: skip
    processes.start("run", "orchestrator.main", "start", "--config", "run.toml")
    board(image)
    process = processes.running["run"]
    processes.wait_for(
        "end of the run",
        lambda: process.poll() is not None or "Failed to start" in processes.log("board"),
        1800.0,
    )
    assert process.poll() == 0, processes.log("board")[-3000:] + processes.log("run")
    report = images.json_of(tmp_path / "runs/run/report.json")
    device = report["rounds"][0]["devices"]["pi-3"]
    assert device["accepted"]
    assert device["samples"] == 64
    assert 1.5 < device["train_loss"] < 4.0
    processes.kill("board")
    check_the_card(image)


def check_the_card(image):
    """Check that package and secrets are in place, and not on the boot partition."""
    boot, root = open_disk(image)
    at = f"{image}?offset={root.offset}"
    subprocess.run(["e2fsck", "-fy", at], capture_output=True, check=False)  # replays its journal
    assert boot.read("stillhouse/ERROR.txt") is None
    assert boot.read("stillhouse/device/etc/agent.toml") is None
    assert boot.read("stillhouse/image.json") is not None
    assert b'device = "pi-3"' in root.read("/etc/stillhouse/agent.toml")
    shown = images.run("debugfs", "-R", "stat /etc/stillhouse/agent.toml", at)
    assert "Mode:  0640" in shown
    assert root.read("/etc/hostname") == b"pi-3\n"
    assert root.exists("/var/lib/stillhouse/state/journal.db")
