"""Updates on the device: what the agent stages, and what root accepts of it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edge_agent.agent import Agent
from edge_agent.update import __main__ as root
from edge_agent.update import install, staging
from edge_agent.update.install import Failure
from edge_agent.update.install import Update as UnderWay
from edge_agent.update.repack import repack
from edge_agent.update.staging import Updates
from ondevice import config
from tests.hardware import debs
from wire import messages, release, signing
from wire.address import BrokerAddress
from wire.blobs import BlobStore
from wire.errors import ReleaseError, SettingsError
from wire.messages import Birth, Gone, Update
from wire.release import Package

CONTENT = bytes(range(256)) * 40  # ten chunks


@pytest.fixture
def key(tmp_path):
    return signing.own_key(tmp_path / "release.pem")


@pytest.fixture
def device(tmp_path, key):
    """The folder of a device whose agent was installed as a package."""
    (tmp_path / "package.json").write_text(
        '{"version": "0.1.0", "architecture": "arm64", "python": "3.11"}'
    )
    (tmp_path / "agent.toml").write_text(
        'device = "pi"\nfleet = "home"\ndata = "x"\nstate = "state"\nupdates = "update"\n'
        f'updates_kept = "cache"\nrelease_key = "{signing.public(key)}"\nwindow = 4\n'
        '[broker]\nurl = "mqtt://localhost"\n'
    )
    (tmp_path / "cache").mkdir()
    return tmp_path


def agent(device, **changes):
    settings = config.load(device / "agent.toml")
    return Updates(replace(settings, **changes), prefix=device)


def update(key, version="0.2.0", content=CONTENT, **changes):
    digest = hashlib.sha256(content).hexdigest()
    fields = {"architecture": "arm64", "python": "3.11", "size": len(content), "sha256": digest,
              "created": "", **changes}  # fmt: skip
    return Update(release.sign(key, Package(release.NAME, version, **fields)), 1024)


def pull(updates, store, now_s=0.0, most=1000):
    """Answer the agent's requests until it makes no more; return the number of chunks."""
    sent = 0
    while sent < most and (wants := [*updates.wants(now_s)]):
        for want in wants:
            for index in want.chunks[: most - sent]:
                part = type(want)(want.digest, want.chunk_bytes, (index,))
                store.answer(part, lambda m, b: updates.take(m, memoryview(b)))
                sent += 1
    return sent


@pytest.fixture
def store(tmp_path):
    store = BlobStore(tmp_path / "orchestrator", 1024)
    store.put(CONTENT)
    return store


def test_a_release_is_pulled_and_laid_out_whole(device, key, store):
    updates, told = agent(device), update(key)
    updates.told(told)
    assert not updates.news()
    assert pull(updates, store) == 10
    folder = device / "update"
    assert (folder / "ready").exists()
    assert (folder / "package.deb").read_bytes() == CONTENT
    assert release.parse((folder / "release.json").read_bytes(), "") == told.release
    assert updates.word == ""
    # Root has the package now: the agent does not pull it again if it is told of it again.
    updates.told(told)
    assert not updates.news()
    assert pull(updates, store) == 0


def test_a_pull_goes_on_where_an_agent_that_was_killed_left_it(device, key, store):
    first, second = agent(device), agent(device)
    first.told(update(key))
    assert pull(first, store, most=7) == 7
    assert not (device / "update/ready").exists()
    second.told(update(key))
    assert pull(second, store) == 3
    assert (device / "update/package.deb").read_bytes() == CONTENT


def test_questions_that_a_lost_connection_took_are_asked_again(device, key):
    updates = agent(device)
    updates.told(update(key))
    asked = [*updates.wants(0.0)]
    assert [*updates.wants(1.0)] == []
    updates.pause()
    assert [*updates.wants(2.0)] == asked


@pytest.mark.parametrize(
    ("changes", "settings", "text"),
    [
        ({"version": "0.1.0"}, {}, "no newer than 0.1.0"),
        ({"architecture": "amd64"}, {}, "is for architecture amd64"),
        ({}, {"release_key": ""}, "takes no updates"),
        ({}, {"release_key": "ed25519:" + "A" * 43 + "="}, "not signed by"),
        ({}, {"max_download_bytes": 100}, "raise max_download_bytes"),
        ({"version": "0.3.0"}, {}, "refused before: not healthy in 5 minutes"),
    ],
)
def test_what_is_not_taken_is_told_and_nothing_is_asked_for(changes, settings, text, device, key):
    install.refuse(device / "cache", "0.3.0", "not healthy in 5 minutes")
    updates = agent(device, **settings)
    updates.told(update(key, **changes))
    assert updates.news()
    assert text in updates.word
    assert [*updates.wants(0.0)] == []


def test_what_root_has_refused_is_told_until_something_newer_is_installed(device):
    install.refuse(device / "cache", "0.3.0", "not healthy in 5 minutes")
    assert agent(device).word == "0.3.0 is refused: not healthy in 5 minutes"
    text = (device / "package.json").read_text().replace("0.1.0", "0.4.0")
    (device / "package.json").write_text(text)
    assert agent(device).word == ""


def test_what_failed_is_told_and_pulled_again_after_a_day(device, key, store, monkeypatch):
    install.fail(device / "cache", "0.2.0", "no room")
    assert (device / "cache/last.json").stat().st_mode & 0o777 == 0o644
    updates = agent(device)
    assert updates.word == "0.2.0 failed: no room"
    updates.told(update(key))
    assert updates.news()
    assert "no room; it is tried again after a day" in updates.word
    assert pull(updates, store) == 0
    now = time.time()
    monkeypatch.setattr(install.time, "time", lambda: now + install.DAY_S)
    updates.told(update(key))
    assert pull(updates, store) == 10


def test_a_clock_that_went_back_keeps_no_version_away(device, key, store):
    at = time.time() + 1e6
    (device / "cache/last.json").write_text(
        json.dumps({"version": "0.2.0", "reason": "no room", "at": at})
    )
    updates = agent(device)
    updates.told(update(key))
    assert pull(updates, store) == 10


def test_what_root_has_let_lie_is_told(device, key, store):
    updates, told = agent(device), update(key)
    updates.told(told)
    pull(updates, store)
    os.utime(device / "update/ready", (time.time() - 1801,) * 2)
    updates.told(told)
    assert updates.news()
    assert "staged for over 30 minutes" in updates.word


def test_a_sender_that_lost_the_package_is_asked_again_in_its_next_session(device, key, store):
    updates, told = agent(device), update(key)
    updates.told(told)
    assert updates.take(Gone(told.blob.digest), memoryview(b""))
    assert "no longer has it" in updates.word
    assert [updates.news(), updates.news()] == [True, False]  # the orchestrator hears of it
    assert [*updates.wants(0.0)] == []
    assert not updates.take(Gone("00" * 32), memoryview(b""))  # belongs to an order
    updates.told(told)
    assert pull(updates, store) == 10


def test_an_agent_that_no_package_brought_takes_none(device, key):
    (device / "package.json").unlink()
    updates = agent(device)
    assert updates.own is None
    updates.told(update(key))
    assert not updates.news()
    for now_s in (0.0, 100.0):
        updates.turns(now_s)
        updates.lives(now_s)
    assert not (device / "update").exists()


def test_an_agent_is_well_when_it_was_connected_without_a_break(device):
    updates, healthy = agent(device), device / "update/healthy"
    for now_s in (0.0, 9.0):
        updates.lives(now_s)
    updates.pause()  # the connection is lost
    updates.lives(12.0)
    assert not healthy.exists()
    updates.lives(12.0 + staging.HEALTHY_S)
    assert json.loads(healthy.read_text())["version"] == "0.1.0"


def test_an_agent_whose_loop_turns_is_up_without_a_connection(device):
    updates, up = agent(device), device / "update/up"
    for now_s in (5.0, 14.0):
        updates.turns(now_s)
    updates.pause()
    assert not up.exists()
    updates.turns(5.0 + staging.UP_S)
    assert json.loads(up.read_text())["version"] == "0.1.0"
    assert not (device / "update/healthy").exists()


def test_an_agent_that_reaches_no_broker_is_up(device, monkeypatch):
    np.savez(device / "x.npz", x=np.zeros((2, 32, 32, 3), np.uint8), y=np.zeros(2, np.int64))
    settings = config.load(device / "agent.toml")
    nowhere = BrokerAddress("mqtt://127.0.0.1:1")
    settings = replace(settings, data=device / "x.npz", broker=nowhere)
    monkeypatch.setattr(staging, "UP_S", 0.0)
    made = Agent(settings)
    made._updates = Updates(settings, prefix=device)
    up = device / "update/up"

    def watch():
        deadline = time.monotonic() + 300
        while not up.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        made.stop()

    watching = threading.Thread(target=watch)
    watching.start()
    made.run()
    watching.join()
    assert json.loads(up.read_text())["version"] == "0.1.0"


def test_a_pull_that_fails_is_told_in_a_birth(device, key, monkeypatch):
    np.savez(device / "x.npz", x=np.zeros((2, 32, 32, 3), np.uint8), y=np.zeros(2, np.int64))
    made = Agent(replace(config.load(device / "agent.toml"), data=device / "x.npz"))
    sent = []
    link = SimpleNamespace(connected=True, publish=lambda _, payload, **__: sent.append(payload))
    monkeypatch.setattr(made, "link", link)
    made._presence._updates = made._updates = updates = agent(device)
    told = update(key)
    made._received(told, memoryview(b""))
    made._tick()
    made._received(Gone(told.blob.digest), memoryview(b""))
    made._tick()
    made._tick()
    births = [m for m, _ in (messages.decode(each, sender="pi") for each in sent)
              if isinstance(m, Birth)]  # fmt: skip
    assert [birth.update for birth in births] == [updates.word]
    made._folder.close()


def test_a_description_that_cannot_be_read_is_one_line(device):
    (device / "package.json").unlink()
    (device / "package.json").mkdir()
    with pytest.raises(SettingsError, match="install the package again"):
        staging.installed(device)


@pytest.fixture
def staged(device):
    folder = device / "update"
    folder.mkdir()
    (folder / "package.deb").write_bytes(CONTENT)
    return folder


def test_root_takes_the_package_that_was_released(device, staged, key):
    root.take(staged, update(key).release.package, device / "cache/new.deb")
    assert (device / "cache/new.deb").read_bytes() == CONTENT
    assert (device / "cache/new.deb").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (CONTENT[:-1], f"expected {len(CONTENT)} bytes, got {len(CONTENT) - 1}"),
        (CONTENT + b"x", f"expected {len(CONTENT)} bytes, got more"),
        (b"x" + CONTENT[1:], "expected SHA-256"),
    ],
)
def test_root_takes_no_file_that_is_cut_off_longer_or_another(content, text, device, staged, key):
    (staged / "package.deb").write_bytes(content)
    with pytest.raises(ReleaseError, match=text):
        root.take(staged, update(key).release.package, device / "cache/new.deb")
    assert [*(device / "cache").iterdir()] == []


@pytest.mark.parametrize("attack", ["link", "pipe", "folder", "linked folder", "nothing"])
def test_root_follows_no_link_and_waits_for_no_pipe(attack, device, staged, key):
    secret = device / "secret"
    secret.write_bytes(CONTENT)
    path = staged / "package.deb"
    path.unlink()
    if attack == "link":
        path.symlink_to(secret)
    elif attack == "pipe":
        os.mkfifo(path)
    elif attack == "folder":
        path.mkdir()
    elif attack == "linked folder":
        secret.rename(device / "package.deb")
        staged.rmdir()
        staged.symlink_to(device)
    with pytest.raises(OSError):  # noqa: PT011 - which error depends on the system
        root.take(staged, update(key).release.package, device / "cache/new.deb")
    assert [*(device / "cache").iterdir()] == []


def test_root_removes_no_file_through_a_linked_folder(device, staged):
    (device / "ready").touch()
    (staged / "package.deb").unlink()
    staged.rmdir()
    staged.symlink_to(device)
    install.remove_staged(staged, "ready")
    assert (device / "ready").exists()


def test_settings_that_others_may_write_hold_no_release_key(device):
    path = device / "agent.toml"
    if os.geteuid() == 0:
        assert root.trusted(path).release_key
        device.chmod(0o775)
        with pytest.raises(SettingsError, match="can be written by others than root"):
            root.trusted(path)
        device.chmod(0o755)
        os.chown(path, 12345, -1)
    with pytest.raises(SettingsError, match="can be written by others than root"):
        root.trusted(path)
    with pytest.raises(SettingsError, match="there is no release key"):
        root.trusted(device / "nowhere.toml")


def test_root_reads_of_the_settings_what_it_needs_alone(device):
    path = device / "agent.toml"
    text = path.read_text().replace("mqtt://localhost", 'mqtts://h"\nca_file = "nowhere.pem')
    path.write_text("update_minutes = 7\n" + text)
    with pytest.raises(SettingsError):
        config.load(path)
    if os.geteuid() == 0:
        assert root.trusted(path).update_minutes == 7
        path.write_text("update_minutes = 0\n" + text)
        with pytest.raises(SettingsError, match="update_minutes: expected over 0"):
            root.trusted(path)


def test_room_is_made_before_anything_is_taken(tmp_path):
    root.check_room(tmp_path, 1)
    with pytest.raises(OSError, match=r"an update needs .* MiB free, there are"):
        root.check_room(tmp_path, 1 << 60)


def test_what_keeps_the_old_version_from_being_packed_up_is_no_release_error(tmp_path):
    with pytest.raises(OSError, match="dpkg-query"):
        repack("stillhouse-nothing", tmp_path / "old.deb")
    assert [*tmp_path.iterdir()] == []


@pytest.fixture
def deb(tmp_path):
    """A real package file, of a version that was never released."""
    return debs.unreleased(tmp_path)


def test_a_package_is_refused_for_its_fields_and_not_for_a_tool_that_failed(device, key, deb):
    package, cache = update(key).release.package, device / "cache"
    root.check_fields(deb, replace(package, version="9"), cache)
    with pytest.raises(OSError, match="dpkg-deb failed"):
        root.check_fields(device / "nowhere.deb", package, cache)
    assert install.refused(cache) == {}
    with pytest.raises(ReleaseError, match=r"released as Version 0\.2\.0, and is '9'"):
        root.check_fields(deb, package, cache)
    assert "0.2.0" in install.refused(cache)


def test_roots_half_that_fails_says_so_in_one_line_and_to_the_agent(device, staged, key, capsys):
    (staged / "ready").touch()
    (staged / "release.json").write_bytes(release.dump(update(key).release))
    (device / "agent.toml").write_text("]")
    install_lock = device / "lock"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(install, "DPKG_LOCK", install_lock)
        assert root.main(device / "agent.toml", device / "cache", staged) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [*staged.iterdir()] == []  # so systemd does not start it again
    assert install.last(device / "cache").version == "0.2.0"
    (device / "file").touch()
    assert root.main(device / "agent.toml", device / "file", staged) == 1


def test_nothing_is_installed_while_root_packs_up_what_there_is(device, staged, key, monkeypatch):
    (staged / "release.json").write_bytes(release.dump(update(key).release))
    monkeypatch.setattr(install, "DPKG_LOCK", device / "lock")
    script = (
        f"import fcntl; fcntl.lockf(open({str(device / 'lock')!r}, 'ab'), 6)"  # without waiting
    )
    command = [sys.executable, "-c", script]

    def another_can(*_):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    within = []
    monkeypatch.setattr(root, "prepare", lambda *_: within.append(another_can()))
    assert root.main(device / "agent.toml", device / "cache", staged) == 0
    assert (within, another_can()) == ([False], True)


def test_a_package_of_an_odd_version_is_one_line(device, staged, key, monkeypatch):
    if os.geteuid():
        pytest.skip("settings must be root's")
    monkeypatch.setattr(install, "installed", lambda: ("1:odd", "arm64"))
    with pytest.raises(ReleaseError, match="the installed package: version: expected"):
        root.prepare(update(key).release, device / "agent.toml", device / "cache", staged)


class PowerCut(BaseException):
    """The power is cut."""


class Machine:
    """A device whose power is cut at the `cut`-th write or installation."""

    def __init__(self, device, monkeypatch, good, cut=-1):
        self.cache, self.staged, self.good = device / "cache", device / "update", good
        self.version, self.count, self.cut, self.up = "0.1.0", 0, cut, False
        self.staged.mkdir()
        for name in ("old.deb", "new.deb"):
            (self.cache / name).write_text({"old.deb": "0.1.0", "new.deb": "0.2.0"}[name])
        write = install.write
        monkeypatch.setattr(install, "POLL_S", 0.001)
        monkeypatch.setattr(install, "DPKG_LOCK", device / "lock")
        monkeypatch.setattr(install, "_dpkg", lambda deb: self.step(self.install, deb))
        monkeypatch.setattr(install, "installed", lambda: (self.version, "arm64"))
        monkeypatch.setattr(install, "write", lambda *given: self.step(write, *given))

    def step(self, does, *given):
        self.count += 1
        if self.count == self.cut:
            raise PowerCut
        result = does(*given)
        self.count += 1
        if self.count == self.cut:
            raise PowerCut
        return result

    def install(self, deb):
        self.version = deb.read_text()
        if self.up:
            (self.staged / "up").write_text(json.dumps({"version": self.version}))
        if self.good or self.version == "0.1.0":  # its service starts, and the agent is well
            (self.staged / "healthy").write_text(json.dumps({"version": self.version}))

    def run(self):
        """Start it again until it ends by itself."""
        install.begin(UnderWay("0.2.0", "0.1.0", minutes=0.0005), self.cache)
        for _ in range(3):
            try:
                assert install.resume(self.cache, self.staged) == 0
            except PowerCut:
                continue
            return
        pytest.fail("it does not end")


@pytest.mark.parametrize("good", [True, False])
def test_a_power_cut_at_any_point_changes_nothing_of_the_outcome(device, monkeypatch, good):
    cut = 5  # nothing is recorded before that
    while True:
        with monkeypatch.context() as patch:
            machine = Machine(device, patch, good, cut)
            machine.run()
        assert machine.version == ("0.2.0" if good else "0.1.0"), cut
        refused = install.refused(machine.cache)
        assert refused == ({} if good else {"0.2.0": "not healthy in 0.0005 minutes"}), cut
        left = {path.name for path in machine.cache.iterdir()} - {"refused.json"}
        assert left == {"install.py", "old.deb"}, cut
        for folder in (machine.cache, machine.staged):
            for path in folder.iterdir():
                path.unlink()
        machine.staged.rmdir()
        if machine.count < cut:
            break
        cut += 1
    assert cut > 10


def test_an_update_that_never_comes_to_its_end_is_rolled_back(device, monkeypatch):
    machine = Machine(device, monkeypatch, good=True)
    install.begin(UnderWay("0.2.0", "0.1.0", 1.0), machine.cache)
    monkeypatch.setattr(install, "_dpkg", lambda _: (_ for _ in ()).throw(PowerCut))
    for _ in range(install.RUNS):
        with pytest.raises(PowerCut):
            install.resume(machine.cache, machine.staged)
    monkeypatch.setattr(install, "_dpkg", machine.install)
    assert install.resume(machine.cache, machine.staged) == 0
    assert machine.version == "0.1.0"
    assert install.refused(machine.cache) == {}  # somebody may just have pulled the plug
    assert install.last(machine.cache).reason == "interrupted 3 times"
    assert install.last(machine.cache).waits("0.2.0")


def test_a_version_that_runs_while_the_broker_is_away_is_waited_for(device, monkeypatch, capsys):
    machine = Machine(device, monkeypatch, good=False)
    machine.up = True
    asked = []

    def installed():
        asked.append(machine.version)
        if len(asked) == 4:  # the broker is back, after more than twice `update_minutes`
            (machine.staged / "healthy").write_text(json.dumps({"version": "0.2.0"}))
        return machine.version, "arm64"

    monkeypatch.setattr(install, "installed", installed)
    machine.run()
    assert machine.version == "0.2.0"
    said = capsys.readouterr().err
    assert said.count("runs, but is not connected") == 1
    assert "0.2.0 is well" in said


def test_a_version_that_never_connected_goes_back_and_is_tried_again(device, monkeypatch):
    machine = Machine(device, monkeypatch, good=False)
    machine.up = True
    monkeypatch.setattr(install, "DAY_S", 0.2)
    machine.run()
    assert machine.version == "0.1.0"
    assert install.refused(machine.cache) == {}
    last = install.last(machine.cache)
    assert (last.version, "for a day" in last.reason) == ("0.2.0", True)


def test_a_version_that_is_well_ends_what_was_told_of_a_failure(device, monkeypatch):
    machine = Machine(device, monkeypatch, good=True)
    install.fail(machine.cache, "0.2.0", "no room")
    machine.run()
    assert install.last(machine.cache) is None


@pytest.mark.parametrize("step", ["install", "wait", "rollback"])
def test_a_version_that_was_installed_by_hand_is_not_overwritten(step, device, monkeypatch, capsys):
    machine = Machine(device, monkeypatch, good=True)
    install.begin(UnderWay("0.2.0", "0.1.0", 0.0005, step=step), machine.cache)
    machine.version = "0.5.0"
    assert install.resume(machine.cache, machine.staged) == 0
    assert machine.version == "0.5.0"
    assert "0.5.0 was installed meanwhile" in capsys.readouterr().err
    assert install.refused(machine.cache) == ({"0.2.0": ""} if step == "rollback" else {})
    assert not (machine.cache / "update.json").exists()


def test_a_disk_that_takes_no_note_does_not_keep_the_old_version_away(device, monkeypatch):
    machine = Machine(device, monkeypatch, good=False)
    install.begin(UnderWay("0.2.0", "0.1.0", 0.0005), machine.cache)

    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    there = []
    monkeypatch.setattr(install, "write", full)
    monkeypatch.setattr(
        install, "_dpkg",
        lambda deb: there.append((machine.cache / "new.deb").exists()) or machine.install(deb),
    )  # fmt: skip
    assert install.resume(machine.cache, machine.staged) == 0
    assert machine.version == "0.1.0"
    assert there == [True, False]  # the new package was removed before the old one was installed


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', "\0\0"])
def test_a_damaged_note_is_one_line_and_is_removed(text, device, monkeypatch, capsys):
    machine = Machine(device, monkeypatch, good=True)
    (machine.cache / "update.json").write_text(text)
    assert install.resume(machine.cache, machine.staged) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (machine.cache / "update.json").exists()
    assert machine.version == "0.1.0"


def test_an_old_version_that_cannot_come_back_is_told(device, monkeypatch):
    machine = Machine(device, monkeypatch, good=False)
    install.begin(UnderWay("0.2.0", "0.1.0", 1.0, step="rollback"), machine.cache)
    monkeypatch.setattr(install, "_dpkg", lambda _: Failure("broken", refuse=True))
    assert install.resume(machine.cache, machine.staged) == 1
    assert (machine.cache / "update.json").exists()  # so it is tried again
    text = (device / "package.json").read_text().replace("0.1.0", "0.2.0")
    (device / "package.json").write_text(text)
    assert agent(device).word == "failed: 0.1.0 cannot be installed again: broken"
    monkeypatch.setattr(install, "_dpkg", machine.install)
    assert install.resume(machine.cache, machine.staged) == 0
    assert agent(device).word == ""


def dpkg(script, path):
    return install._dpkg(path, ("sh", "-c", script, "sh"))


def test_dpkg_that_hangs_is_ended_with_its_scripts_and_speaks_against_the_package(
    tmp_path, monkeypatch
):
    pid, patience_s = tmp_path / "pid", 0.5
    while not (pid.exists() and pid.read_text()):  # repeats if the shell starts too slowly
        monkeypatch.setattr(install, "DPKG_S", patience_s)
        failure = dpkg('sleep 3600 & echo $! > "$1"; wait', pid)
        patience_s *= 4
    assert failure is not None
    assert (failure.refuse, "did not end" in failure.reason) == (True, True)
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    deadline = time.monotonic() + 60
    with suppress(FileNotFoundError):  # otherwise it is dead, but has not been reaped
        while " Z " not in state.read_text():
            assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("script", "refuse"),
    [
        ("echo post-installation script failed >&2; exit 1", True),
        ("echo cannot write: No space left on device >&2; exit 1", False),
        (f"kill -{signal.SIGKILL} $$", False),
    ],
)
def test_dpkg_fails_for_the_package_or_for_the_device(script, refuse, tmp_path):
    failure = dpkg(script, tmp_path)
    assert failure is not None
    assert failure.refuse == refuse
    assert dpkg("exit 0", tmp_path) is None


def test_what_works_while_dpkg_replaces_the_rest_needs_the_standard_library_alone(tmp_path):
    install.begin(UnderWay("0.2.0", "0.1.0", 1.0), tmp_path)
    script = f"import runpy; runpy.run_path({str(tmp_path / 'install.py')!r}, run_name='copy')"
    command = [sys.executable, "-I", "-S", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
