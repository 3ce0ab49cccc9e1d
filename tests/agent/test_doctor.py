"""The doctor's findings, on a healthy device and on one with faults."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_agent import doctor
from edge_agent.main import main

PI4 = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"
PI5 = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp\n"
X86 = "flags\t\t: fpu sse sse2 avx avx2 fma avx512f\n"
ARMV6 = "Features\t: half thumb fastmult vfp edsp java tls\n"


def configure(folder, url="mqtt://127.0.0.1:9", more="", **settings):
    np.savez(folder / "images.npz", x=np.zeros((4, 8, 8, 3), np.uint8), y=np.array([0, 1, 0, 2]),
             classes=np.array(["bolt", "nut", "pin"]))  # fmt: skip
    given = {"data": '"images.npz"', "state": '"state"', "image": "[3, 8, 8]", **settings}
    text = 'device = "pi"\nfleet = "home"\n' + "".join(f"{k} = {v}\n" for k, v in given.items())
    path = folder / "agent.toml"
    path.write_text(f'{text}[broker]\nurl = "{url}"\n{more}')
    return path


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(doctor, "REACH_S", 3.0)


@pytest.fixture
def one_wheel(monkeypatch):
    monkeypatch.setattr(doctor, "WHEELS", ("msgpack",))


def bad(path, **more):
    return [f for f in doctor.examine(path, **more) if f.level == "bad"]


def test_a_device_that_is_well_is_said_to_be(tmp_path, any_broker, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "REACH_S", 60.0)
    path = configure(tmp_path, any_broker.url)
    assert main(["doctor", "--config", str(path)]) == 0
    told = capsys.readouterr().out
    takes = f"broker {any_broker.url} takes this device"
    for text in ("OK   Python 3.", "OK   onnxruntime 1.", "OK   paho", "device pi of fleet home",
                 "4 images of 3 classes: bolt 2, nut 1, pin 1", takes):  # fmt: skip
        assert text in told
    assert "BAD" not in told


@pytest.mark.usefixtures("one_wheel")
def test_each_finding_has_its_remedy_and_the_rest_is_looked_at(tmp_path, capsys):
    (tmp_path / "state").write_text("a file where the folder should be")
    path = configure(tmp_path, data='"nowhere"')
    before = sorted(tmp_path.rglob("*"))
    assert main(["doctor", "--config", str(path)]) == 1
    told = capsys.readouterr().out
    for text in ("state cannot be written", "let `state` name its folder",
                 "nowhere: expected an .npz file or a folder", "say what to train on",
                 "broker mqtt://127.0.0.1:9 cannot be reached", "nc -vz 127.0.0.1 9"):  # fmt: skip
        assert text in told
    assert told.count("BAD") == told.count("->") - told.count("WARN") == 3
    assert sorted(tmp_path.rglob("*")) == before  # it looks, and changes nothing


@pytest.mark.usefixtures("one_wheel")
def test_images_are_told_by_class_with_what_was_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, number in {"bolt": 40, "nut": 3, "lost+found": 0}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos/nut/cut.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "photos/nut/x.heic").touch()
    path = configure(tmp_path, data='"~/photos"')
    assert main(["doctor", f"--config={path}"]) == 1  # there is no broker
    told = capsys.readouterr().out
    for text in (f"OK   {tmp_path}/photos: 43 images of 2 classes: bolt 40, nut 3",
                 "WARN 1 of 44 pictures left out as damaged: nut/cut.jpg (",
                 "WARN few images of some classes: nut 3",
                 "WARN files left out by their suffix: .heic 1\n     -> convert the pictures",
                 "OK   system folders are not classes: lost+found"):  # fmt: skip
        assert text in told
    path = configure(tmp_path, data='"~/photos"', bad_share="0")
    assert any("got 1 of 44: nut/cut.jpg" in finding.what for finding in bad(path))


@pytest.mark.parametrize("text", ["-0.1", "1.5", "nan"])
@pytest.mark.usefixtures("one_wheel")
def test_a_share_that_is_none_is_refused(tmp_path, text):
    (finding,) = bad(configure(tmp_path, bad_share=text))
    assert "bad_share: expected a " in finding.what


@pytest.mark.usefixtures("one_wheel")
def test_settings_that_cannot_be_read_end_it(tmp_path):
    (finding,) = bad(tmp_path / "agent.toml")
    assert "agent.toml: cannot be read" in finding.what


@pytest.mark.parametrize(
    "url",
    ["mqtt://pi:tops3cret@h", "mqtt://h:0", "mqtt://h:99999", "mqtt://h:port", "MQTTS:/h", " mqtt://h",
     "http://h", "mqtt://", "mqtt://[::1", "mqtt://h/path", "mqtt://\\u00fc", "mqtt://\\u0000"],
)  # fmt: skip
@pytest.mark.usefixtures("one_wheel")
def test_a_url_that_is_none_is_a_finding_and_no_traceback(tmp_path, url):
    (finding,) = bad(configure(tmp_path, url))
    assert "agent.toml: broker: url " in finding.what
    assert "tops3cret" not in finding.what


@pytest.mark.usefixtures("one_wheel")
def test_a_silent_port_is_not_waited_for_longer_than_it_says(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began = time.monotonic()
        (finding,) = bad(configure(tmp_path, f"mqtt://127.0.0.1:{port}"))
    assert "does not answer in 3 s" in finding.what
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("cpuinfo", "level", "text"),
    [
        (PI4, "ok", "processor has asimd"),
        (PI5, "ok", "processor has asimd, asimddp, asimdhp"),
        (X86, "ok", "processor has avx, avx2, avx512f, fma"),
        (ARMV6, "warn", "lacks the vector instructions"),
        (None, "warn", "does not say what the processor can do"),
    ],
)
def test_processors_are_told_by_what_they_can(cpuinfo, level, text, tmp_path):
    (tmp_path / "proc").mkdir()
    if cpuinfo:
        (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    (finding,) = doctor._processor(tmp_path)
    assert finding.level == level
    assert text in finding.what


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("kill -ILL $$", "msgpack was built for another processor"),
        ("echo 'ImportError: libstdc++.so.6' >&2; exit 1", "imported: ImportError: libstdc++.so.6"),
    ],
)
@pytest.mark.usefixtures("one_wheel")
def test_a_wheel_that_does_not_fit_is_named(script, text, tmp_path, monkeypatch):
    python = tmp_path / "python3"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(doctor.sys, "executable", str(python))
    (finding,) = doctor._wheels()
    assert finding.level == "bad"
    assert text in finding.what


def test_a_clock_that_is_behind_or_alone_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert "no service seems to keep it right" in doctor._clock(tmp_path).what
    (tmp_path / "run/systemd/timesync").mkdir()
    (tmp_path / "run/systemd/timesync/synchronized").touch()
    assert doctor._clock(tmp_path).level == "ok"
    monkeypatch.setattr(doctor.time, "time", lambda: 3600.0)
    finding = doctor._clock(tmp_path)
    assert finding.level == "bad"
    assert "the clock says 1970-01-01" in finding.what


@pytest.mark.parametrize(("free", "level"), [(100_000, "warn"), (4_000_000, "ok")])
def test_free_memory_is_told(free, level, tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 8000000 kB\nMemAvailable: {free} kB\n")
    assert doctor._memory(tmp_path).level == level


@pytest.mark.parametrize(
    ("days", "level", "text"),
    [(-1, "bad", ", not on "), (5, "warn", "is good from "), (400, "ok", "is good from ")],
)
@pytest.mark.usefixtures("one_wheel")
def test_dates_of_certificates_are_read(days, level, text, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    pem = tmp_path / "ca.pem"
    make = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out {pem} -subj /CN=x -days 500"
    subprocess.run(make.split(), cwd=tmp_path, check=True, capture_output=True)
    path = configure(tmp_path, "mqtts://127.0.0.1:9", more=f'ca_file = "{pem}"\n')
    chosen = doctor.config.load(path)
    end = time.time() + 500 * 24 * 3600
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor.time, "time", lambda: end - days * 24 * 3600)
        (finding,) = doctor._certificates(chosen)
    assert finding.level == level
    assert text in finding.what
    pem.write_text("nothing")
    (finding,) = doctor._certificates(chosen)
    assert "is not a certificate" in finding.what
    assert "no connection to mqtts://127.0.0.1:9 with these files" in doctor._broker(chosen).what


@pytest.mark.usefixtures("one_wheel")
def test_a_password_that_all_can_read_is_warned_of(tmp_path):
    path = configure(tmp_path, more='username = "pi"\npassword = "secret"\n')
    path.chmod(0o644)
    warned = [f.what for f in doctor.examine(path) if f.level == "warn"]
    assert any("anyone here can read its secret" in what for what in warned)
    path.chmod(0o640)
    warned = [f.what for f in doctor.examine(path) if f.level == "warn"]
    assert not any("password" in what for what in warned)


@pytest.mark.parametrize(("controllers", "number"), [("cpu io memory pids", 0), ("cpu io", 1)])
def test_a_kernel_that_limits_no_memory_is_noticed(controllers, number, tmp_path):
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text(f"{controllers}\n")
    found = [*doctor._limits(tmp_path)]
    assert len(found) == number
    assert all("cgroup_enable=memory" in finding.remedy for finding in found)


def test_a_state_folder_that_may_not_be_looked_at_is_a_finding(monkeypatch):
    def closed(_path, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", closed)
    finding = doctor._disk(Path("/closed/state"))
    assert (finding.level, finding.what) == (
        "bad", "/closed/state cannot be written: Permission denied",
    )  # fmt: skip
