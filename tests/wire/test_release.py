"""A device takes only its own kind of package, newer than its own, signed by its operator."""

import shutil
import subprocess
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wire import records, release, signing
from wire.errors import ReleaseError, SignatureError
from wire.release import Build, Package

OWN = Build("0.1.0+py311", "arm64", "3.11")
NEWER = Package(
    "stillhouse-edge-agent", "0.2.0+py311", "arm64", "3.11", 100, "ab" * 32, "2026-01-01"
)
VERSIONS = st.from_regex(r"[0-9][0-9a-zA-Z.+~]{0,6}(-[0-9a-zA-Z.+~]{1,4})?", fullmatch=True)


@pytest.fixture
def key(tmp_path):
    return signing.own_key(tmp_path / "release.pem")


def check(signed, key, *, own=OWN, refused=None):
    release.check(signed, own, key=signing.public(key), refused=refused or {})


def test_a_newer_package_of_the_operator_is_taken_as_it_comes_back_from_its_file(key):
    signed = release.sign(key, NEWER)
    assert release.parse(release.dump(signed), "file") == signed
    check(signed, key)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": "other"}, "expected a package stillhouse-edge-agent"),
        ({"architecture": "amd64"}, "is for architecture amd64, this device has arm64"),
        ({"python": "3.13"}, "is for python 3.13, this device has 3.11"),
        ({"version": "0.1.0+py311"}, "no newer than 0.1.0"),
        ({"version": "0.0.9+py311"}, "no newer than 0.1.0"),
        ({"version": "0.2.0~rc1+py311"}, "refused before: not healthy"),
    ],
)
def test_a_package_that_is_signed_and_unfit_is_refused_with_the_reason(change, text, key):
    signed = release.sign(key, replace(NEWER, **change))
    with pytest.raises(ReleaseError, match=text):
        check(signed, key, refused={"0.2.0~rc1+py311": "not healthy"})


@pytest.mark.parametrize(
    "change", [{"version": "0.3.0+py311"}, {"sha256": "cd" * 32}, {"size": 101}, {"created": ""}]
)
def test_what_was_changed_after_signing_is_refused(change, key):
    signed = release.sign(key, NEWER)
    with pytest.raises(SignatureError, match="not signed by"):
        check(replace(signed, package=replace(NEWER, **change)), key)


def test_another_key_no_signature_and_one_of_another_kind_are_refused(key, tmp_path):
    other = signing.own_key(tmp_path / "other.pem")
    canonical = records.canonical(NEWER)
    for signature in (
        release.sign(other, NEWER).signature,
        "",
        signing.sign(key, "stillhouse-measure/1", canonical),
    ):
        with pytest.raises(SignatureError, match="not signed by"):
            check(release.Release(NEWER, signature), key)


def test_a_device_without_a_release_key_takes_nothing(key):
    with pytest.raises(ReleaseError, match=r"release_key of agent\.toml is empty"):
        release.check(release.sign(key, NEWER), OWN, key="", refused={})


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "expected a table"),
        (b'{"signature": ""}', "'package' is missing"),
        (
            release.dump(release.Release(NEWER, "")).replace(b"0.2.0", b"../2"),
            "version: expected one of Debian",
        ),
    ],
)
def test_a_file_that_is_no_release_names_itself(data, text):
    with pytest.raises(ReleaseError, match=text) as caught:
        release.parse(data, "x.deb.release.json")
    assert "x.deb.release.json" in str(caught.value)


@settings(max_examples=200)
@given(VERSIONS, VERSIONS)
@example("0", "0~")
@example("1.0", "1.0-0")
@example("1.0", "1.0.0~1")
def test_versions_are_ordered_as_dpkg_orders_them(a, b):
    if shutil.which("dpkg") is None:
        pytest.skip("dpkg is not here to be compared with")
    done = subprocess.run(["dpkg", "--compare-versions", a, "gt", b], check=False)
    assert release.newer(a, b) == (done.returncode == 0)
