"""Builds frozen dataclasses from plain mappings, for everything that comes from outside.

TOML tables (configuration) and msgpack maps (messages) are checked in the same way. Every key must
be known (most messages are laxer, see `wire.messages`), every required key must be there, and every
value must have the annotated type. Inside, types are trusted.

Annotations may be bool, int, float (an int is accepted), str, bytes, Any (not checked), Path (from
str; `~` is the home folder), Literal, X | None, tuple[X, ...] or tuple[X, X] of one type,
X | tuple[Y, ...] (a list becomes the tuple), Mapping[str, X], and nested dataclasses. A dataclass
checks its ranges in `__post_init__`, and raises ValueError. A field with `init=False` is neither
read nor written. A field with `repr=False` is a secret text, which no message repeats.
"""

import dataclasses
import datetime as dt
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from wire.errors import SettingsError, StillhouseError

T = TypeVar("T")
MAX_NAME = 255  # bytes of a file's name, the limit of nearly every file system
_DEEPEST = 32  # levels of nested lists and tables in a file
_COMPARED = 256  # characters of a word that `nearest` reads; a hostile one may have a million
_LARGEST = 1 << 63  # TOML's whole numbers are below this


def build(
    cls: type[T], mapping: object, *, where: str, error: type[StillhouseError], strict: bool = True
) -> T:
    """The `cls` that `mapping` describes.

    Args:
        cls: a dataclass.
        mapping: the untrusted input.
        where: how to name the mapping in messages ("agent.toml", "birth message of pi-3").
        error: the class to raise.
        strict: refuse unknown keys; otherwise ignore them, in nested dataclasses too.

    Raises:
        error: a key is unknown or missing, or its value has the wrong type or range; the message
            names the key, and for an unknown one the nearest known key.
    """
    if not isinstance(mapping, Mapping):
        raise error(f"{where}: expected a table of settings, got {type(mapping).__name__}")
    fields = [f for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    known = hints(cls)  # type: ignore[arg-type]
    for key in mapping if strict else ():
        if key not in known:
            near = nearest(str(key), known)
            hint = f"did you mean {near!r}?" if near else f"known are: {', '.join(known)}"
            raise error(f"{where}: unknown key {key!r:.80}; {hint}")
    values = {}
    for field in fields:
        if field.name in mapping:
            place = f"{where}: {field.name}"
            try:
                value = mapping[field.name]
                values[field.name] = _value(known[field.name], value, place, error, strict)
            except error:
                if field.repr:
                    raise
                got = type(value).__name__  # a secret: no message shows its value
                raise error(f"{place}: expected text in quotes, got {got}") from None
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(f"{where}: key {field.name!r} is missing")
    try:
        return cls(**values)
    except ValueError as fault:
        raise error(f"{where}: {fault}") from fault


def load(cls: type[T], path: Path) -> T:
    """The `cls` that a TOML file describes.

    Raises:
        SettingsError: the file does not exist, is not TOML, or does not fit `cls`; the message
            names the file.
    """
    try:
        table = toml(path.read_text(), str(path))
    except OSError as fault:
        raise SettingsError(f"{path}: cannot be read: {fault.strerror}") from fault
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise SettingsError(f"{path}: not TOML: {fault}") from fault
    return of_table(cls, table, str(path))


def toml(text: str, where: str) -> dict[str, Any]:
    """The table in a TOML text.

    Raises:
        tomllib.TOMLDecodeError: the text is not TOML.
        SettingsError: a number is too long, or lists and tables are nested too deeply; the message
            names `where`.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as fault:
        raise SettingsError(
            f"{where}: a whole number has thousands of digits; expected one below 2^63"
        ) from fault
    except RecursionError as fault:
        raise SettingsError(_too_deep(where)) from fault


def of_table(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """The `cls` that the table of a TOML file describes.

    Raises:
        SettingsError: the table does not describe a `cls`; the message names `where`.
    """
    _refuse_unusable(table, where)
    return build(cls, table, where=where, error=SettingsError)


@cache
def hints(cls: type) -> dict[str, Any]:
    """The type of each field that `build` reads."""
    types_ = typing.get_type_hints(cls)
    return {field.name: types_[field.name] for field in dataclasses.fields(cls) if field.init}


def _refuse_unusable(value: object, where: str, at: str = "", depth: int = 0) -> None:
    """Refuse values that TOML allows and no setting takes; checks of ranges may not catch them."""
    place = f"{where}: {at}"
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{place}: expected a finite number, got {value}")
    if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        raise SettingsError(f"{place}: expected a number below 2^63, got one of many digits")
    if isinstance(value, dt.date | dt.time):
        kind = "time" if isinstance(value, dt.time) else "date"
        raise SettingsError(
            f"{place}: got a {kind}, which no setting is; put quotes around it where text is "
            "expected"
        )
    if depth > _DEEPEST:
        raise SettingsError(_too_deep(f"{where}: {at:.40}"))
    inner = dict(enumerate(value)) if isinstance(value, list | tuple) else value
    for key, item in inner.items() if isinstance(inner, Mapping) else ():
        _refuse_unusable(item, where, f"{at}.{key}" if at else str(key), depth + 1)


def _too_deep(where: str) -> str:
    return f"{where}: lists and tables are nested too deeply; expected at most {_DEEPEST} levels"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known word nearest to `word`, whatever its capitals; "" if none is near."""
    spelled = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word[:_COMPARED].lower(), spelled, n=1, cutoff=cutoff)
    return spelled[near[0]] if near else ""


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a message that names the nearest known word; "" if none is near."""
    near = nearest(word, known, cutoff)
    return f"; did you mean {near!r}?" if near else ""


def plain(record: object) -> Any:
    """The mapping from which `build` makes `record`: dataclasses become dicts, tuples lists."""
    if dataclasses.is_dataclass(record):
        return {
            f.name: plain(getattr(record, f.name)) for f in dataclasses.fields(record) if f.init
        }
    if isinstance(record, Mapping):
        return {key: plain(value) for key, value in record.items()}
    if isinstance(record, tuple | list):
        return [plain(value) for value in record]
    return str(record) if isinstance(record, Path) else record


def canonical(record: object) -> bytes:
    """The canonical JSON of `plain(record)`: sorted keys, no spaces, ASCII."""
    text = json.dumps(plain(record), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def expanded(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with `~` expanded, also in `--option=~/x`, which shells do not expand.

    Raises:
        SettingsError: an argument is `~user`, and this machine has no such user.
    """
    result = []
    for argument in arguments:
        option, value = "", argument
        if argument.startswith("--") and "=" in argument:
            option, _, value = argument.partition("=")
        if value.startswith("~"):
            value = str(path(value, option or "command line", SettingsError))
        result.append(f"{option}={value}" if option else value)
    return result


def path(text: str, where: str, error: type[StillhouseError]) -> Path:
    """The path in a text from outside, with `~` expanded.

    Raises:
        error: it is empty, no file system takes it, or it begins with a user that is not there.
    """
    if not text:
        raise error(f"{where}: expected a path, got an empty one; name one, or leave it out")
    longest = max(len(part.encode()) for part in text.split("/"))
    if "\0" in text or longest > MAX_NAME:
        raise error(
            f"{where}: expected a path of names of up to {MAX_NAME} bytes, without NUL, got "
            f"{text!r:.60}"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise error(
            f"{where}: {text!r}: expected the home folder of a user of this machine, and there is "
            f"none; write the whole path, or ./{text} for a name that begins with ~"
        ) from None


def _value(hint: Any, value: object, where: str, error: type[StillhouseError], strict: bool) -> Any:
    if hint is Any:
        return value
    wanted, hint = hint, _member(hint, value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            choices, near = ", ".join(map(repr, arguments)), did_you_mean(str(value), arguments)
            raise error(f"{where}: expected one of {choices}, got {_shown(value)}{near}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise error(f"{where}: expected {len(arguments)} values, got {len(value)}")
        return _items(arguments[0], value, where, error, strict)
    if origin is Mapping and isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise error(f"{where}: expected text keys, got {list(value)!r:.80}")
        of = arguments[1]
        return {k: _value(of, v, f"{where}.{k:.80}", error, strict) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where=where, error=error, strict=strict)  # type: ignore[arg-type]
    if hint is Path and isinstance(value, str):
        return path(value, where, error)
    if hint is float and type(value) is int and abs(value) <= 2 * _LARGEST:
        return float(value)
    if hint in (bool, int, float, str, bytes, types.NoneType) and type(value) is hint:
        return value
    raise error(f"{where}: expected {_named(wanted)}, got {type(value).__name__} {_shown(value)}")


def _items(
    of: Any, items: Sequence[Any], where: str, error: type[StillhouseError], strict: bool
) -> tuple[Any, ...]:
    if set(map(type, items)) <= {of}:  # a message may hold a million numbers: not one by one
        return tuple(items)
    return tuple(_value(of, item, f"{where}[{i}]", error, strict) for i, item in enumerate(items))


def _named(hint: Any) -> str:
    """The name of a type for messages; for a union, all members that a file can hold."""
    if typing.get_origin(hint) is types.UnionType:
        members = (m for m in typing.get_args(hint) if m is not types.NoneType)
        return " or ".join(map(_named, members))
    if typing.get_origin(hint) is tuple:
        of = typing.get_args(hint)[0]
        return f"a list of {'tables' if dataclasses.is_dataclass(of) else _named(of)}"
    return "true or false" if hint is bool else getattr(hint, "__name__", str(hint))


def _shown(value: object) -> str:
    """A value for messages, without the part of a URL before an @, which may be a password.

    This takes a time linear in the value's length: a regular expression that looks for both ends
    takes hours for a megabyte of slashes, which a device may send.
    """
    text = repr(value)
    before, slashes, rest = text.partition("//")
    at = max(rest.rfind("@"), rest.rfind("%40"))
    return (f"{before}//***{rest[at:]}" if slashes and at >= 0 else text)[:60]


def _member(hint: Any, value: object) -> Any:
    """The member of X | None or of X | tuple[Y, ...] that fits a value."""
    if typing.get_origin(hint) is not types.UnionType:
        return hint
    members = typing.get_args(hint)
    if value is None and types.NoneType in members:
        return types.NoneType
    members = tuple(member for member in members if member is not types.NoneType)
    is_list = isinstance(value, list | tuple)
    fits = (member for member in members if (typing.get_origin(member) is tuple) == is_list)
    return next(fits, members[0])
