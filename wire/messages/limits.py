"""Limits of what a message may hold, and checks that are about messages alone."""

import math
import re

from wire import frames

_STATE_ID = re.compile(r"[0-9a-f]{0,32}")
MAX_CHUNK_BYTES = frames.MAX_MESSAGE_BYTES - 4096
MAX_BLOB_BYTES = 1 << 36
MAX_WANT = 64
MAX_VIEWS = 16
MAX_CHUNKS = 1 << 20  # of a blob; its receiver notes each
MAX_METRICS = 256
MAX_REASON = 2000  # characters
MAX_REQUEST_BYTES = 8192  # of a certificate request; one with a key of RSA-4096 has 1,700


def shortened(text: str) -> str:
    """A fault or reason, cut off after `MAX_REASON` characters."""
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 1] + "…"


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
