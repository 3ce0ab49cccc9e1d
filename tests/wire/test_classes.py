"""Names of classes are the same however they are encoded, and messages tell similar ones apart."""

import unicodedata

import pytest

from wire import classes

NFC, NFD = "\u00dcberwurf", "U\u0308berwurf"


def test_spellings_of_one_name_are_one():
    assert classes.normalized(["nut", NFD]) == ("nut", NFC)
    with pytest.raises(ValueError, match="'\u00dcberwurf' is there twice; name each once"):
        classes.normalized([NFC, "nut", NFD])


@pytest.mark.parametrize(
    "name",
    [
        "Washer M8 (flat)",
        "a|b",
        "\U0001f9d1\u200d\U0001f527",
        "\u0645\u06cc\u200c\u062e",
        " x ",
        "\u732b",
    ],
    ids=["spaces", "bar", "emoji with joiner", "Persian with non-joiner", "outer spaces", "Han"],
)
def test_names_as_people_write_them_stay(name):
    assert classes.normalized([name]) == (name,)


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\x1b[2J", "\udcff", "x" * 257, "a\u202eb"])
def test_what_a_terminal_does_not_show_is_no_name(name):
    with pytest.raises(ValueError, match="expected 1 to 256 printable"):
        classes.normalized([name])


@pytest.mark.timeout(60)
def test_a_name_of_accents_is_refused_at_once():
    """Bringing it into normal form took the server minutes, and it fits into a birth message."""
    with pytest.raises(ValueError, match="expected 1 to 256 printable"):
        classes.normalized(["a" + "\u0300" * 250_000 + "\u0316" * 250_000])


def test_the_longest_name_may_come_in_four_code_points_a_letter():
    letter = "\u1f82"  # alpha with breathing, accent and iota
    assert classes.normalized([unicodedata.normalize("NFD", letter) * 256]) == (letter * 256,)
    with pytest.raises(ValueError, match="expected 1 to 256 printable"):
        classes.normalized([unicodedata.normalize("NFD", letter) * 257])


def test_places_are_those_in_the_other_list():
    assert classes.places(("c", "a"), ("a", "b", "c")) == (2, 0)
    assert classes.places((), ("a", "b")) == ()


def test_long_lists_are_cut_in_messages():
    many = [f"species {n:05}" for n in range(10_000)]
    said = classes.difference(["Species 00007", *many[:40], *"vwxyz"], many)
    assert said.startswith("classes are not known: 'Species 00007' ('species 00007' differs in cap")
    assert "and 3 more; expected names among 'species 00000'" in said
    assert "more (10000 in all)" in said
    assert len(said) < 2000
    wide = [f"{n}" * 200 for n in range(9)]
    assert len(classes.listed(wide)) < 1000


def test_names_too_many_for_a_birth_message_are_told_by_digest():
    few = tuple(map(str, range(1000)))
    many = tuple(f"species {n:05}" for n in range(10_000))
    assert classes.told(few) == (few, "")
    assert classes.told(many) == ((), classes.digest(many))
    assert classes.digest(many) != classes.digest(many[::-1])
    assert classes.digest(()) == ""
