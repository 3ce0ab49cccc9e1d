"""Memory is reported as the kernel counts it, and freed memory is returned to the system."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ondevice import meter
from tests.conftest import ROOT

TREES = Path(__file__).parents[1] / "agent" / "trees"

SCRIPT = """
import threading
import numpy as np
from ondevice import meter

def work():
    kept = [np.ones(2000) for _ in range(4000)]  # 64 MB, too small each for a mapping of its own
    cycle = [kept]
    cycle.append(cycle)

thread = threading.Thread(target=work)
before = meter.resident_bytes()
thread.start()
thread.join()
after = meter.resident_bytes()
meter.give_back()
print(after - before, meter.resident_bytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they do")
def test_what_a_thread_of_work_has_freed_is_given_back():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kept, left = map(int, done.stdout.split())
    assert kept > 50e6
    assert left < 10e6


@pytest.mark.parametrize(
    ("board", "model", "kibibytes"),
    [
        # Neither kernel reports the group's peak: one has no memory controller, one is 5.15.
        ("pi4", "Raspberry Pi 4 Model B Rev 1.4", (3344040, 128044, 139660, 113506, 0)),
        (
            "orin-nano",
            "NVIDIA Jetson Orin Nano Developer Kit",
            (5893120, 133180, 144912, 118228, 0),
        ),
        ("pi5", "Raspberry Pi 5 Model B Rev 1.0", (7420928, 131216, 142336, 116884, 159232)),
        ("x86", platform.node(), (11204040, 133120, 139264, 121344, 891000)),
    ],
)
def test_boards_tell_their_name_and_memory(board, model, kibibytes):
    """In KiB: available; resident now and at its peak; proportional; the group's peak."""
    root = TREES / board
    assert meter.model(root) == model
    told = (
        meter.available_bytes(root),
        meter.resident_bytes(root=root),
        meter.resident_bytes("VmHWM", root=root),
        meter.proportional_bytes(root),
        meter.group_peak_bytes(root),
    )
    assert told == tuple(1024 * each for each in kibibytes)


def test_a_system_that_tells_nothing_is_no_fault(tmp_path):
    assert meter.model(tmp_path) == platform.node()
    figures = (meter.available_bytes, meter.proportional_bytes, meter.group_peak_bytes)
    assert [figure(tmp_path) for figure in figures] == [0, 0, 0]
    assert meter.resident_bytes(root=tmp_path) == 0


def test_boards_with_copies_of_one_card_are_told_apart_by_their_serial_numbers(tmp_path):
    assert meter.machine(tmp_path) == ""
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    serial = tmp_path / "proc/device-tree/serial-number"
    serial.write_bytes(b"10000000deadbeef\0")
    assert meter.machine(tmp_path) == "10000000deadbeef"
    serial.write_bytes(b"0000000000000000\0")  # a board that was given none
    assert meter.machine(tmp_path) == ""
    serial.write_bytes(b"\xff\xffpi\0")
    assert meter.machine(tmp_path)
