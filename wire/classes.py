"""Names of classes, by which labels are told apart on every device of a run.

A name is text in Unicode's normal form C: a Mac's copy of a folder spells "Schlüssel" with another
sequence of code points than the original (form D), and means the same. Capitals and spaces count.
"""

import difflib
import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

MAX_NAME = 256
MAX_CLASSES = 1 << 16
MAX_TOLD_BYTES = 1 << 16  # of all names in a birth message: brokers take 128 KiB and more
_JOINERS = str.maketrans("", "", "\u200c\u200d")  # of Persian, Hindi and emoji; not `isprintable`
_LISTED, _LISTED_CHARACTERS = 20, 400  # how much of a list a message shows
_EXPLAINED, _COMPARED = 3, 1000  # names that get a nearest one, and among how many


def normalized(names: Iterable[str]) -> tuple[str, ...]:
    """The names in normal form C, in the order that was given.

    Raises:
        ValueError: one is empty, too long or not printable, or two are equal.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = unicodedata.normalize("NFC", name)
        if not plain.strip() or len(plain) > MAX_NAME or not printable(plain):
            raise ValueError(
                f"class names: expected 1 to {MAX_NAME} printable characters, got {name!r:.80}"
            )
        if plain in found:
            raise ValueError(
                f"class names: {plain!r:.80} is there twice; name each once (Unicode has two "
                "spellings of some letters, which are the same here)"
            )
        found[plain] = name
    if len(found) > MAX_CLASSES:
        raise ValueError(f"class names: expected at most {MAX_CLASSES}, got {len(found)}")
    return tuple(found)


def printable(name: str) -> bool:
    """Whether a name may be shown as it is. Joiners, which shape letters and emoji, may."""
    return name.translate(_JOINERS).isprintable()


def places(names: Sequence[str], known: Sequence[str]) -> tuple[int, ...]:
    """The place of each name in `known`.

    Raises:
        ValueError: some are not there; see `difference`.
    """
    if problem := difference(names, known):
        raise ValueError(problem)
    place = {name: number for number, name in enumerate(known)}
    return tuple(place[name] for name in names)


def difference(names: Sequence[str], known: Sequence[str]) -> str:
    """Which names are not in `known`, the nearest that is, and both lists; "" where all are."""
    known_set = set(known)
    unknown = [name for name in names if name not in known_set]
    if not unknown:
        return ""
    said = ", ".join(f"{name!r}{_nearest(name, known)}" for name in unknown[:_EXPLAINED])
    rest = len(unknown) - _EXPLAINED
    said += f" and {rest} more" if rest > 0 else ""
    what = "classes are" if len(unknown) > 1 else "a class is"
    return f"{what} not known: {said}; expected names among {listed(known)}, got {listed(names)}"


def listed(names: Sequence[str]) -> str:
    """The names for a message, in quotes so that spaces show; a long list is cut."""
    shown: list[str] = []
    for name in names[:_LISTED]:
        shown.append(repr(name))
        if sum(map(len, shown)) > _LISTED_CHARACTERS:
            break
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more ({len(names)} in all)" if rest else "")


def size(names: Sequence[str]) -> int:
    """Bytes of all names as a message has them: UTF-8, and up to three for the length of each."""
    return sum(len(name.encode()) + 3 for name in names)


def told(names: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """What a birth message says of names: them, or their digest where they are too many."""
    return (names, "") if size(names) <= MAX_TOLD_BYTES else ((), digest(names))


def digest(names: Sequence[str]) -> str:
    """SHA-256 (hex) of the names in their order, "" for none."""
    return hashlib.sha256("\0".join(names).encode()).hexdigest() if names else ""


def _nearest(name: str, known: Sequence[str]) -> str:
    for other in known:
        if name.casefold() == other.casefold():
            return f" ({other!r} differs in capitals only)"
        if _letters(name) == _letters(other):
            return f" ({other!r} differs in capitals, spaces, '_' or '-' only)"
    folded = {other.casefold(): other for other in known[:_COMPARED]}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f" (the nearest is {folded[near[0]]!r})" if near else ""


def _letters(name: str) -> str:
    folded = unicodedata.normalize("NFKC", name).casefold()
    return "".join(c for c in folded if c not in " _-")
