"""First boot ends in the same state wherever it is cut off, and reports what it could not do.

The script runs on a file tree. Stubs replace the programs that reach beyond it (dpkg, systemctl,
...); they record how they were called, and can be told to fail. `test_boot.py` runs the real ones.
"""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "hardware/image/first-boot"
STUBS = ("dpkg", "systemctl", "hostname", "raspi-config", "rfkill", "nmcli", "journalctl",
         "chown", "sleep", "sync")  # fmt: skip


@pytest.fixture
def board(tmp_path):
    return Board(tmp_path)


class Board:
    """A device's tree, and stub programs that count their calls."""

    def __init__(self, folder):
        self.root, self.bin, self.calls = folder / "root", folder / "bin", folder / "calls"
        self.here = self.root / "boot/firmware/stillhouse"
        self.kit, self.etc = self.here / "device", self.root / "etc/stillhouse"
        for path in (self.here, self.etc, self.root / "var/lib/stillhouse/state", self.bin):
            path.mkdir(parents=True)
        (self.root / "etc/hosts").write_text("127.0.0.1\tlocalhost\n127.0.1.1\traspberrypi\n")
        self.fails("nothing")

    def fails(self, *programs, after=0):
        """From now on, these programs fail once they have been called more than `after` times."""
        for name in STUBS:
            count = f'[ "$(grep -c "^{name} " {self.calls})" -gt {after} ] && exit 1'
            body = f'echo "{name} $*" >> {self.calls}\n' + (count if name in programs else "")
            self._program(name, body + "\nexit 0")
        self._program("dpkg-query", "echo installed")

    def cut_off_at(self, name):
        """From now on, the power is cut when this program is called."""
        self.fails()
        self._program(name, "kill -9 $PPID; sleep 1")

    def _program(self, name, body):
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def package(self):
        (self.here / "agent_0.1.0+py311_arm64.deb").write_text("a package")

    def give(self, device, *, wifi=False):
        files = {"etc/agent.toml": f'device = "{device}"  # its name\nfleet = "mill"\n',
                 "etc/ca.pem": "a certificate", "hostname": f"{device}\n"}  # fmt: skip
        if wifi:
            files |= {"wifi.nmconnection": "[wifi]\n", "country": "DE\n"}
        for name, text in files.items():
            (self.kit / name).parent.mkdir(parents=True, exist_ok=True)
            (self.kit / name).write_text(text)

    def boot(self):
        self.calls.write_text("")
        path = f"{self.bin}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", SCRIPT, self.root], env=os.environ | {"PATH": path}, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, self.calls.read_text()

    def is_device(self, name):
        assert f'device = "{name}"' in (self.etc / "agent.toml").read_text()
        assert (self.etc / "ca.pem").read_text() == "a certificate"
        assert (self.root / "etc/hostname").read_text() == f"{name}\n"
        assert not list(self.here.iterdir())


def test_package_and_kit_are_taken_from_the_boot_partition(board):
    board.package()
    board.give("pi-1", wifi=True)
    code, calls = board.boot()
    assert code == 0
    board.is_device("pi-1")
    assert (board.etc / "agent.toml").stat().st_mode & 0o777 == 0o640
    assert "127.0.1.1\tpi-1" in (board.root / "etc/hosts").read_text()
    connection = board.root / "etc/NetworkManager/system-connections/stillhouse.nmconnection"
    assert connection.stat().st_mode & 0o777 == 0o600
    assert "raspi-config nonint do_wifi_country DE" in calls
    assert calls.endswith("systemctl --no-block restart stillhouse-edge-agent.service\n")
    assert board.boot() == (0, "")  # nothing is left to do


@pytest.mark.parametrize("name", ["dpkg", "chown", "hostname", "nmcli", "shred", "sync", "mv"])
def test_a_power_cut_is_a_pause(board, name):
    board.package()
    board.give("pi-1", wifi=True)
    board.cut_off_at(name)
    assert board.boot()[0] != 0
    (board.bin / name).unlink()
    board.fails()
    assert board.boot()[0] == 0
    board.is_device("pi-1")


@pytest.mark.parametrize("cut_off_at", ["etc/agent.toml", "etc", "hostname"])
def test_a_kit_that_was_half_removed_is_taken_and_not_looked_for(board, cut_off_at):
    board.give("pi-1")
    board.boot()
    board.give("pi-1")
    board.kit.rename(board.here / "taken")
    gone = board.here / "taken" / cut_off_at
    subprocess.run(["rm", "-r", gone], check=True)
    assert board.boot()[0] == 0
    board.is_device("pi-1")


def test_apts_lock_is_waited_for(board):
    board.package()
    board._program(
        "dpkg", f'echo "dpkg" >> {board.calls}; [ "$(grep -c dpkg {board.calls})" -gt 2 ]'
    )
    code, calls = board.boot()
    assert (code, calls.count("dpkg\n"), calls.count("sleep 30")) == (0, 3, 2)
    assert not list(board.here.iterdir())


def test_a_package_that_cannot_be_installed_stays_and_the_card_says_why(board):
    board.package()
    board.give("pi-1")
    board.fails("dpkg")
    assert board.boot()[0] == 1
    assert {path.name for path in board.here.iterdir()} == {
        "agent_0.1.0+py311_arm64.deb", "device", "ERROR.txt"
    }  # fmt: skip
    board.fails()
    assert board.boot()[0] == 0
    board.is_device("pi-1")  # and ERROR.txt is gone


def test_another_device_begins_with_nothing_of_the_former(board):
    state = board.root / "var/lib/stillhouse/state"
    board.give("pi-1", wifi=True)
    board.boot()
    (state / "journal.db").write_text("of pi-1")
    (board.etc / "old.pem").write_text("of pi-1")
    board.give("pi-1")
    board.boot()
    assert (state / "journal.db").exists()  # the same device goes on
    board.give("pi-2")
    code, calls = board.boot()
    assert code == 0
    board.is_device("pi-2")
    assert "systemctl stop stillhouse-edge-agent.service" in calls
    assert not state.exists()
    assert not (board.etc / "old.pem").exists()
    assert not list((board.root / "etc/NetworkManager/system-connections").iterdir())


def test_a_device_that_cannot_be_named_joins_all_the_same(board):
    board.give("pi-1", wifi=True)
    board.fails("hostname", "raspi-config", "rfkill", "nmcli")
    assert board.boot()[0] == 0
    board.is_device("pi-1")
