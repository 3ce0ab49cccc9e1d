"""Settings files that programs write and people edit: TOML with comments.

A `Template` has the lines of such a file by their keys. `render` writes them, with other values
where these are asked for; `parse` reads those from a command line, `--set device.lr=0.05`. A key is
dotted: `device.lr` stands as `lr` under `[device]`.
"""

import dataclasses
import difflib
import json
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from wire import records
from wire.errors import SettingsError

WIDTH = 98  # of a comment on lines of its own
COMMENT_STOP = 4  # comments of a table begin in one column, a multiple of this
LONGEST_ALIGNED = 30  # characters; behind a longer setting the comment follows at once


class Setting(NamedTuple):
    """One line of a settings file.

    Attributes:
        value: what a dataclass's field can be built of.
        comment: what people read behind it.
        example: the line is a comment as a whole, a setting that some will want.
    """

    value: Any
    comment: str = ""
    example: bool = False


@dataclasses.dataclass(frozen=True)
class Template:
    """A settings file before anybody chose anything.

    Attributes:
        record: the dataclass that is built of the file.
        about: paragraphs that the file begins with, as a comment.
        lines: the settings by key, in the order of the file.
    """

    record: type
    about: tuple[str, ...]
    lines: Mapping[str, Setting]


def parse(record: type, texts: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """The values by key of texts KEY=VALUE.

    A value is TOML (`0.05`, `true`, `["bolt", "nut"]`); where text or a path is expected, its
    quotes may be left out.

    Raises:
        SettingsError: no such key; the message names the nearest.
    """
    hints, values = keys(record), {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise SettingsError(f"{option} {text!r:.80}: expected KEY=VALUE, rounds=20, say")
        if key not in hints:
            raise SettingsError(f"{option}: unknown key {key!r:.80}; {_nearest(key, hints)}")
        if any("\ud800" <= letter <= "\udfff" for letter in value):  # bytes of another encoding
            raise SettingsError(f"{option} {key}: expected text in UTF-8, got {value!a:.80}")
        values[key] = _value(hints[key], value.strip())
    return values


def check(template: Template, changes: Mapping[str, Any], option: str = "--set") -> None:
    """Return if the file with these values is one that can be loaded.

    Raises:
        SettingsError: a value is of the wrong type or out of range, or two do not go together.
    """
    chosen = {key: line.value for key, line in template.lines.items() if not line.example}
    table: dict[str, Any] = {}
    for key, value in {**chosen, **changes}.items():
        inner = table
        *outer, name = key.split(".")
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[name] = value
    records.of_table(template.record, table, option)


def render(template: Template, changes: Mapping[str, Any], option: str = "--set") -> str:
    """The text of the file, with these values in place of the template's.

    Args:
        template: the file.
        changes: values by key; a key that the template has not is added to its table.
        option: where the changes come from, for messages.

    Raises:
        SettingsError: as `check`.
    """
    check(template, changes, option)
    lines = dict(template.lines)
    for key, value in changes.items():
        lines[key] = Setting(value, lines[key].comment if key in lines else "")
    tables: dict[str, dict[str, Setting]] = {"": {}}  # what has no table comes first
    for key, line in lines.items():
        table, _, name = key.rpartition(".")
        tables.setdefault(table, {})[name] = line
    paragraphs = ("\n# ".join(textwrap.wrap(text, WIDTH)) for text in template.about)
    parts = ["# " + "\n#\n# ".join(paragraphs) + "\n"]
    for table, settings in tables.items():
        parts.append((f"[{table}]\n" if table else "") + _aligned(settings))
    return "\n".join(parts)


def keys(record: type, before: str = "") -> dict[str, Any]:
    """The type of every setting of a dataclass by its dotted key."""
    found: dict[str, Any] = {}
    for name, hint in records.hints(record).items():
        if dataclasses.is_dataclass(hint):
            found |= keys(typing.cast("type", hint), f"{before}{name}.")
        else:
            found[before + name] = hint
    return found


def _nearest(key: str, known: Iterable[str]) -> str:
    """What may have been meant by an unknown key."""
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"{key} is a table; name one of its keys: {', '.join(inside)}"
    near = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = near or difflib.get_close_matches(key, known, n=1)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"known are: {', '.join(known)}"


def _value(hint: Any, text: str) -> Any:
    """TOML, or the text as it is; whether it is what was expected is seen when it is built."""
    if _takes_text(hint) and text[:1] not in ('"', "'"):
        return text
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text


def _takes_text(hint: Any) -> bool:
    if typing.get_origin(hint) is types.UnionType:
        return any(map(_takes_text, typing.get_args(hint)))
    return hint in (str, Path) or typing.get_origin(hint) is Literal


def _aligned(settings: Mapping[str, Setting]) -> str:
    """The lines of one table."""
    texts = {
        name: f"{'# ' if line.example else ''}{name} = {_toml(line.value)}"
        for name, line in settings.items()
    }
    widths = [len(text) for name, text in texts.items() if settings[name].comment]
    widest = max((width for width in widths if width <= LONGEST_ALIGNED), default=0)
    column = -(-(widest + 2) // COMMENT_STOP) * COMMENT_STOP
    return "".join(
        (f"{text:<{column - 2}}  # {comment}" if (comment := settings[name].comment) else text)
        + "\n"
        for name, text in texts.items()
    )


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | Path):
        # JSON's escapes are TOML's, but for the one character that JSON leaves as it is.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {_toml(inner)}' for key, inner in value.items())} }}"
    return repr(value)
