"""Refusal of a setting that is out of its range, or names no codec."""

from collections.abc import Callable
from typing import TypeVar

from wire.errors import CodecError

T = TypeVar("T")


def expect(name: str, value: object, fits: bool, expected: str) -> None:
    """Return if a setting's value fits.

    Raises:
        ValueError: it does not; the message names the setting, its range and its value.
    """
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {value}")


def codec(name: str, spec: str, parse: Callable[[str], T]) -> T:
    """What a setting's codec spec stands for.

    Raises:
        ValueError: there is no such codec; the message names the setting.
    """
    try:
        return parse(spec)
    except CodecError as fault:
        raise ValueError(f"{name}: {fault}") from fault
