"""Updates on the device: what the agent stages, and what root believes of it."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from edge_agent import config
from edge_agent.update import __main__ as root
from edge_agent.update import install, staging
from edge_agent.update.install import Update as UnderWay
from edge_agent.update.staging import Updates
from wire import release, signing
from wire.blobs import BlobStore
from wire.errors import ReleaseError, SettingsError
from wire.messages import Gone, Update
from wire.release import Package

CONTENT = bytes(range(256)) * 40  # ten chunks


@pytest.fixture
def key(tmp_path):
    return signing.own_key(tmp_path / "release.pem")


@pytest.fixture
def device(tmp_path, key):
    """The folder of a device whose agent came by a package."""
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
    """Answer what it asks for, until it is done; how many chunks that took."""
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
    assert not updates.told(told)
    assert pull(updates, store) == 10
    folder = device / "update"
    assert (folder / "ready").exists()
    assert (folder / "package.deb").read_bytes() == CONTENT
    assert release.parse((folder / "release.json").read_bytes(), "") == told.release
    assert updates.word == ""
    # Root is at it: it is not pulled again, whoever tells of it.
    assert not updates.told(told)
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
    assert updates.told(update(key, **changes))
    assert text in updates.word
    assert [*updates.wants(0.0)] == []


def test_what_root_has_refused_is_told_until_something_newer_is_installed(device):
    install.refuse(device / "cache", "0.3.0", "not healthy in 5 minutes")
    assert agent(device).word == "0.3.0 is refused: not healthy in 5 minutes"
    text = (device / "package.json").read_text().replace("0.1.0", "0.4.0")
    (device / "package.json").write_text(text)
    assert agent(device).word == ""


def test_a_sender_that_lost_the_package_is_asked_again_in_its_next_session(device, key, store):
    updates, told = agent(device), update(key)
    updates.told(told)
    assert updates.take(Gone(told.blob.digest), memoryview(b""))
    assert "no longer has it" in updates.word
    assert [*updates.wants(0.0)] == []
    assert not updates.take(Gone("00" * 32), memoryview(b""))  # an order's
    updates.told(told)
    assert pull(updates, store) == 10


def test_an_agent_that_no_package_brought_takes_none(device, key):
    (device / "package.json").unlink()
    updates = agent(device)
    assert updates.own is None
    assert not updates.told(update(key))
    updates.lives(0.0)
    updates.lives(100.0)
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
    with pytest.raises(OSError):  # noqa: PT011 - which one is the system's affair
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


class PowerCut(BaseException):
    """Everything ends."""


class Machine:
    """A device whose power is cut at the `cut`-th thing that is written or installed."""

    def __init__(self, device, monkeypatch, good, cut=-1):
        self.cache, self.staged, self.good = device / "cache", device / "update", good
        self.version, self.count, self.cut = "0.1.0", 0, cut
        self.staged.mkdir()
        for name in ("old.deb", "new.deb"):
            (self.cache / name).write_text({"old.deb": "0.1.0", "new.deb": "0.2.0"}[name])
        write = install.write
        monkeypatch.setattr(install, "POLL_S", 0.001)
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
        if self.good or self.version == "0.1.0":  # its service starts, and the agent is well
            (self.staged / "healthy").write_text(json.dumps({"version": self.version}))
        return ""

    def run(self):
        """Start it until it ends by itself."""
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
    cut = 5  # before that nothing is noted
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
    assert install.refused(machine.cache) == {"0.2.0": "interrupted 3 times"}


def test_what_someone_installs_meanwhile_is_left_alone(device, monkeypatch, capsys):
    machine = Machine(device, monkeypatch, good=False)
    install.begin(UnderWay("0.2.0", "0.1.0", 0.0005), machine.cache)
    monkeypatch.setattr(install, "installed", lambda: ("0.5.0", "arm64"))
    assert install.resume(machine.cache, machine.staged) == 0
    assert "0.5.0 was installed meanwhile" in capsys.readouterr().err
    assert machine.version == "0.2.0"
    assert install.refused(machine.cache) == {}


def test_what_works_while_dpkg_replaces_the_rest_needs_the_standard_library_alone(tmp_path):
    install.begin(UnderWay("0.2.0", "0.1.0", 1.0), tmp_path)
    script = f"import runpy; runpy.run_path({str(tmp_path / 'install.py')!r}, run_name='copy')"
    command = [sys.executable, "-I", "-S", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
