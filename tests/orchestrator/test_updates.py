"""Who is told of a release, and when: canaries first, each device once an hour in a session."""

import hashlib

import pytest

from hardware import release as releasing
from orchestrator.config import ReleaseConfig
from orchestrator.fleet import updates
from orchestrator.fleet.updates import Rollout
from tests.hardware import debs
from wire import __version__, release, signing
from wire.blobs import BlobStore
from wire.errors import ReleaseError, SettingsError, SignatureError
from wire.messages import Birth, Platform, Update
from wire.release import Build, Package, Release

MACHINE = Platform("Pi", "aarch64", 4, 2**30, "3.11", "1.31")
OLD, NEW = Build("0.1.0", "arm64", "3.11"), Build("0.2.0", "arm64", "3.11")


def update(version, architecture="arm64", python="3.11"):
    package = Package(release.NAME, version, architecture, python, 10, "ab" * 32, "")
    return Update(Release(package, "signature"), 1024)


def birth(device, package, session=1, state_id=""):
    return Birth(device, session, "0.1.0", 10, "cd" * 32, MACHINE, package, state_id=state_id)


def told(state, now_s):
    state, tell = updates.ticked(state, now_s)
    return state, {device: told.release.package.version for device, told in tell}


def test_a_device_is_told_at_once_and_after_an_hour_of_the_newest_that_fits_it():
    fits = [update("0.2.0"), update("0.2.1"), update("0.1.9")]
    state = Rollout((*fits, update("9", "amd64"), update("9", python="3.13")))
    state = updates.born(state, "pi", birth("pi", OLD), 0.0)
    state, tell = told(state, 0.0)
    assert tell == {"pi": "0.2.1"}
    state = updates.born(state, "pi", birth("pi", OLD), 1.0)  # it answers a hello
    assert told(state, 1.0)[1] == {}
    assert told(state, 3599.0)[1] == {}
    state, tell = told(state, 3600.0)
    assert tell == {"pi": "0.2.1"}
    assert told(state, 3600.0)[1] == {}
    state = updates.born(state, "pi", birth("pi", OLD, session=2), 3602.0)
    assert told(state, 3602.0)[1] == {"pi": "0.2.1"}


def test_a_tick_with_nothing_to_do_looks_at_no_device_and_no_version(monkeypatch):
    state = Rollout((update("0.2.0"),), frozenset({"a"}), settle_s=600.0)
    for device, package in (("a", OLD), ("pi", OLD), ("new", NEW)):
        state = updates.born(state, device, birth(device, package), 0.0)
    monkeypatch.setattr(release, "newer", lambda *_: pytest.fail("versions are compared at birth"))
    assert state.tell_s.keys() == {"a", "pi"}
    state, tell = told(state, 0.0)
    assert tell == {"a": "0.2.0"}
    assert updates.ticked(state, 0.5)[0] is state
    assert updates.ticked(state, 1.0)[0] is not state  # the canary is watched


@pytest.mark.parametrize("package", [None, NEW, Build("0.3.0", "arm64", "3.11"),
                                     Build("0.1.0", "amd64", "3.11")])  # fmt: skip
def test_a_device_that_needs_no_update_or_says_of_no_package_is_told_nothing(package):
    state = updates.born(Rollout((update("0.2.0"),)), "pi", birth("pi", package), 0.0)
    assert told(state, 0.0)[1] == {}


def test_others_are_told_when_every_canary_has_been_well_for_long_enough():
    state = Rollout((update("0.2.0"),), frozenset({"a", "b"}), settle_s=600.0)
    for device in ("a", "b", "pi"):
        state = updates.born(state, device, birth(device, OLD), 0.0)
    state, tell = told(state, 1e6)  # the time with the old version does not count
    assert tell == {"a": "0.2.0", "b": "0.2.0"}
    state = updates.born(state, "a", birth("a", NEW, 2), 1e6)
    state = updates.born(state, "b", birth("b", NEW, 2), 1e6 + 300)
    assert told(state, 1e6 + 899)[1] == {}
    assert told(state, 1e6 + 900)[1] == {"pi": "0.2.0"}


def test_a_canary_that_is_rolled_back_or_away_holds_the_others():
    state = Rollout((update("0.2.0"),), frozenset({"a"}), settle_s=600.0)
    state = updates.born(state, "pi", birth("pi", OLD), 0.0)
    waits, tell = told(state, 1e6)  # it is offline
    assert (tell, waits.held_by) == ({}, "a")
    state = updates.born(state, "a", birth("a", NEW, 2), 0.0)
    back = updates.born(state, "a", birth("a", OLD, 3), 300.0)
    assert "pi" not in told(back, 1e6)[1]
    away = updates.died(state, "a", 2)
    assert told(away, 1e6)[1] == {}
    there = updates.died(state, "a", 1)  # the will of the previous session
    there, tell = told(there, 1e6)
    assert (tell, there.held_by) == ({"pi": "0.2.0"}, "")


@pytest.fixture
def deb(tmp_path):
    path = tmp_path / "agent.deb"
    path.write_bytes(b"package")
    return path


def sign(deb, key, version=f"{__version__}+py311"):
    content = deb.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    package = Package(release.NAME, version, "arm64", "3.11", len(content), digest, "")
    release.beside(deb).write_bytes(release.dump(release.sign(key, package)))


def test_packages_are_verified_before_a_run_begins(tmp_path, deb):
    key = signing.own_key(tmp_path / "key.pem")
    config = ReleaseConfig(signing.public(key), (deb,))
    blobs = BlobStore(tmp_path / "blobs", 1024)
    with pytest.raises(ReleaseError, match=r"python -m hardware\.release .*agent\.deb --key"):
        updates.read(config, blobs)
    sign(deb, key)
    (read,) = updates.read(config, blobs).updates
    assert blobs.path(read.blob.digest).read_bytes() == b"package"
    deb.write_bytes(b"another")
    with pytest.raises(ReleaseError, match="of its release, got"):
        updates.read(config, blobs)
    sign(deb, signing.own_key(tmp_path / "other.pem"))
    with pytest.raises(SignatureError, match="not signed by"):
        updates.read(config, blobs)


def test_devices_are_not_updated_past_the_orchestrator(tmp_path, deb):
    key = signing.own_key(tmp_path / "key.pem")
    sign(deb, key, f"{__version__}.1+py311")
    with pytest.raises(ReleaseError, match="update the orchestrator first"):
        updates.read(ReleaseConfig(signing.public(key), (deb,)), BlobStore(tmp_path, 1024))
    sign(deb, key, f"{__version__}+py311.1")  # the same version, built again
    assert updates.read(ReleaseConfig(signing.public(key), (deb,)), BlobStore(tmp_path, 1024))


def test_a_canary_that_may_not_take_part_is_refused_before_a_run_begins(tmp_path):
    config, blobs = ReleaseConfig(canary=("pi", "pj")), BlobStore(tmp_path, 1024)
    with pytest.raises(SettingsError, match=r"canary: 'pj' .* orchestrator enroll pj"):
        updates.read(config, blobs, enrolled=frozenset({"pi"}))
    assert updates.read(config, blobs, enrolled=frozenset({"pi", "pj"})).canary == {"pi", "pj"}
    assert updates.read(config, blobs).canary  # any device may be a canary


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"packages": ("x.deb",)}, "name the public key"),
        ({"key": "ed25519:AAAA"}, r"release\.key: expected a public key"),
        ({"settle_minutes": -1.0}, "settle_minutes: expected 0 or more"),
    ],
)
def test_a_rollout_that_cannot_be_is_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        ReleaseConfig(**settings)


def test_what_is_no_package_of_the_agent_is_not_signed(tmp_path, capsys):
    other = tmp_path / "other.deb"
    other.write_bytes(b"!<arch>\n")
    key = tmp_path / "key.pem"
    assert releasing.main([str(other), "--key", str(key)]) == 2
    assert "not a Debian package" in capsys.readouterr().err
    assert not key.exists()


def test_a_folder_that_takes_no_signature_is_one_line(tmp_path, capsys):
    """A folder has the signature's name, so that even root cannot write the file."""
    deb = debs.unreleased(tmp_path)
    release.beside(deb).mkdir()
    assert releasing.main([str(deb), "--key", str(tmp_path / "key.pem")]) == 2
    assert capsys.readouterr().err.startswith("release: ")
    release.beside(deb).rmdir()
    assert releasing.main([str(deb), "--key", str(tmp_path / "key.pem")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "tree", "x.deb", "x.deb.release.json", "key.pem"
    }  # fmt: skip


def test_a_device_with_a_new_state_folder_is_told_though_its_sessions_begin_anew():
    state = updates.born(Rollout((update("0.2.0"),)), "pi", birth("pi", OLD, 9, "ab"), 0.0)
    state, _ = told(state, 0.0)
    state = updates.born(state, "pi", birth("pi", OLD, 1, "cd"), 1.0)
    assert told(state, 1.0)[1] == {"pi": "0.2.0"}
    assert updates.died(state, "pi", 9, "ab") == state
    assert updates.died(state, "pi", 1, "cd").seen == {}
