"""What a device takes for its certificate."""

import pytest

from edge_agent.joining import Identity, join
from ondevice.config import AgentConfig, Kit
from orchestrator.fleet.authority import Authority
from wire.address import BrokerAddress
from wire.errors import RefusedError


@pytest.fixture
def ours(tmp_path):
    return Authority(tmp_path / "runs", "barn")


def device(tmp_path, ours, claim="", name="pi"):
    kit = Kit(ours.certificate, claim or ours.claim(name))
    broker = BrokerAddress("mqtts://barn")
    return AgentConfig(name, "barn", tmp_path / "images", tmp_path / "state", broker, kit=kit)


@pytest.fixture(autouse=True)
def _runs(tmp_path):
    (tmp_path / "runs").mkdir()


def test_a_device_joins_and_renews_with_new_keys(tmp_path, ours):
    identity = Identity(device(tmp_path, ours))
    assert not identity.joined
    request = identity.request()
    assert Identity(device(tmp_path, ours, claim=identity._kit.claim)).request().request
    pem = ours.sign("pi:join", request.request, request.proof, 90)
    assert identity.take(pem)
    assert identity.joined
    held = (tmp_path / "state/identity/device.pem").read_text()
    assert held.startswith(pem)
    assert not identity.take(pem)  # it comes again
    ours.renew("pi")
    again = identity.request()
    assert identity.take(ours.sign("pi", again.request, again.proof, 90))
    renewed = (tmp_path / "state/identity/device.pem").read_text()
    assert renewed.partition("PRIVATE KEY")[2] != held.partition("PRIVATE KEY")[2]


def test_a_certificate_of_another_authority_or_name_or_key_changes_nothing(tmp_path, ours):
    identity = Identity(device(tmp_path, ours))
    request = identity.request()
    other = Authority(tmp_path / "runs", "other")
    foreign = Identity(device(tmp_path / "other", other))
    asked = foreign.request()
    signed = other.sign("pi:join", asked.request, asked.proof, 90)
    wrong = Identity(device(tmp_path / "wrong", ours, name="mole")).request()
    for pem in (signed, ours.client("pi", 1), ours.sign("mole:join", wrong.request, wrong.proof, 1),
                "", "-----BEGIN CERTIFICATE-----"):  # fmt: skip
        assert not identity.take(pem)
    assert not identity.joined
    assert identity.take(ours.sign("pi:join", request.request, request.proof, 90))


def test_a_new_kit_replaces_what_came_by_the_former(tmp_path, ours):
    config = device(tmp_path, ours)
    identity = Identity(config)
    request = identity.request()
    identity.take(ours.sign("pi:join", request.request, request.proof, 90))
    assert Identity(config).joined
    assert not Identity(device(tmp_path, ours)).joined


@pytest.mark.parametrize("name", ["claim.pem", "next.pem", "authority.pem"])
def test_a_damaged_file_is_made_anew(tmp_path, ours, name):
    config = device(tmp_path, ours)
    Identity(config).request()
    (tmp_path / "state/identity" / name).write_bytes(b"\xff\x00 no PEM")
    request = Identity(config).request()
    assert ours.sign("pi:join", request.request, request.proof, 90)


def test_a_damaged_certificate_is_named_with_its_remedy(tmp_path, ours):
    config = device(tmp_path, ours)
    identity = Identity(config)
    request = identity.request()
    identity.take(ours.sign("pi:join", request.request, request.proof, 90))
    join(config, lambda _: None, lambda: True)
    path = tmp_path / "state/identity/device.pem"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(RefusedError, match=r"is damaged .*; enroll the device again"):
        join(config, lambda _: None, lambda: True)
