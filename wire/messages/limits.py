"""Limits of what a message may hold, and the checks that several messages share."""

import math
import re

from wire import frames

_DIGEST = re.compile(r"[0-9a-f]{64}")
_STATE_ID = re.compile(r"[0-9a-f]{0,32}")
MAX_CHUNK_BYTES = frames.MAX_MESSAGE_BYTES - 4096
MAX_BLOB_BYTES = 1 << 36
MAX_WANT = 64
MAX_VIEWS = 16
MAX_TEXT = 256
MAX_COUNT = 1 << 53  # what SQLite, JSON and file offsets all take


def check_counts(**counts: int) -> None:
    """Raise ValueError unless every count is from 0 to below MAX_COUNT."""
    for name, count in counts.items():
        if not 0 <= count < MAX_COUNT:
            raise ValueError(f"{name}: expected 0 to {MAX_COUNT - 1}, got {count}")


def check_texts(**texts: str) -> None:
    """Raise ValueError unless every text is short and safe to show in a terminal or Markdown."""
    for name, text in texts.items():
        if len(text) > MAX_TEXT or not text.isprintable():
            raise ValueError(f"{name}: expected up to {MAX_TEXT} printable, got {text!r:.80}")


def check_digest(name: str, digest: str) -> None:
    """Raise ValueError unless the digest is a SHA-256 in hex."""
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"{name}: expected 64 hex digits, got {digest!r:.80}")


def check_optional_digest(name: str, digest: str) -> None:
    """Raise ValueError unless the digest is a SHA-256 in hex or empty."""
    if digest and not _DIGEST.fullmatch(digest):
        raise ValueError(f"{name}: expected 64 hex digits or nothing, got {digest!r:.80}")


def check_state_id(state_id: str) -> None:
    """Raise ValueError unless this can name a device's state folder; "" names none."""
    if not _STATE_ID.fullmatch(state_id):
        raise ValueError(f"state_id: expected up to 32 hex digits, got {state_id!r:.80}")


def check_noise(clip: float, noise: float) -> None:
    """Raise ValueError unless feature maps can be clipped to `clip` and get noise of `noise`."""
    if not (0 <= clip < math.inf and 0 <= noise < math.inf) or (noise and not clip):
        raise ValueError(
            f"clip {clip}, noise {noise}: expected 0 or more, and a clip over 0 where there is "
            "noise"
        )
