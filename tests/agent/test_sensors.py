"""Sensors of boards, read from file trees (trees/) and outputs in the form of those boards."""

import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from edge_agent.field import sensors

TREES = Path(__file__).parent / "trees"

PMIC_WATTS = (
    0.00195183 * 3.716697 + 0.07709729 * 3.309301 + 0.1639537 * 1.798533 + 0.01366281 * 1.107325
    + 0.1883516 * 1.105495 + 0.3181483 * 0.8029356 + 0.7373 * 0.7201968 + 0.00018315 * 3.308609
    + 0.0003663 * 3.306472 + 0.0141636 * 5.1618
)  # fmt: skip


def commands(**known):
    def run(line):
        name = line.split()[1]
        if name not in known:
            raise FileNotFoundError(line)
        return known[name]

    return run


class Board:
    """A copy of one of the trees, which a test may change, and its vcgencmd."""

    def __init__(self, name, folder):
        self.root = folder / name
        shutil.copytree(TREES / name, self.root)
        told = self.root.glob("vcgencmd/*")
        self.run = commands(**{path.name: path.read_text() for path in told})

    def write(self, name, text):
        (self.root / name).write_text(f"{text}\n")


@pytest.fixture
def board(request, tmp_path):
    return Board(request.param, tmp_path)


def on(name):
    return pytest.mark.parametrize("board", [name], indirect=True)


@on("pi5")
def test_a_raspberry_pi_5_sums_its_rails(board):
    assert sensors.watts(board.run("vcgencmd pmic_read_adc")) == pytest.approx(PMIC_WATTS)
    assert 1.5 < PMIC_WATTS < 2.5
    began = time.monotonic()
    sensor = sensors.power(board.root, board.run)
    assert sensor.name == "PMIC"
    time.sleep(0.05)
    joules = sensor.joules()
    assert 0.04 * PMIC_WATTS < joules < 1.01 * PMIC_WATTS * (time.monotonic() - began)


@on("pi4")
def test_a_raspberry_pi_4_measures_no_power(board):
    assert sensors.power(board.root, board.run) is None
    assert sensors.power(board.root, commands(get_throttled="throttled=0x0\n")) is None


@on("orin-nano")
def test_a_jetson_is_read_by_the_label_of_its_board_rail(board):
    sensor = sensors.power(board.root, board.run)
    assert sensor.name == "INA3221 VDD_IN"
    assert sensor._watts() == pytest.approx(5.056 * 0.968)
    board.write("sys/class/hwmon/hwmon1/in1_label", "VDD_UNKNOWN")
    assert sensors.power(board.root, board.run) is None


@on("x86")
def test_rapl_goes_on_where_its_counter_begins_anew(board):
    sensor = sensors.power(board.root, board.run)
    assert (sensor.name, sensor.joules()) == ("RAPL", 0.0)
    board.write("sys/class/powercap/intel-rapl:0/energy_uj", "2000000")
    assert sensor.joules() == pytest.approx(2.32885)
    board.write("sys/class/powercap/intel-rapl:0/energy_uj", "5000000")
    assert sensor.joules() == pytest.approx(5.32885)


def test_watts_become_joules_by_trapezoids():
    readings, times = iter([2.0, 4.0, 4.0]), iter([0.0, 1.0, 3.0])
    sensor = sensors.Integral("x", lambda: next(readings), lambda: next(times))
    assert sensor.joules() == 3.0
    assert sensor.joules() == 11.0


@on("orin-nano")
def test_what_holds_a_jetson_back_is_named(board):
    assert sensors.throttling(board.root, board.run) == ()  # a fan does not throttle
    board.write("sys/class/thermal/cooling_device1/cur_state", "3")
    assert sensors.throttling(board.root, board.run) == ("cooling by cpufreq-cpu0",)


@on("x86")
def test_what_holds_a_pc_back_is_named(board):
    assert sensors.throttling(board.root, board.run) == ()  # nor does a setting of its firmware
    board.write("sys/class/thermal/cooling_device0/cur_state", "2")
    assert sensors.throttling(board.root, board.run) == ("cooling by Processor",)


@on("pi4")
def test_what_holds_a_raspberry_pi_back_is_named(board):
    """Current causes are named by default, and all causes since boot with `ever`."""
    assert sensors.throttling(board.root, board.run) == ()
    assert sensors.throttling(board.root, board.run, ever=True) == ("under-voltage", "throttled")
    hot = commands(get_throttled="throttled=0x80008\n")
    assert sensors.throttling(board.root, hot) == ("soft temperature limit",)
    weak = commands(get_throttled="throttled=0x50005\n")
    assert sensors.throttling(board.root, weak) == ("under-voltage", "throttled")


@pytest.mark.parametrize(
    ("board", "told"),
    [
        ("pi4", {"cpu-thermal": 48.686}),
        ("pi5", {"cpu-thermal": 51.25}),
        ("orin-nano", {"cpu-thermal": 48.156, "gpu-thermal": 46.562, "tj-thermal": 48.156}),
        ("x86", {"acpitz": 27.8, "x86_pkg_temp": 45.0}),
    ],
    indirect=["board"],
)
def test_temperatures_are_told_by_zone(board, told):
    assert sensors.celsius(board.root) == told


def test_a_sensor_is_read_while_the_work_goes_on():
    read = threading.Event()

    class Counter:
        name = "counter"
        count = 0

        def joules(self):
            self.count += 1
            if self.count >= 4:
                read.set()
            return 10.0 * self.count

    sensor = Counter()
    with sensors.Watch(sensor) as watch:
        assert read.wait(60.0)
    assert watch.joules == 10.0 * (sensor.count - 1)
    assert watch.seconds >= 2 * sensors.EVERY_S
    with sensors.Watch(None) as nothing:
        pass
    assert nothing.joules is None


@pytest.mark.parametrize("reading", [1, 2])
def test_a_sensor_that_goes_away_gives_no_energy(reading, caplog):
    unplugged = threading.Event()

    class Loose:
        name = "loose"
        count = 0

        def joules(self):
            self.count += 1
            if self.count == reading:
                unplugged.set()
                raise OSError("unplugged")
            return 1.0 * self.count

    with sensors.Watch(Loose()) as watch:
        assert unplugged.wait(60.0)
    assert watch.joules is None
    assert "loose cannot be read any more: unplugged" in caplog.text


def test_a_command_that_does_not_answer_is_a_missing_sensor(monkeypatch):
    def never(*_, **__):
        raise subprocess.TimeoutExpired("vcgencmd", 10)

    monkeypatch.setattr(sensors.subprocess, "run", never)
    with pytest.raises(OSError, match="no answer in 10 s"):
        sensors._run("vcgencmd get_throttled")
