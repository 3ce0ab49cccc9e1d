"""A log record is one clean line, whatever its text."""

import io
import logging
import re
import warnings

import pytest

from wire import logs


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("pi-3: caf\N{LATIN SMALL LETTER E WITH ACUTE} 日本", "pi-3: café 日本"),
        ("two\nlines\r\n", r"two\nlines\r\n"),
        ("\x1b[31mred\x07\x00", r"\x1b[31mred\x07\x00"),
        ("\u202eright\u2028to left\x85", r"\u202eright\u2028to left\x85"),
        ("\udcff", r"\udcff"),
    ],
)
def test_a_text_from_elsewhere_is_one_printable_line(text, line):
    assert logs.clean(text) == line


@pytest.fixture
def stream(monkeypatch):
    root = logging.getLogger()
    logging.captureWarnings(capture=False)  # another test may have left it on
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    out = io.StringIO()
    logs.to_stream(out)
    yield out
    logging.captureWarnings(capture=False)


def test_a_record_has_its_time_with_zone_and_what_was_raised(stream):
    log = logging.getLogger("edge-agent")
    log.info("round %d", 1)
    try:
        int("odd\nnumber")
    except ValueError:
        log.exception("order %d failed", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("of\nsome library", stacklevel=1)
    first, second, third = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d INFO round 1", first)
    assert "ERROR order 3 failed: ValueError: invalid literal" in second
    assert r"'odd\nnumber' (by test_logs.py:" in second
    assert r"UserWarning: of\nsome library" in third
