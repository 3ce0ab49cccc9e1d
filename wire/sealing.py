"""Sealed messages: frames with the orchestrator's signature, which holds even against the broker.

A sealed frame's header holds `at`, when it was sealed, in nanoseconds since 1970, and a signature
(`wire.signing`); its body is the frame of the message. The signature covers `at`, the topic and the
frame. So the message cannot be sent to another device, and an order cannot come again after a later
one.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from wire import frames, records, signing, storage
from wire.errors import SignatureError, WireError
from wire.frames import Kind

if TYPE_CHECKING:
    from wire.signing import PrivateKey

CONTEXT = "stillhouse-message"
_LATEST = 1 << 63
AHEAD_NS = 600 * 10**9  # so seldom is the time written
KINDS = frozenset({Kind.ORDER, Kind.RECEIPT})  # a device with a kit takes these sealed only


class Sealer:
    """Seals messages with the orchestrator's key.

    Args:
        key: the orchestrator's.
        file: keeps a time that no message was sealed after, so that a clock that goes back does no
            harm.

    Raises:
        StorageError: the file cannot be written; StalledError: the disk is full.
    """

    def __init__(self, key: "PrivateKey", file: Path) -> None:
        self._key, self._file = key, file
        with storage.at(file):
            text = file.read_text("ascii") if file.exists() else "0"
        self._at = self._kept = int(text) if text.isdecimal() else 0

    def seal(self, topic: str, frame: bytes) -> bytes:
        """The sealed frame of a message for a topic; each is later than the last."""
        self._at = max(time.time_ns(), self._at + 1)
        if self._at > self._kept:
            with storage.at(self._file):
                storage.write(self._file, str(self._at + AHEAD_NS).encode(), 0o600)
            self._kept = self._at + AHEAD_NS
        signature = signing.sign(self._key, CONTEXT, _signed(topic, self._at, frame))
        return frames.encode(Kind.SEALED, {"at": self._at, "signature": signature}, frame)


class Opener:
    """Opens sealed messages of one orchestrator.

    Args:
        by: its public key; "" takes messages that are not sealed.
        newest: when the newest order that was taken was sealed.
    """

    def __init__(self, by: str, newest: int = 0) -> None:
        self._by, self.newest = by, newest

    def open(self, topic: str, payload: bytes) -> bytes:
        """The frame of the message in a payload; `newest` follows orders.

        Raises:
            WireError: it is not sealed and should be, or not by this orchestrator for this topic,
                or it is an order from before the newest one.
        """
        kind = frames.kind_of(payload)
        if not self._by:
            return payload
        if kind is not Kind.SEALED:
            if kind in KINDS:
                raise WireError(
                    f"{kind.name} message on {topic}: expected one that the orchestrator signed; "
                    "somebody else may be at the broker"
                )
            return payload
        sealed = frames.decode(payload)
        at, signature = sealed.header.get("at"), sealed.header.get("signature")
        frame = bytes(sealed.body)
        try:
            whole = isinstance(at, int) and 0 <= at < _LATEST and isinstance(signature, str)
            signed = _signed(topic, at, frame) if whole else b""
            signing.verify(self._by, CONTEXT, signed, str(signature))
        except SignatureError as fault:
            raise WireError(
                f"sealed message on {topic}: the orchestrator of this device's kit did not sign it"
            ) from fault
        if frames.kind_of(frame) is Kind.ORDER and isinstance(at, int):
            if at < self.newest:
                raise WireError(
                    f"order on {topic}: signed {(self.newest - at) / 1e9:.3g} s before one that "
                    "this device already has; somebody repeats it, or the orchestrator's clock "
                    "went back"
                )
            self.newest = at
        return frame


def _signed(topic: str, at: object, frame: bytes) -> bytes:
    return records.canonical({"topic": topic, "at": at}) + frame
