"""Settings files that programs write and people edit: TOML with comments.

A `Template` holds the lines of such a file by their keys. `parse` reads changes from a command
line, such as `--set device.lr=0.05`, and `render` writes the file with them. Keys are dotted:
`device.lr` is `lr` under `[device]`.
"""

import dataclasses
import json
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from wire import records
from wire.errors import SettingsError

WIDTH = 98  # characters, of a comment on lines of its own
COMMENT_STOP = 4  # comments of a table begin in one column, a multiple of this
LONGEST_ALIGNED = 30  # characters; after a longer setting, the comment is not aligned
_LINES = re.compile(r"(?:[A-Za-z0-9+/=_ .-]+\n){2,}")  # such as PEM; no character is escaped
_BARE = re.compile(r"[A-Za-z0-9_-]+")  # keys that need no quotes


class Setting(NamedTuple):
    """One line of a settings file.

    Attributes:
        value: a value from which the dataclass's field can be built.
        comment: the comment after the value.
        example: whether the whole line is commented out, as a setting that some people will want.
    """

    value: Any
    comment: str = ""
    example: bool = False


@dataclasses.dataclass(frozen=True)
class Template:
    """A settings file with its default values.

    Attributes:
        record: the dataclass that is built from the file.
        about: paragraphs of the comment at the top of the file.
        lines: the settings by key, in the order of the file.
    """

    record: type
    about: tuple[str, ...]
    lines: Mapping[str, Setting]


def parse(record: type, texts: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """The values in texts KEY=VALUE, by key.

    A value is TOML (`0.05`, `true`, `["bolt", "nut"]`); text and paths may be written without
    quotes. In a table of free settings, any key may be set: `strategy_settings.beta=0.5`.

    Raises:
        SettingsError: there is no such key (the message names the nearest), a key is given twice,
            or a value cannot be read.
    """
    hints = keys(record)
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            number = next((name for name, hint in hints.items() if hint is int), "key")
            raise SettingsError(f"{option} {text!r:.80}: expected KEY=VALUE, {number}=2, say")
        hint = _hint(key, hints)
        if hint is None:
            raise SettingsError(f"{option}: unknown key {key!r:.80}; {_nearest(key, hints)}")
        for other in values:
            if key == other:
                raise SettingsError(f"{option} {key} is given twice; leave one out")
            if key.startswith(f"{other}.") or other.startswith(f"{key}."):
                raise SettingsError(
                    f"{option} {key}: {other} is given too, and one holds the other; leave one out"
                )
        if any("\ud800" <= letter <= "\udfff" for letter in value):  # bytes of another encoding
            raise SettingsError(f"{option} {key}: expected text in UTF-8, got {value!a:.80}")
        values[key] = _value(hint, value.strip(), f"{option} {key}")
    return values


def check(template: Template, changes: Mapping[str, Any], option: str = "--set") -> None:
    """Return if the file with these values can be loaded.

    Raises:
        SettingsError: a value has the wrong type or is out of range, or two values do not fit.
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
        changes: values by key; a key that the template lacks is added to its table.
        option: where the changes come from, for messages.

    Raises:
        SettingsError: see `check`.
    """
    check(template, changes, option)
    lines = dict(template.lines)
    for key, value in changes.items():
        lines[key] = Setting(value, lines[key].comment if key in lines else "")
    tables: dict[str, dict[str, Setting]] = {"": {}}  # keys without a table come first
    for key, line in lines.items():
        table, _, name = key.rpartition(".")
        tables.setdefault(table, {})[name] = line
    paragraphs = ("\n# ".join(textwrap.wrap(text, WIDTH)) for text in template.about)
    parts = ["# " + "\n#\n# ".join(paragraphs) + "\n"]
    for table, settings in tables.items():
        parts.append((f"[{table}]\n" if table else "") + _aligned(settings))
    return "\n".join(parts)


def keys(record: type, before: str = "") -> dict[str, Any]:
    """The type of every setting of a dataclass, by its dotted key."""
    found: dict[str, Any] = {}
    for name, hint in records.hints(record).items():
        if dataclasses.is_dataclass(hint):
            found |= keys(typing.cast("type", hint), f"{before}{name}.")
        else:
            found[before + name] = hint
    return found


def _hint(key: str, hints: Mapping[str, Any]) -> Any:
    """The type of a key's value; None if there is no such key."""
    if key in hints:
        return hints[key]
    for name, hint in hints.items():
        inside = key.removeprefix(f"{name}.") if typing.get_origin(hint) is Mapping else key
        if inside != key and all(map(_BARE.fullmatch, inside.split("."))):
            return typing.get_args(hint)[1]
    return None


def _nearest(key: str, known: Iterable[str]) -> str:
    """A message that says which key may have been meant by an unknown one."""
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"{key} is a table; name one of its keys: {', '.join(inside)}"
    table, _, last = key.lower().rpartition(".")
    near = [name for name in known if name.lower().rpartition(".")[2] == last]
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == table}
    if not near:
        guess = records.nearest(last, beside) if table and beside else records.nearest(key, known)
        near = [beside.get(guess, guess)] if guess else []
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    if table and beside:
        return f"known are: {', '.join(beside.values())}"
    tables = dict.fromkeys(name.partition(".")[0] for name in known if "." in name)
    alone = [name for name in known if "." not in name]
    return f"known are: {', '.join(alone)}; and keys of the tables {', '.join(tables)}"


def _value(hint: Any, text: str, where: str) -> Any:
    """The value of a TOML text, or the text itself; its type is checked later."""
    quoted = text[:1] in ('"', "'")
    if _takes_text(hint) and not quoted:
        return text
    try:
        table = records.toml(f"value = {text}", where)
    except tomllib.TOMLDecodeError as fault:
        if quoted:
            raise SettingsError(
                f"{where}: begins with a quote and is not one text in quotes; close them, or leave "
                "them out"
            ) from fault
        return text
    return table["value"] if len(table) == 1 else text


def _takes_text(hint: Any) -> bool:
    if typing.get_origin(hint) is types.UnionType:
        return any(map(_takes_text, typing.get_args(hint)))
    return hint in (str, Path) or typing.get_origin(hint) is Literal


def _aligned(settings: Mapping[str, Setting]) -> str:
    """The lines of one table, with aligned comments."""
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


def _key(name: str) -> str:
    """A key as TOML needs it: in quotes if necessary."""
    return name if _BARE.fullmatch(name) else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and _LINES.fullmatch(value):
        return f'"""\n{value}"""'
    if isinstance(value, str | Path):
        # JSON's escapes are valid in TOML; but TOML also wants DEL escaped, which JSON does not.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        pairs = (f"{_key(key)} = {_toml(inner)}" for key, inner in value.items())
        return f"{{ {', '.join(pairs)} }}"
    return repr(value)
