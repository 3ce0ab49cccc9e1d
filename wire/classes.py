"""Names of classes: what labels mean, the same on every device of a run.

A name is text in Unicode's normal form C. When a Mac copies a folder "Schlüssel", the copy's name
has different code points (form D) but means the same. Capitals and spaces count.
"""

import difflib
import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

MAX_NAME = 256
MAX_CLASSES = 1 << 16
MAX_TOLD_BYTES = 1 << 16  # for all names in a birth message: brokers take 128 KiB and more
_JOINERS = str.maketrans("", "", "\u200c\u200d")  # for Persian, Hindi, emoji; not `isprintable`
_LISTED, _LISTED_CHARACTERS = 20, 400  # how much of a list a message shows
_EXPLAINED, _COMPARED = 3, 1000  # unknown names that get a suggestion; candidates for one


def normalized(names: Iterable[str]) -> tuple[str, ...]:
    """The names in normal form C, in the same order.

    Raises:
        ValueError: one is empty, too long or not printable, or two are equal.
    """
    unique: set[str] = set()
    result: list[str] = []
    for name in names:
        # At most four code points become one, so what is cut off here is too long anyway. Sorting a
        # million accents takes minutes.
        plain = unicodedata.normalize("NFC", name[: 4 * MAX_NAME + 1])
        if not plain.strip() or len(plain) > MAX_NAME or not printable(plain):
            raise ValueError(
                f"class names: expected 1 to {MAX_NAME} printable characters, got {name!r:.80}"
            )
        if plain in unique:
            raise ValueError(
                f"class names: {plain!r:.80} is there twice; name each once (Unicode has two "
                "spellings of some letters, which are the same here)"
            )
        unique.add(plain)
        result.append(plain)
    if len(result) > MAX_CLASSES:
        raise ValueError(f"class names: expected at most {MAX_CLASSES}, got {len(result)}")
    return tuple(result)


def printable(name: str) -> bool:
    """Whether a name may be shown as it is; joiners, which shape letters and emoji, may be."""
    return name.translate(_JOINERS).isprintable()


def places(names: Sequence[str], known: Sequence[str]) -> tuple[int, ...]:
    """The place of each name in `known`.

    Raises:
        ValueError: some are not in `known`; see `difference`.
    """
    if problem := difference(names, known):
        raise ValueError(problem)
    place = {name: number for number, name in enumerate(known)}
    return tuple(place[name] for name in names)


def difference(names: Sequence[str], known: Sequence[str]) -> str:
    """A message about names that are not in `known`, with the nearest ones; "" if all are."""
    known_set = set(known)
    unknown = [name for name in names if name not in known_set]
    if not unknown:
        return ""
    shown = ", ".join(f"{name!r}{_nearest(name, known)}" for name in unknown[:_EXPLAINED])
    rest = len(unknown) - _EXPLAINED
    shown += f" and {rest} more" if rest > 0 else ""
    what = "classes are" if len(unknown) > 1 else "a class is"
    return f"{what} not known: {shown}; expected names among {listed(known)}, got {listed(names)}"


def listed(names: Sequence[str]) -> str:
    """The names in quotes, so that spaces show; a long list is cut. For messages."""
    shown: list[str] = []
    for name in names[:_LISTED]:
        shown.append(repr(name))
        if sum(map(len, shown)) > _LISTED_CHARACTERS:
            break
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more ({len(names)} in all)" if rest else "")


def size(names: Sequence[str]) -> int:
    """Bytes of all names in a message: their UTF-8, and up to three for the length of each."""
    return sum(len(name.encode()) + 3 for name in names)


def told(names: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """`classes` and `classes_digest` of a birth message: the names, or a digest of too many."""
    return (names, "") if size(names) <= MAX_TOLD_BYTES else ((), digest(names))


def digest(names: Sequence[str]) -> str:
    """SHA-256 (hex) of the names in their order; "" if there are none."""
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
