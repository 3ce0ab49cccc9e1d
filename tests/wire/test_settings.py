"""A settings file holds the chosen values, whatever they are, and keeps its comments."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire import settings
from wire.errors import SettingsError
from wire.settings import Setting, Template


@dataclass(frozen=True)
class Tier:
    keep_rate: float
    devices: str = "*"


@dataclass(frozen=True)
class Device:
    lr: float = 0.05
    classes: int | tuple[str, ...] = 10
    kind: Literal["small", "large"] = "small"
    tiers: tuple[Tier, ...] = ()
    augment: bool = False

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError("expected lr > 0")


@dataclass(frozen=True)
class Run:
    name: str
    heldout: Path | None = None
    rounds: int = 10
    device: Device = field(default_factory=Device)
    more: Mapping[str, Any] = field(default_factory=dict)


FILE = Template(
    Run,
    ("A run.", "word " * 25),
    {
        "name": Setting("first", "its folder"),
        "device.lr": Setting(0.05, "learning rate"),
        "rounds": Setting(10),
        "device.augment": Setting(True, "crops", example=True),
    },
)


def written(*texts: str) -> str:
    return settings.render(FILE, settings.parse(Run, texts))


def test_a_file_has_its_comments_in_one_column_and_its_tables_behind_what_has_none():
    assert written() == (
        "# A run.\n"
        "#\n"
        f"#{' word' * 19}\n"
        f"#{' word' * 6}\n"
        "\n"
        'name = "first"  # its folder\n'
        "rounds = 10\n"
        "\n"
        "[device]\n"
        "lr = 0.05           # learning rate\n"
        "# augment = true    # crops\n"
    )


def test_a_value_that_is_chosen_keeps_the_comment_and_an_example_becomes_a_setting():
    text = written("name=second", "device.augment=false", "device.classes=3")
    assert 'name = "second"     # its folder\n' in text
    assert "augment = false     # crops\n" in text
    assert "classes = 3\n" in text
    assert tomllib.loads(text)["device"] == {"lr": 0.05, "augment": False, "classes": 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("name=a b = c", "a b = c"),
        ("name='quoted'", "quoted"),
        ("name=2024", "2024"),
        ("name=", ""),
        ("heldout=~/images", "~/images"),
        ("rounds = 0x10", 16),
        ("device.kind=large", "large"),
        ('device.classes=["bolt", "nut"]', ["bolt", "nut"]),
        ("device.tiers=[{keep_rate = 0.5, devices = 'zero-*'}]",
         [{"keep_rate": 0.5, "devices": "zero-*"}]),
    ],
)  # fmt: skip
def test_a_value_is_text_where_text_is_expected_and_else_toml(text, value):
    table = tomllib.loads(written(text))
    *outer, name = text.partition("=")[0].strip().split(".")
    for part in outer:
        table = table[part]
    assert table[name] == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("round=3", "unknown key 'round'; did you mean 'rounds'?"),
        ("lr=3", "unknown key 'lr'; did you mean 'device.lr'?"),
        ("device.lrr=3", "did you mean 'device.lr'?"),
        ("device=3", "device is a table; name one of its keys: device.lr, device.classes"),
        ("xyz=3", "known are: name, heldout, rounds, more; and keys of the tables device"),
        ("device.qqq=3", "known are: device.lr, device.classes, device.kind, device.tiers, "),
        ("Rounds=3", "unknown key 'Rounds'; did you mean 'rounds'?"),
        ("LR=3", "unknown key 'LR'; did you mean 'device.lr'?"),
        ("device.kind=LARG", "got 'LARG'; did you mean 'large'?"),
        ("rounds", "expected KEY=VALUE, rounds=2, say"),
        ('name="abc', "name: begins with a quote and is not one text in quotes; close them"),
        ("name='it's'", "name: begins with a quote and is not one text in quotes"),
        ("rounds=many", "rounds: expected int, got str 'many'"),
        ("rounds=1.5", "rounds: expected int, got float 1.5"),
        ("rounds=1\nname = 3", "rounds: expected int, got str"),
        ("device.lr=nan", "device.lr: expected a finite number, got nan"),
        ("device.lr=-1", "device: expected lr > 0"),
        ("device.classes=bolt", "expected int or a list of str, got str 'bolt'"),
        ("device.kind=huge", "expected one of 'small', 'large', got 'huge'"),
        (f"device.lr=1{'0' * 400}", "device.lr: expected a number below 2^63"),
        (f"device.lr={'9' * 5000}", "device.lr: a whole number has thousands of digits"),
        (f"device.tiers={'[' * 3000}{']' * 3000}", "device.tiers: lists and tables are nested too"),
        ("device.augment=yes", "expected true or false, got str 'yes'"),
        ("device.tiers=3", "expected a list of tables, got int 3"),
        ("device.tiers=[{keep=1}]", "unknown key 'keep'"),
        ("rounds=2026-01-01", "rounds: got a date, which no setting is"),
        ("name=\udcff", "expected text in UTF-8"),
    ],
)
def test_what_cannot_be_chosen_is_told_with_what_was_expected(text, told):
    with pytest.raises(SettingsError) as caught:
        written(text)
    assert told in str(caught.value)
    assert str(caught.value).startswith("--set")


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        (("rounds=3", "rounds=4"), "--set rounds is given twice; leave one out"),
        (("more={a=1}", "more.b=2"), "--set more.b: more is given too, and one holds the other"),
        (("more.a.b=1", "more.a=2"), "--set more.a: more.a.b is given too"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(pairs, told):
    with pytest.raises(SettingsError) as caught:
        written(*pairs)
    assert told in str(caught.value)


def test_free_settings_are_chosen_one_by_one_or_as_a_table():
    text = written("more.beta=0.5", "more.name=plain text", "more.inner.x=[1]")
    assert "[more]\nbeta = 0.5\n" in text
    assert tomllib.loads(text)["more"] == {"beta": 0.5, "name": "plain text", "inner": {"x": [1]}}
    quoted = tomllib.loads(written("more={'a b' = 1, c = {'\"' = 2}}"))
    assert quoted["more"] == {"a b": 1, "c": {'"': 2}}
    with pytest.raises(SettingsError, match=r"unknown key 'more\.'"):
        written("more.=3")


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts, st.floats(min_value=0, exclude_min=True, allow_infinity=False), st.lists(texts))
def test_any_value_is_read_as_it_was_written(name, lr, classes):
    text = settings.render(FILE, {"name": name, "device.lr": lr, "device.classes": classes})
    table = tomllib.loads(text)
    assert table["name"] == name
    assert table["device"]["lr"] == lr
    assert table["device"]["classes"] == classes
