"""A signature holds only for the exact content, purpose and key with which it was made."""

import stat

import pytest

from wire import signing
from wire.errors import SignatureError


@pytest.fixture
def key(tmp_path):
    return signing.own_key(tmp_path / "key.pem")


def test_a_signature_holds_for_its_message_context_and_key_alone(key, tmp_path):
    by, signature = signing.public(key), signing.sign(key, "release", b"bytes")
    signing.verify(by, "release", b"bytes", signature)
    other = signing.public(signing.own_key(tmp_path / "other.pem"))
    for wrong in (
        (by, "release", b"byteS", signature),
        (by, "measure", b"bytes", signature),
        (other, "release", b"bytes", signature),
        (by, "release", b"bytes", "no base64"),
        (by, "release", b"bytes", ""),
    ):
        with pytest.raises(SignatureError, match="not signed by"):
            signing.verify(*wrong)


def test_a_key_is_made_once_and_read_by_its_owner_alone(tmp_path):
    path = tmp_path / "key.pem"
    first = signing.public(signing.own_key(path))
    assert signing.public(signing.own_key(path)) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["key.pem"]


@pytest.mark.parametrize("text", ["", "ed25519:", "ed25519:AAAA", "rsa:" + "A" * 44, "ed25519:é"])
def test_what_is_no_public_key_is_refused(text):
    with pytest.raises(SignatureError, match="expected a public key"):
        signing.check_public(text)


def test_what_is_no_private_key_is_refused(tmp_path):
    path = tmp_path / "key.pem"
    path.write_text("nothing of the kind")
    with pytest.raises(SignatureError, match=r"key\.pem: expected an unencrypted PEM"):
        signing.own_key(path)
    with pytest.raises(SignatureError, match="no key can be kept"):
        signing.own_key(tmp_path / "missing" / "key.pem")
