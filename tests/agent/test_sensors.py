"""Sensors of boards, read from trees and outputs in the form that those boards have."""

import subprocess
import threading
import time

import pytest

from edge_agent import sensors

# In the form that `vcgencmd pmic_read_adc` prints on a Raspberry Pi 5.
PMIC = """\
     3V7_WL_SW_A current(0)=0.00195183A
       3V3_SYS_A current(1)=0.07709729A
       1V8_SYS_A current(2)=0.16395370A
      DDR_VDD2_A current(3)=0.01366281A
      DDR_VDDQ_A current(4)=0.00000000A
       1V1_SYS_A current(5)=0.18835160A
        0V8_SW_A current(6)=0.31814830A
      VDD_CORE_A current(7)=0.73730000A
       3V3_DAC_A current(17)=0.00018315A
       3V3_ADC_A current(18)=0.00036630A
         HDMI_A current(22)=0.01416360A
     3V7_WL_SW_V volt(8)=3.71669700V
       3V3_SYS_V volt(9)=3.30930100V
       1V8_SYS_V volt(10)=1.79853300V
      DDR_VDD2_V volt(11)=1.10732500V
      DDR_VDDQ_V volt(12)=0.60439500V
       1V1_SYS_V volt(13)=1.10549500V
        0V8_SW_V volt(14)=0.80293560V
      VDD_CORE_V volt(15)=0.72019680V
       3V3_DAC_V volt(20)=3.30860900V
       3V3_ADC_V volt(21)=3.30647200V
         HDMI_V volt(23)=5.16180000V
         EXT5V_V volt(24)=5.16448000V
          BATT_V volt(25)=0.00000000V
"""
PMIC_WATTS = (
    0.00195183 * 3.716697 + 0.07709729 * 3.309301 + 0.1639537 * 1.798533 + 0.01366281 * 1.107325
    + 0.1883516 * 1.105495 + 0.3181483 * 0.8029356 + 0.7373 * 0.7201968 + 0.00018315 * 3.308609
    + 0.0003663 * 3.306472 + 0.0141636 * 5.1618
)  # fmt: skip


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def commands(**known):
    def run(line):
        name = line.split()[1]
        if name not in known:
            raise FileNotFoundError(line)
        return known[name]

    return run


ORIN = {
    "sys/class/hwmon/hwmon0/name": "pwmfan",
    "sys/class/hwmon/hwmon1/name": "ina3221",
    **{f"sys/class/hwmon/hwmon1/in{n}_label": label
       for n, label in enumerate(("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC", "sum of shunts"), 1)},
    **{f"sys/class/hwmon/hwmon1/in{n}_input": "5056" for n in (1, 2, 3)},
    **{f"sys/class/hwmon/hwmon1/curr{n}_input": a for n, a in ((1, 968), (2, 96), (3, 256))},
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "48156",
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": "1",
    "sys/class/thermal/cooling_device1/type": "cpufreq-cpu0",
    "sys/class/thermal/cooling_device1/cur_state": "0",
}  # fmt: skip
X86 = {
    "sys/class/powercap/intel-rapl:0/name": "package-0",
    "sys/class/powercap/intel-rapl:0/energy_uj": "262143000000",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850",
    "sys/class/powercap/intel-rapl:0:0/name": "core",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "1",
    "sys/class/powercap/intel-rapl:1/name": "psys",
    "sys/class/powercap/intel-rapl:1/energy_uj": "7",
    "sys/class/powercap/intel-rapl:1/max_energy_range_uj": "262143328850",
}


def test_a_raspberry_pi_5_sums_its_rails(tmp_path):
    assert sensors.watts(PMIC) == pytest.approx(PMIC_WATTS)
    assert 1.5 < PMIC_WATTS < 2.5
    sensor = sensors.power(tmp_path, commands(pmic_read_adc=PMIC))
    assert sensor.name == "PMIC"
    time.sleep(0.05)
    assert 0.04 * PMIC_WATTS < sensor.joules() < 5 * PMIC_WATTS


def test_a_raspberry_pi_4_measures_no_power(tmp_path):
    assert sensors.power(tmp_path, commands(get_throttled="throttled=0x0\n")) is None
    refused = commands(pmic_read_adc='error=1 error_msg="Command not registered"\n')
    assert sensors.power(tmp_path, refused) is None


def test_a_jetson_is_read_by_the_label_of_its_board_rail(tmp_path):
    write(tmp_path, ORIN)
    sensor = sensors.power(tmp_path, commands())
    assert sensor.name == "INA3221 VDD_IN"
    assert sensor._watts() == pytest.approx(5.056 * 0.968)
    write(tmp_path, {"sys/class/hwmon/hwmon1/in1_label": "VDD_UNKNOWN"})
    assert sensors.power(tmp_path, commands()) is None


def test_rapl_goes_on_where_its_counter_begins_anew(tmp_path):
    write(tmp_path, X86)
    sensor = sensors.power(tmp_path, commands())
    assert (sensor.name, sensor.joules()) == ("RAPL", 0.0)
    write(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": "2000000"})
    assert sensor.joules() == pytest.approx(2.32885)
    write(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": "5000000"})
    assert sensor.joules() == pytest.approx(5.32885)


def test_watts_become_joules_by_trapezoids():
    readings, times = iter([2.0, 4.0, 4.0]), iter([0.0, 1.0, 3.0])
    sensor = sensors.Integral("x", lambda: next(readings), lambda: next(times))
    assert sensor.joules() == 3.0
    assert sensor.joules() == 11.0


def test_what_holds_a_board_back_is_named(tmp_path):
    write(tmp_path, ORIN)
    assert sensors.throttling(tmp_path, commands()) == ()  # a fan is no brake
    write(tmp_path, {"sys/class/thermal/cooling_device1/cur_state": "3"})
    assert sensors.throttling(tmp_path, commands()) == ("cooling by cpufreq-cpu0",)
    hot = commands(get_throttled="throttled=0x80008\n")
    assert sensors.throttling(tmp_path / "pi", hot) == ("soft temperature limit",)
    was = commands(get_throttled="throttled=0x50000\n")  # since boot, not now
    assert sensors.throttling(tmp_path / "pi", was) == ()
    assert sensors.throttling(tmp_path / "pi", was, ever=True) == ("under-voltage", "throttled")
    weak = commands(get_throttled="throttled=0x50005\n")
    assert sensors.throttling(tmp_path / "pi", weak) == ("under-voltage", "throttled")


def test_temperatures_are_told_by_zone(tmp_path):
    write(tmp_path, ORIN | {"sys/class/thermal/thermal_zone1/type": "gpu-thermal"})
    assert sensors.celsius(tmp_path) == {"cpu-thermal": 48.156}  # zone 1 cannot be read


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
        assert read.wait(10.0)
    assert watch.joules == 10.0 * (sensor.count - 1)
    assert watch.seconds >= 2 * sensors.EVERY_S
    with sensors.Watch(None) as nothing:
        pass
    assert nothing.joules is None


def test_a_sensor_that_goes_away_gives_no_energy(caplog):
    class Loose:
        name = "loose"
        count = 0

        def joules(self):
            self.count += 1
            if self.count == 2:
                raise OSError("unplugged")
            return 1.0 * self.count

    with sensors.Watch(Loose()) as watch:
        time.sleep(3 * sensors.EVERY_S)
    assert watch.joules is None
    assert "loose cannot be read any more: unplugged" in caplog.text


def test_a_command_that_does_not_answer_is_a_missing_sensor(monkeypatch):
    def never(*_, **__):
        raise subprocess.TimeoutExpired("vcgencmd", 10)

    monkeypatch.setattr(sensors.subprocess, "run", never)
    with pytest.raises(OSError, match="no answer in 10 s"):
        sensors._run("vcgencmd get_throttled")
