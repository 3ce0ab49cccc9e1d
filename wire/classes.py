"""Names of classes, by which labels are told apart on every device of a run.

A name is text in Unicode's normal form C: a Mac's copy of a folder spells "Schlüssel" with another
sequence of code points than the original (form D), and means the same.
"""

import unicodedata
from collections.abc import Iterable

MAX_NAME = 256
MAX_CLASSES = 1 << 16


def normalized(names: Iterable[str]) -> tuple[str, ...]:
    """The names in normal form C, in the order that was given.

    Raises:
        ValueError: one is empty, too long or not printable, or two are equal.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = unicodedata.normalize("NFC", name)
        if not plain.strip() or len(plain) > MAX_NAME or not plain.isprintable():
            raise ValueError(
                f"class names: expected 1 to {MAX_NAME} printable characters, got {name!r:.80}"
            )
        if plain in found:
            raise ValueError(f"class names: {found[plain]!r:.80} is there twice; name each once")
        found[plain] = name
    if len(found) > MAX_CLASSES:
        raise ValueError(f"class names: expected at most {MAX_CLASSES}, got {len(found)}")
    return tuple(found)
