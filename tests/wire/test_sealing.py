"""What a device takes from a broker that may be hostile."""

import time

import pytest

from wire import frames, messages, signing
from wire.errors import WireError
from wire.frames import Kind
from wire.messages import Hello, Receipt
from wire.sealing import Opener, Sealer

TOPIC = "stillhouse/1/barn/pi/order"


@pytest.fixture
def sealer(tmp_path):
    return Sealer(signing.own_key(tmp_path / "signer.key"), tmp_path / "sealed")


@pytest.fixture
def opener(tmp_path, sealer):
    assert sealer
    return Opener(signing.public(signing.own_key(tmp_path / "signer.key")))


def order(number: int = 1) -> bytes:
    return frames.encode(Kind.ORDER, {"run": "run.1", "sequence": number})


RECEIPT = messages.encode(Receipt("result", accepted=True, run="run.1", sequence=1))


def test_a_sealed_message_is_taken_on_its_topic_alone(sealer, opener):
    for frame in (order(), RECEIPT):
        sealed = sealer.seal(TOPIC, frame)
        assert opener.open(TOPIC, sealed) == frame
        with pytest.raises(WireError, match="did not sign it"):
            opener.open(TOPIC.replace("pi", "other"), sealed)


@pytest.mark.parametrize("frame", [order(), RECEIPT])
def test_an_order_or_receipt_that_nobody_signed_is_refused(opener, frame):
    with pytest.raises(WireError, match="expected one that the orchestrator signed"):
        opener.open(TOPIC, frame)
    assert Opener("").open(TOPIC, frame) == frame  # a device without a kit


def test_other_messages_need_no_signature(opener):
    hello = messages.encode(Hello("1"))
    assert opener.open(TOPIC, hello) == hello


def test_another_key_is_refused(opener, tmp_path):
    other = Sealer(signing.own_key(tmp_path / "other.key"), tmp_path / "sealed")
    with pytest.raises(WireError, match="did not sign it"):
        opener.open(TOPIC, other.seal(TOPIC, order()))


def test_an_order_from_before_the_newest_is_refused_also_after_a_restart(sealer, opener):
    first, second = (sealer.seal(TOPIC, order(n)) for n in (1, 2))
    assert opener.open(TOPIC, first) == opener.open(TOPIC, first)  # a broker may repeat it
    opener.open(TOPIC, second)
    for each in (opener, Opener(opener._by, opener.newest)):
        with pytest.raises(WireError, match="somebody repeats it, or the orchestrator's clock"):
            each.open(TOPIC, first)
        each.open(TOPIC, second)


def test_a_receipt_does_not_hold_up_an_order_from_before_it(sealer, opener):
    first, receipt = sealer.seal(TOPIC, order()), sealer.seal(TOPIC, RECEIPT)
    opener.open(TOPIC, receipt)
    opener.open(TOPIC, first)


@pytest.mark.parametrize(
    "header",
    [{}, {"at": 1}, {"signature": "x"}, {"at": "1", "signature": "x"}, {"at": -1, "signature": ""},
     {"at": 1 << 63, "signature": "A" * 88}, {"at": 1, "signature": 5}],
)  # fmt: skip
def test_a_malformed_seal_is_refused(opener, header):
    with pytest.raises(WireError):
        opener.open(TOPIC, frames.encode(Kind.SEALED, header, order()))


def test_a_changed_byte_anywhere_is_refused(sealer, opener):
    inner = bytearray(order())
    sealed = frames.decode(sealer.seal(TOPIC, order()))
    for place in range(len(inner)):
        changed = bytes(inner[:place]) + bytes([inner[place] ^ 1]) + bytes(inner[place + 1 :])
        with pytest.raises(WireError, match="did not sign it"):
            opener.open(TOPIC, frames.encode(Kind.SEALED, sealed.header, changed))


def test_the_time_of_a_seal_is_signed_too(sealer, opener):
    sealed = frames.decode(sealer.seal(TOPIC, order()))
    later = sealed.header | {"at": sealed.header["at"] + 1}
    with pytest.raises(WireError, match="did not sign it"):
        opener.open(TOPIC, frames.encode(Kind.SEALED, later, bytes(sealed.body)))


def test_a_clock_that_goes_back_does_not_stop_orders(tmp_path, opener, monkeypatch):
    key = signing.own_key(tmp_path / "signer.key")
    now = time.time_ns()
    for clock in (now + 10**18, now, now + 1):
        monkeypatch.setattr(time, "time_ns", lambda clock=clock: clock)
        again = Sealer(key, tmp_path / "sealed")
        for _ in range(2):
            opener.open(TOPIC, again.seal(TOPIC, order()))
