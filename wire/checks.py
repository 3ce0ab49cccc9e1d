"""Checks of numbers and texts from outside; each raises ValueError that begins with the key."""

import re

MAX_TEXT = 256
MAX_COUNT = 1 << 53  # what SQLite, JSON and file offsets all take
_DIGEST = re.compile(r"[0-9a-f]{64}")


def within(name: str, value: int, least: int, most: int, unit: str = "") -> None:
    """Raise ValueError unless a number is from `least` to `most`; `unit` is for the message."""
    if not least <= value <= most:
        raise ValueError(f"{name}: expected {least} to {most}{unit}, got {value}")


def counts(**counts: int) -> None:
    """Raise ValueError unless every count is from 0 to below MAX_COUNT."""
    for name, count in counts.items():
        within(name, count, 0, MAX_COUNT - 1)


def texts(**texts: str) -> None:
    """Raise ValueError unless every text is short and safe to show in a terminal or Markdown."""
    for name, text in texts.items():
        if len(text) > MAX_TEXT or not text.isprintable():
            raise ValueError(f"{name}: expected up to {MAX_TEXT} printable, got {text!r:.80}")


def digest(name: str, text: str) -> None:
    """Raise ValueError unless the text is a SHA-256 in hex."""
    if not _DIGEST.fullmatch(text):
        raise ValueError(f"{name}: expected 64 hex digits, got {text!r:.80}")


def optional_digest(name: str, text: str) -> None:
    """Raise ValueError unless the text is a SHA-256 in hex or empty."""
    if text and not _DIGEST.fullmatch(text):
        raise ValueError(f"{name}: expected 64 hex digits or nothing, got {text!r:.80}")
