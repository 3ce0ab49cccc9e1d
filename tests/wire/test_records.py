"""Paths as people write them: `~` is the home folder, in settings and on command lines."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from wire import records
from wire.errors import SettingsError


@dataclass(frozen=True)
class Inner:
    ca_file: Path | None = None


@dataclass(frozen=True)
class Settings:
    data: Path
    packages: tuple[Path, ...] = ()
    inner: Inner = Inner()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def read(table):
    return records.build(Settings, table, where="agent.toml", error=SettingsError)


def test_every_path_setting_is_expanded(home):
    table = {"data": "~/images", "packages": ["~/a.deb", "b.deb"], "inner": {"ca_file": "~/ca.pem"}}
    assert read(table) == Settings(
        home / "images", (home / "a.deb", Path("b.deb")), Inner(home / "ca.pem")
    )
    assert read({"data": "~"}).data == home
    assert read({"data": "a/~/b~"}).data == Path("a/~/b~")


def test_a_home_that_is_not_there_is_said():
    with pytest.raises(SettingsError, match=r"agent\.toml: data: '~nobody-x/images': .*\./~nobody"):
        read({"data": "~nobody-x/images"})
    with pytest.raises(SettingsError, match=r"--data: '~nobody-x': expected the home folder"):
        records.expanded(["--data=~nobody-x"])


def test_arguments_are_expanded_where_shells_leave_them(home):
    given = ["run", "--config=~/agent.toml", "~/x", "--size", "a~b", "--", "-v", "--name=a=~/b"]
    expected = ["run", f"--config={home}/agent.toml", f"{home}/x", *given[3:]]
    assert records.expanded(given) == expected


@pytest.mark.parametrize("path", ["a\0b", "x" * 256, "images/" + "\u00e9" * 128])
def test_a_path_that_no_file_system_takes_is_refused(path):
    with pytest.raises(SettingsError, match=r"agent\.toml: data: expected a path of names of up"):
        read({"data": path})


@pytest.mark.parametrize("text", ["retry_s = nan", "inner.x = [1, -nan]", "[[a]]\nb = nan"])
def test_a_number_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "agent.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"agent\.toml: [a-z_0.1x]+: expected a number, got n"):
        records.load(Settings, path)
