r"""Log lines of both programs: every record is one line, whatever its text holds.

    2026-11-22T05:04:03+01:00 WARNING pi-3: result refused: its network has 12 classes, not 10

A text from elsewhere may hold line breaks, or codes that set a terminal's colours or move its
cursor. Such characters are escaped as in a Python string: `\n` and `\x1b`.
"""

import logging
import sys
import traceback
from datetime import datetime
from types import TracebackType
from typing import IO

FULL = "%(asctime)s %(levelname)s %(message)s"
_Raised = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def clean(text: str) -> str:
    r"""The text as one printable line: `\n` for a line break, `\\x1b` for an escape character."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class OneLine(logging.Formatter):
    """A record as one clean line; the time is ISO 8601 to the second, with its zone."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        """The record's time in this machine's zone."""
        del datefmt
        return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="seconds")

    def formatException(self, ei: _Raised) -> str:  # noqa: N802 - logging's name
        """The exception and the lines it passed: `ValueError: odd (by data.py:40, work.py:7)`."""
        _, fault, trace = ei
        frames = reversed(traceback.extract_tb(trace))
        places = (f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames)
        return f"{type(fault).__name__}: {fault} (by {', '.join(places)})"

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line; an exception follows the message."""
        record.message, record.asctime = record.getMessage(), self.formatTime(record)
        line = self.formatMessage(record)
        if record.exc_info:
            line += f": {self.formatException(record.exc_info)}"
        return clean(line)


def to_stream(stream: IO[str] | None = None, level: int = logging.INFO) -> None:
    """Log to a stream, standard error by default; Python's warnings go there too."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(OneLine(FULL))
    to_handler(handler, level)


def to_handler(handler: logging.Handler, level: int = logging.INFO) -> None:
    """Log to a handler, unless a test or a calling program has already set up logging."""
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(capture=True)
