"""`enroll` writes a URL that the device can use, or says what is missing."""

import contextlib
import json
import socket
import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

from orchestrator import config, main
from orchestrator.config import BrokerConfig
from orchestrator.fleet import enrolment
from tests.conftest import Disk
from wire.errors import RunError, SettingsError, StalledError, StillhouseError

EVERYWHERE = "0.0.0.0"  # noqa: S104 - never bound
LOOPBACK = "listens on 127.0.0.1, for this machine only"


def external(url: str, **more: object) -> BrokerConfig:
    return BrokerConfig("external", url=url, **more)


@pytest.mark.parametrize(
    ("broker", "given", "written", "note"),
    [
        (BrokerConfig(), "", "mqtt://127.0.0.1:1883", LOOPBACK),
        (BrokerConfig(host="::1", port=9), "", "mqtt://[::1]:9", "listens on ::1"),
        (BrokerConfig(), "mqtt://server", "mqtt://server:1883", LOOPBACK),
        (BrokerConfig("mosquitto", "10.0.0.7"), "", "mqtts://10.0.0.7:8883", ""),
        (BrokerConfig("mosquitto", "10.0.0.7", tls=False), "", "mqtt://10.0.0.7:1883", ""),
        (BrokerConfig("mosquitto", EVERYWHERE), "MQTTS://Server:9", "mqtts://server:9", ""),
        (BrokerConfig("mosquitto", "::"), "mqtts://localhost", "mqtts://localhost:8883", "its own"),
        (BrokerConfig("mosquitto", tls=True), "", "mqtts://127.0.0.1:8883", LOOPBACK),
        (external("MQTTS://Broker"), "", "mqtts://broker:8883", "ca_file under [broker]"),
        (external("mqtt://broker:9"), "", "mqtt://broker:9", ""),
        (external("mqtt://localhost"), "", "mqtt://localhost:1883", "its own machine only"),
        (external("mqtt://localhost"), "mqtt://server:9", "mqtt://server:9", ""),
    ],
)
def test_a_device_gets_a_url_by_which_it_reaches_the_broker(broker, given, written, note):
    url, notes = enrolment.reach(broker, given)
    assert url == written
    assert note in " ".join(notes)
    assert bool(notes) == bool(note)


@pytest.mark.parametrize(
    ("broker", "given", "text"),
    [
        (BrokerConfig("mosquitto", EVERYWHERE), "", "listens on every address of this machine"),
        (BrokerConfig("mosquitto", "::", 9), "", ":9, say"),
        (BrokerConfig("mosquitto", ""), "", "--url is missing"),
        (BrokerConfig(port=0), "", "a port drawn at random"),
        (BrokerConfig(), " mqtts://server", "--url ' mqtts://server': spaces"),
        (BrokerConfig(), "mqtts://server", "speaks no TLS; write mqtt://"),
        (BrokerConfig("mosquitto", ""), "mqtt://server", "speaks TLS; write mqtts://"),
        (BrokerConfig(), "mqtt://a:tops3cret@b", "--url 'mqtt://***@b': a user name or password"),
        (external("mqtt://broker"), "server", "did you mean mqtt://server?"),
    ],
)
def test_a_url_that_nobody_can_know_or_use_is_asked_for(broker, given, text):
    with pytest.raises(SettingsError) as caught:
        enrolment.reach(broker, given)
    assert text in str(caught.value)
    assert "tops3cret" not in str(caught.value)


def test_the_hosts_name_is_suggested_where_it_can_stand_in_a_url(monkeypatch):
    for name, shown in (("barn", "mqtts://barn:8883"), ("the barn", "mqtts://SERVER:8883")):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        with pytest.raises(SettingsError, match=f"--url {shown}, say"):
            enrolment.reach(BrokerConfig("mosquitto", EVERYWHERE), "")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"host": "mqtt://server"}, "host 'mqtt://server': expected a name"),
        ({"host": "127.0.0.1:1883"}, "expected a name"),
        ({"host": " localhost"}, "expected a name"),
        ({"port": 65536}, "port: expected 1 to 65535"),
        ({"port": -1}, "port: expected 1 to 65535"),
        ({"tls": True}, "tls: the embedded broker does not speak it"),
        ({"password": "tops3cret", "username": "a"}, "username is for an external broker"),
        ({"url": "mqtt://a:tops3cret@b"}, "an external broker, and only that, has a url"),
        ({"kind": "external", "url": "mqtt://a:tops3cret@b"}, "mqtt://***@b"),
        ({"kind": "external", "url": "ws://b"}, "WebSockets are not spoken here"),
        ({"kind": "external", "url": "mqtts://b", "key_file": "k"}, "key_file without cert_file"),
        ({"kind": "external", "url": "mqtt://b", "ca_file": "k"}, "ca_file is for TLS"),
    ],
)
def test_a_brokers_settings_are_refused_with_a_remedy_and_without_secrets(settings, text):
    with pytest.raises(ValueError, match=r"expected|external|url|TLS|key_file|tls") as caught:
        BrokerConfig(**settings)
    assert text in str(caught.value)
    assert "tops3cret" not in str(caught.value)


def test_a_run_whose_url_is_in_capitals_has_it_in_its_one_form_and_no_password_in_its_repr():
    broker = external("MQTTS://Broker", username="a", password="tops3cret")
    assert broker.address().secure
    assert broker.url == "mqtts://broker:8883"
    assert "tops3cret" not in repr(broker)


@pytest.fixture
def enroll(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*options: str, **changes: object) -> str:
        (tmp_path / "run.toml").write_text(config.template(changes=changes))
        monkeypatch.setattr("sys.argv", ["orchestrator", "enroll", "pi", *options])
        main.app(standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_the_kit_has_the_runs_chunk_bytes_and_the_url_is_said(enroll, tmp_path):
    said = enroll("--config", "run.toml", chunk_bytes=20_000)
    kit = tomllib.loads((tmp_path / "pi.toml").read_text())
    assert kit["chunk_bytes"] == 20_000
    assert kit["broker"]["url"] == "mqtt://127.0.0.1:1883"
    assert "pi.toml written, for the broker mqtt://127.0.0.1:1883" in said
    assert LOOPBACK in said


def test_a_kit_is_of_its_device_and_run_with_whatever_else_was_chosen(enroll, tmp_path):
    enroll("--config", "run.toml", "--packaged", "--set", "data=my images", "--set", "window=3",
           fleet="barn", **{"device.input": (1, 28, 28)})  # fmt: skip
    kit = tomllib.loads((tmp_path / "pi.toml").read_text())
    assert (kit["device"], kit["fleet"], kit["image"]) == ("pi", "barn", [1, 28, 28])
    assert (kit["data"], kit["state"]) == ("my images", "/var/lib/stillhouse/state")
    assert kit["window"] == 3
    assert kit["broker"]["username"] == "pi"
    assert kit["broker"]["password"] == enrolment.users(tmp_path / "runs", "barn")["pi"]
    assert (tmp_path / "pi.toml").stat().st_mode & 0o777 == 0o600


def test_a_url_that_is_set_is_the_one_that_is_said_and_asked_for_no_more(enroll, tmp_path):
    everywhere = {"broker.kind": "mosquitto", "broker.host": EVERYWHERE}
    said = enroll("--config", "run.toml", "--json", "--set", "broker.url=MQTTS://Barn",
                  **everywhere)  # fmt: skip
    told = json.loads(said)
    kit = tomllib.loads((tmp_path / "pi.toml").read_text())
    assert told["url"] == kit["broker"]["url"] == "mqtts://barn:8883"
    assert ["within 14 days" in note for note in told["notes"]] == [True]
    assert "username" not in kit["broker"] or not kit["broker"]["username"]
    assert kit["kit"]["authority"].startswith("-----BEGIN CERTIFICATE-----")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--url", "mqtt://a", "--set", "broker.url=mqtt://b"), "--url and --set broker.url both"),
        (("--set", "broker.url=barn"), "^--set broker.url 'barn': .*did you mean mqtt://barn"),
        (("--set", "device=other"), "^--set device: the name is the argument of enroll"),
        (("--set", "fleet=other"), "^--set fleet: a device is enrolled in the fleet of run.toml"),
        (("--set", "broker.username=me"), "^--set broker.username: a device logs in under the nam"),
        (("--set", "broker.password=x"), "^--set broker.password: enroll draws it"),
    ],
)
def test_what_enroll_settles_by_itself_is_not_set(enroll, tmp_path, options, text):
    with pytest.raises(SettingsError, match=text):
        enroll("--config", "run.toml", *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml"]


@pytest.mark.parametrize("key", ["ca_file", "cert_file", "key_file"])
def test_a_kit_with_a_claim_has_no_other_certificates(enroll, tmp_path, key):
    with pytest.raises(SettingsError, match=f"--set broker.{key}: the kit replaces it"):
        enroll("--config", "run.toml", "--url", "mqtts://barn", "--set", f"broker.{key}=a.pem",
               **{"broker.kind": "mosquitto", "broker.host": EVERYWHERE})  # fmt: skip
    assert not (tmp_path / "pi.toml").exists()


def test_a_bad_name_is_named_as_what_it_is(tmp_path):
    (tmp_path / "run.toml").write_text(config.template())
    arguments = ["enroll", "bad name", "--config", str(tmp_path / "run.toml")]
    with pytest.raises(StillhouseError, match=r"^device name 'bad name': use 1 to 64 letters"):
        main.app(arguments, standalone_mode=False)


def test_a_device_that_is_enrolled_again_keeps_its_password(enroll, tmp_path):
    for name in ("a.toml", "b.toml"):
        enroll("--config", "run.toml", "--out", name)
    first, second = (
        tomllib.loads((tmp_path / name).read_text())["broker"]["password"]
        for name in ("a.toml", "b.toml")
    )
    assert first == second == enrolment.users(tmp_path / "runs", "fleet")["pi"]


def test_who_is_revoked_is_on_no_list_and_in_no_password_file(enroll, tmp_path):
    enroll("--config", "run.toml")
    run = tmp_path / "run.toml"
    chosen = config.load(run)
    enrolment.enroll(chosen.runs, chosen.fleet, "other")
    folder = enrolment.broker_folder(chosen.runs, chosen.fleet)
    folder.mkdir(parents=True)
    (folder / "passwd").touch()
    runner = CliRunner()
    done = runner.invoke(main.app, ["revoke", "pi", "--config", str(run), "--json"])
    assert json.loads(done.output) == {"device": "pi", "fleet": chosen.fleet}
    assert enrolment.enrolled(chosen.runs, chosen.fleet) == {"other"}
    users = [line.partition(":")[0] for line in (folder / "passwd").read_text().splitlines()]
    assert users == ["orchestrator", "other"]
    with pytest.raises(RunError, match=r"'pi' is not enrolled in fleet '\w+'; other is"):
        runner.invoke(main.app, ["revoke", "pi", "--config", str(run)], catch_exceptions=False)
    with pytest.raises(RunError, match="reserved"):
        enrolment.revoke(chosen.runs, chosen.fleet, "orchestrator")


def test_a_script_is_told_what_was_written_as_json(enroll):
    told = json.loads(enroll("--config", "run.toml", "--json"))
    assert told.pop("notes")[0].startswith("the broker of these settings listens on 127.0.0.1")
    assert told == {
        "file": "pi.toml", "device": "pi", "fleet": "fleet", "url": "mqtt://127.0.0.1:1883",
    }  # fmt: skip


@pytest.mark.parametrize("wrong", ["thread=2", "threads=two", "threads=-1"])
def test_a_setting_that_cannot_be_enrolls_nobody(enroll, tmp_path, wrong):
    with pytest.raises(SettingsError, match="thread"):
        enroll("--config", "run.toml", "--set", wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml"]


def test_a_refused_url_enrolls_nobody_and_writes_nothing(enroll, tmp_path):
    for wrong in ("MQTT://", "mqtt://a:b@c", "mqtt://broker:0"):
        with pytest.raises(StillhouseError, match=r"^--url "):
            enroll("--config", "run.toml", "--url", wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml"]


def test_a_kit_that_cannot_be_written_is_told_so_and_enrolls_nobody(enroll, tmp_path):
    with pytest.raises(StillhouseError, match="name another with --out"):
        enroll("--config", "run.toml", "--out", "nowhere/pi.toml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml"]


def test_a_kit_is_not_left_of_a_device_that_is_not_enrolled(enroll, tmp_path, monkeypatch):
    def fail(*_):
        raise StalledError("full")

    monkeypatch.setattr(enrolment, "_write", fail)
    with pytest.raises(StalledError):
        enroll("--config", "run.toml")
    assert not (tmp_path / "pi.toml").exists()


def test_devices_that_are_enrolled_at_the_same_moment_all_stay(tmp_path, monkeypatch):
    """Each waits, before it writes, until the other has read the list: but it may not yet."""
    both_read, read = threading.Barrier(2), enrolment._read

    def meet(file):
        known = read(file)
        with contextlib.suppress(threading.BrokenBarrierError):
            both_read.wait(0.5)
        return known

    monkeypatch.setattr(enrolment, "_read", meet)
    with ThreadPoolExecutor() as threads:
        told = list(threads.map(lambda name: enrolment.enroll(tmp_path, "home", name), "ab"))
    monkeypatch.undo()
    known = enrolment.users(tmp_path, "home")
    assert [known.get("a"), known.get("b")] == told


@pytest.mark.parametrize("text", ["[]", "3", "{", json.dumps("a")])
def test_a_damaged_list_of_a_fleet_is_told_with_its_file(tmp_path, text):
    (tmp_path / "fleet-home.json").write_text(text)
    with pytest.raises(RunError, match="fleet-home"):
        enrolment.users(tmp_path, "home")


@pytest.mark.parametrize("pages", [0, 1])
def test_on_a_full_disk_nothing_is_left_in_the_way_of_the_next_try(disk: Disk, capsys, pages):
    path = disk.path / "run.toml"
    commands = [
        ["init", str(disk.path)],
        ["enroll", "pi", "--config", str(path), "--out", str(disk.path / "pi.toml")],
    ]
    for arguments in commands:
        disk.fill(leave=0 if arguments[0] == "init" else 4096 * pages)
        with pytest.raises(StalledError, match=f"the disk is full at {disk.path}/"):
            main.app(arguments, standalone_mode=False)
        disk.make_room()
        assert not list(disk.path.rglob("*.new"))
        main.app(arguments, standalone_mode=False)
    assert "pi.toml written" in capsys.readouterr().out
