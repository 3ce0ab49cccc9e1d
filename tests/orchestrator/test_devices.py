"""Devices' reports about themselves are stored if they are really theirs, shown, and drawn."""

import json

import pytest
import typer.testing

from orchestrator import main
from orchestrator.commands import terminal
from orchestrator.config import template
from orchestrator.fleet import devices, enrolment
from tests.wire.test_measurement import REPORT, changed
from wire import measurement, messages, records, signing
from wire.errors import RunError, SignatureError, WireError
from wire.messages import Birth

PLATFORM = records.build(messages.Platform, REPORT["platform"], where="x", error=WireError)


@pytest.fixture
def key(tmp_path):
    return signing.own_key(tmp_path / "device.pem")


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def signed(key, where="name", value="pi-3", **more):
    return measurement.sign(key, {**changed(where, value), **more}).to_bytes()


def test_a_measurement_is_kept_as_it_was_signed_and_once(runs, key):
    path = devices.take(runs, "home", "pi-3", signed(key))
    assert path.read_bytes() == signed(key)
    assert devices.take(runs, "home", "pi-3", signed(key)) == path  # the broker delivered it twice
    (device,) = devices.known(runs, "home")
    assert device.measured == measurement.verify(signed(key), where="x")
    assert sorted(each.name for each in path.parent.iterdir()) == ["keys.json", path.name]


def test_another_key_in_a_devices_name_is_refused_until_the_first_is_taken_out(runs, key, tmp_path):
    devices.take(runs, "home", "pi-3", signed(key))
    other = signing.own_key(tmp_path / "other.pem")
    text = (
        r"pi-3: expected a measurement signed by ed25519:\S+, as its first .* out of .*keys\.json"
    )
    with pytest.raises(SignatureError, match=text):
        devices.take(runs, "home", "pi-3", signed(other))
    devices.take(runs, "home", "pi-4", signed(other, value="pi-4"))
    keys = runs / "measured-home/keys.json"
    pinned = json.loads(keys.read_text())
    assert pinned == {"pi-3": signing.public(key), "pi-4": signing.public(other)}
    del pinned["pi-3"]
    keys.write_text(json.dumps(pinned))
    devices.take(runs, "home", "pi-3", signed(other))


def test_a_device_cannot_hand_in_what_another_measured(runs, key):
    with pytest.raises(WireError, match="expected the name 'pi-4' in it, got 'pi-3'"):
        devices.take(runs, "home", "pi-4", signed(key))
    with pytest.raises(WireError, match="expected the name 'pi-4' in it, got ''"):
        devices.take(runs, "home", "pi-4", signed(key, value=""))
    forged = signed(key).replace(b"320.0", b"640.0")
    with pytest.raises(SignatureError, match=r"measurement of pi-3: .* not signed by"):
        devices.take(runs, "home", "pi-3", forged)
    assert not (runs / "measured-home").exists()


def test_a_talkative_device_fills_no_disk(runs, key):
    for minute in range(devices.KEEP + 3):
        # The last report is the one that came last, whatever the device's clock says.
        at = f"2026-11-22T05:{devices.KEEP + 2 - minute:02}:00Z"
        devices.take(runs, "home", "pi-3", signed(key, measured_at=at))
    devices.take(runs, "home", "pi", signed(key, value="pi"))
    assert len(list((runs / "measured-home").glob("pi-3-*.json"))) == devices.KEEP
    pi, pi3 = devices.known(runs, "home")
    assert (pi.name, pi3.measured.measured_at) == ("pi", "2026-11-22T05:00:00Z")


def command(tmp_path, *arguments):
    (tmp_path / "run.toml").write_text(template(changes={"fleet": "home"}))
    arguments = [*arguments, "--config", str(tmp_path / "run.toml")]
    return typer.testing.CliRunner().invoke(main.app, arguments, catch_exceptions=False)


def test_the_table_tells_of_enrolled_born_and_measured_devices(runs, key, tmp_path):
    enrolment.enroll(runs, "home", "new")
    birth = Birth("pi-3", 1, "0.1.0", 10, "ab" * 32, PLATFORM)
    devices.born(runs, "home", birth)
    devices.take(runs, "home", "pi-3", signed(key))
    devices.take(runs, "home", "pi-4", signed(key, "platform.model", "a | b [red]", name="pi-4",
                                              valid=False))  # fmt: skip
    lines = command(tmp_path, "devices", "--markdown").output.splitlines()
    assert lines[0].startswith("| device | model | cores | memory | version |")
    assert lines[2] == f"| new |{' - |' * 9}"
    assert lines[3].startswith("| pi-3 | Raspberry Pi 5 Model B Rev 1.0 | 4 | 8.6 GB | 0.1.0 | 20")
    assert lines[3].endswith(" | 2026-11-22 05:00 | 320 | 3 B | 0.02 |")
    assert "| a \\| b [red] |" in lines[4]
    assert "| 320 (held back) |" in lines[4]
    told = command(tmp_path, "devices").output
    for text in ("new", "pi-3", "[red]"):
        assert text in told
    assert json.loads((runs / "born-home/pi-3.json").read_text())["samples"] == 10


def test_the_table_fits_eighty_columns_and_scripts_get_json(runs, key, tmp_path, monkeypatch):
    model = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    long = "jetson-orin-nano-devkit-in-the-mill-07"
    enrolment.enroll(runs, "home", "new")
    devices.born(runs, "home", Birth("pi-3", 1, "0.1.0", 10, "ab" * 32, PLATFORM))
    devices.take(runs, "home", "pi-3", signed(key))
    devices.take(runs, "home", long, signed(key, "platform.model", model, name=long, valid=False))
    for columns, tables in ((80, 2), (68, 2), (260, 1)):
        monkeypatch.setattr(terminal.console, "_width", columns)
        lines = command(tmp_path, "devices").output.splitlines()
        assert max(map(len, lines)) <= columns
        assert sum(line.startswith("device ") for line in lines) == tables
        assert sum(line.startswith("pi-3 ") for line in lines) == tables
        text = "\n".join(lines)
        for told in (
            "4  8.6 GB    0.1.0  20",
            "2026-11-22 05:00",
            "320 (held back)",
            "l-07 ",
        ):
            assert told in text
    told = json.loads(command(tmp_path, "devices", "--json").output)
    assert [each["device"] for each in told] == [long, "new", "pi-3"]
    assert told[2]["birth"]["platform"]["model"] == PLATFORM.model
    assert told[1] == {"device": "new", "born_at": None, "birth": None, "measured": None}


def test_the_report_has_the_table_and_three_pictures(runs, key, tmp_path):
    with pytest.raises(RunError, match="no device of this fleet was measured yet"):
        command(tmp_path, "measure-report")
    for n in range(3):
        devices.take(runs, "home", f"pi-{n}", signed(key, value=f"pi-{n}"))
    assert command(tmp_path, "measure-report", "--out", str(tmp_path / "out")).exit_code == 0
    told = command(tmp_path, "measure-report", "--out", str(tmp_path / "out"), "--json").output
    assert json.loads(told)["files"][0] == str(tmp_path / "out/devices.md")
    text = (tmp_path / "out/devices.md").read_text()
    assert "| pi-2 | Raspberry Pi 5 Model B Rev 1.0 |" in text
    assert "resnet8, distill, batch 32 (artifact abababababab)" in text
    for name in ("speed", "memory", "roofline"):
        assert f"![{name}]({name}.png)" in text
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("measured-home/keys.json", "{", "keys.json: not JSON"),
        ("born-home/pi-3.json", "[]", "pi-3.json: expected a table"),
        ("born-home/pi-3.json", "{}", "expected the time of a birth"),
    ],
)
def test_a_damaged_file_is_named(runs, key, name, content, text):
    devices.take(runs, "home", "pi-3", signed(key))
    (runs / "born-home").mkdir()
    (runs / name).write_text(content)
    with pytest.raises((RunError, WireError), match="json") as caught:
        devices.known(runs, "home") and devices.take(runs, "home", "pi-3", signed(key))
    assert text in str(caught.value)


def test_a_measurement_that_is_damaged_on_disk_stands_in_nobodys_way(runs, key, caplog):
    first = devices.take(runs, "home", "pi-3", signed(key))
    later = devices.take(runs, "home", "pi-3", signed(key, valid=False))
    later.write_text("{}")
    devices.take(runs, "home", "pi-4", signed(key, value="pi-4"))
    pi3, pi4 = devices.known(runs, "home")
    assert pi3.measured == measurement.verify(first.read_bytes(), where="x")
    assert pi4.measured.name == "pi-4"
    assert f"{later}: expected format" in caplog.text


def test_a_report_as_large_as_the_wire_takes_can_be_read_again(runs, key):
    row = {"name": "l" * 40, "phase": "forward", "flops": 1, "bytes": 1, "activation_bytes": 1,
           "seconds": 0.1}  # fmt: skip
    large = signed(key, layers=[row] * 1000)
    assert measurement.MAX_BYTES * 0.9 < len(large) < measurement.MAX_BYTES
    devices.take(runs, "home", "pi-3", large)
    assert len(devices.known(runs, "home")[0].measured.layers) == 1000
