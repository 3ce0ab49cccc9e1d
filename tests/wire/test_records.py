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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("retry_s = nan", "retry_s: expected a finite number, got nan"),
        ("inner.x = [1, -nan]", "inner.x.1: expected a finite number, got nan"),
        ("[[a]]\nb = -inf", "a.0.b: expected a finite number, got -inf"),
        (f"retry_s = 1{'0' * 400}", "retry_s: expected a number below 2^63, got one of many"),
        (f"retry_s = {'9' * 5000}", ": a whole number has thousands of digits; expected one below"),
        (f"retry_s = 0x{'f' * 5000}", "retry_s: expected a number below 2^63, got one of many"),
        (f"x = {'[' * 3000}{']' * 3000}", "nested too deeply; expected at most 32 levels"),
        (f"x = {'[' * 40}{']' * 40}", "nested too deeply; expected at most 32 levels"),
        ("[a]\nday = 2026-01-01", "a.day: got a date, which no setting is; put quotes around it"),
        ("hour = 07:30:00", "hour: got a time, which no setting is"),
    ],
)
def test_values_that_toml_allows_and_no_setting_takes_are_refused_with_their_key(
    tmp_path, text, told
):
    path = tmp_path / "agent.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        records.load(Settings, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert told in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200


def test_an_empty_path_is_none():
    inside = ({"packages": [""]}, {"inner": {"ca_file": ""}})
    for table in ({"data": ""}, *({"data": "a"} | table for table in inside)):
        with pytest.raises(SettingsError, match=r"expected a path, got an empty one; name one, or"):
            read(table)


def test_a_near_name_is_found_in_capitals_too():
    with pytest.raises(SettingsError, match="unknown key 'Data'; did you mean 'data'"):
        read({"Data": "images"})
