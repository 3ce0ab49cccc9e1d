"""The messages, as frozen dataclasses. Each travels as the header of a frame.

    device                              orchestrator
      | <---------------------------- hello |   it has connected, or asks for births again
      | birth (retained) ----------------> |   on every connection, with a new session
      | <---------------------------- order |   what to train, from what, what to return
      | want -> / <- chunk                  |   the device pulls the blobs that the order names
      | telemetry -------------------------> |   how far it is
      | result ----------------------------> |   metrics, and the blobs that it offers
      |                  <- want / chunk -> |   the orchestrator pulls them at its own pace
      | <-------------------------- receipt |   accepted or refused, with the reason
      | <--------------------------- update |   a newer package, whose blob the device may pull
      | death (retained, last will) -------> |
      | measured (retained) --------------> |   what training costs there; taken from the broker
      | <-------------------------- receipt |   once the orchestrator has it
      | <---------------------------- renew |   its certificate ends soon
      | sign ------------------------------> |   a certificate request; the first one by a claim
      | <---------------------- certificate |

The device repeats a result until it has the receipt. The orchestrator repeats an order when the
device connects again. Repetition is harmless: for a device, (run, sequence) names an order and its
result. All orders of an attempt at a round have the same sequence, so the orchestrator knows them
by (sequence, device).

Agents and orchestrators of different versions understand each other: a key that has its default
value is not sent (so a default never changes), and an unknown key is ignored. Orders and updates
are stricter: one with an unknown key is refused as a whole. A device that cannot read an order
answers it with a result that names the fault.

    `device`     what a device says about itself: birth, death, telemetry, measured, sign
    `orders`     order, result, receipt
    `server`     hello, update, renew, certificate
    `transfer`   blobs, and the messages that pull them: want, chunk, gone
    `limits`     limits and checks that are about messages alone
"""

import contextlib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, get_args

from wire import frames, records, topics
from wire.checks import MAX_COUNT
from wire.errors import OrderError, WireError
from wire.frames import Frame, Kind
from wire.messages.device import Birth, Death, Measured, Platform, Sign, Telemetry
from wire.messages.limits import MAX_WANT, check_noise
from wire.messages.orders import Order, Receipt, Result
from wire.messages.server import Certificate, Hello, Renew, Update
from wire.messages.transfer import BlobRef, Chunk, Gone, Want

__all__ = [
    "MAX_COUNT", "MAX_WANT", "Birth", "BlobRef", "Certificate", "Chunk", "Death", "Gone", "Hello",
    "Measured", "Message", "Order", "Platform", "Receipt", "Renew", "Result", "Sign", "Telemetry",
    "Update", "Want",
    "check_noise", "decode", "encode",
]  # fmt: skip

Message = (
    Birth | Death | Telemetry | Measured | Sign
    | Order | Result | Receipt
    | Hello | Update | Renew | Certificate
    | Want | Chunk | Gone
)  # fmt: skip

# A message's kind has the name of its class.
_KINDS: dict[Kind, type[Message]] = {Kind[cls.__name__.upper()]: cls for cls in get_args(Message)}
_CLASSES = {cls: kind for kind, cls in _KINDS.items()}


def encode(message: Message, body: bytes | memoryview = b"") -> bytes:
    """The frame of a message; only `Chunk` and `Measured` have a body."""
    changed = (f.name for f in fields(message) if getattr(message, f.name) != _default(f))
    header = {name: records.plain(getattr(message, name)) for name in changed}
    return frames.encode(_CLASSES[type(message)], header, body)


def _default(field: "Field[Any]") -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def decode(data: bytes, *, sender: str) -> tuple[Message, memoryview]:
    """The message in a frame, and the frame's body.

    Raises:
        OrderError: an order that cannot be read, but says which order it is, so that it can be
            answered.
        WireError: the frame is not intact, or its header is not a valid message of its kind; the
            text names `sender`.
    """
    frame: Frame = frames.decode(data)
    if frame.kind not in _KINDS:
        raise WireError(f"{frame.kind.name} frame from {sender} where a message was expected")
    where = f"{frame.kind.name} message from {sender}"
    cls, strict = _KINDS[frame.kind], frame.kind in (Kind.ORDER, Kind.UPDATE)
    try:
        message = records.build(cls, frame.header, where=where, error=WireError, strict=strict)
    except WireError as fault:
        if cls is Order and (answer := _answer_to(frame.header)):
            raise OrderError(str(fault), answer.run, answer.sequence, answer.round) from fault
        raise
    return message, frame.body


def _answer_to(header: Mapping[str, Any]) -> Result | None:
    """The beginning of an answer to an unreadable order; None unless the order can be named."""
    name = {key: header.get(key) for key in ("run", "sequence", "round")}
    with contextlib.suppress(WireError, ValueError):
        content = {"device": "", "samples": 0, **name}
        answer = records.build(Result, content, where="answer", error=WireError)
        topics.check_name(answer.run, "run name")
        return answer
    return None
