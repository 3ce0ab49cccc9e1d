"""Who gets a certificate, and whom a broker lets in by it."""

import socket
import ssl
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from orchestrator import broker
from orchestrator.fleet import authority, certificates, enrolment, issuing
from orchestrator.fleet.authority import Authority
from tests.conftest import free_port
from wire import topics
from wire.address import BrokerAddress
from wire.errors import AdmissionError, LinkError, RunError
from wire.link import Arrived, Link, LinkEvent

HOUR = 1 / 24


def asking(known_by: str, key=None):
    """A new key, and what `Authority.sign` takes: its request, with the proof of a known key."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    return key, (request, proof(known_by, request))


def proof(known_by: str, request: bytes) -> bytes:
    private = known_by[known_by.index("-----BEGIN PRIVATE KEY") :]
    known = serialization.load_pem_private_key(private.encode(), None)
    return known.sign(request, ec.ECDSA(hashes.SHA256()))


def pem(key) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


@pytest.fixture
def ours(tmp_path):
    return Authority(tmp_path, "barn")


def test_the_first_key_that_comes_with_a_claim_gets_the_certificate(ours):
    claim = ours.claim("pi")
    _, request = asking(claim)
    made = ours.sign("pi:join", *request, 90)
    read = x509.load_pem_x509_certificate(made.encode())
    assert read.subject.rfc4514_string() == "CN=pi"
    assert read.not_valid_before_utc.year == 2020
    assert ours.sign("pi:join", *request, 90) == made
    with pytest.raises(AdmissionError, match="was used before, with another key"):
        ours.sign("pi:join", *asking(claim)[1], 90)


def test_a_new_kit_ends_the_certificates_of_the_former_once_it_is_used(ours):
    first = ours.sign("pi:join", *asking(ours.claim("pi"))[1], 90)
    claim = ours.claim("pi")
    assert not revoked(ours, first)  # the device still works
    ours.sign("pi:join", *asking(claim)[1], 90)
    assert revoked(ours, first)


def test_a_connection_that_outlives_its_credentials_gets_no_certificate(ours):
    """The broker still takes messages from it as `pi` and `pi:join`."""
    former = ours.claim("pi")
    key, request = asking(former)
    held = ours.sign("pi:join", *request, 90) + pem(key)
    claim = ours.claim("pi")
    for user, known_by in (("pi:join", former), ("pi:join", held), ("pi", held), ("pi", claim)):
        with pytest.raises(AdmissionError, match=r"did not sign|has a new kit"):
            ours.sign(user, *asking(known_by)[1], 90)
    ours.sign("pi:join", *asking(claim)[1], 90)


def revoked(ours: Authority, text: str) -> bool:
    made = x509.load_pem_x509_certificate(text.encode())
    read = x509.load_pem_x509_crl(ours.revoked())
    return read.get_revoked_certificate_by_serial_number(made.serial_number) is not None


def test_a_revoked_device_loses_all_its_certificates_and_its_claim(ours):
    claim = ours.claim("pi")
    key, request = asking(claim)
    texts = [ours.sign("pi:join", *request, 90)]
    ours.renew("pi")
    texts.append(ours.sign("pi", *asking(texts[0] + pem(key))[1], 90))
    ours.revoke("pi")
    assert all(revoked(ours, text) for text in (*texts, claim))
    for user in ("pi", "pi:join", "other", "other:join"):
        with pytest.raises(AdmissionError, match="orchestrator enroll"):
            ours.sign(user, *asking(claim)[1], 90)


def test_a_device_that_is_revoked_while_it_joins_stays_revoked(tmp_path, ours, monkeypatch):
    """Another process revokes it between the check and the signature."""
    _, request = asking(ours.claim("pi"))
    made = issuing.certificate

    def late(*args, **named):
        Authority(tmp_path, "barn").revoke("pi")
        return made(*args, **named)

    monkeypatch.setattr(issuing, "certificate", late)
    with pytest.raises(AdmissionError, match="has changed"):
        ours.sign("pi:join", *request, 90)
    assert ours.held() == {}


def test_a_certificate_is_renewed_in_the_last_third_or_on_request_and_not_before(tmp_path, ours):
    key, request = asking(ours.claim("pi"))
    held = ours.sign("pi:join", *request, 90) + pem(key)
    now = time.time()
    assert not authority.due(ours.held()["pi"], now + 59 * 86400, 90)
    assert authority.due(ours.held()["pi"], now + 61 * 86400, 90)
    _, again = asking(held)
    with pytest.raises(AdmissionError, match="is not due to be renewed"):
        ours.sign("pi", *again, 90)
    Authority(tmp_path, "barn").renew("pi")
    made = ours.sign("pi", *again, 90)
    assert not authority.due(ours.held()["pi"], now, 90)
    assert x509.load_pem_x509_certificate(made.encode()).subject.rfc4514_string() == "CN=pi"
    with pytest.raises(RunError, match="has no certificate yet"):
        ours.renew("other")


@pytest.mark.parametrize("request_", [b"", b"\x30\x00", bytes(8000)])
def test_a_damaged_request_is_refused(ours, request_):
    claim = ours.claim("pi")
    with pytest.raises(AdmissionError, match="certificate request"):
        ours.sign("pi:join", request_, proof(claim, request_), 90)


def test_a_request_with_a_weak_key_or_signature_is_refused(ours):
    claim = ours.claim("pi")
    _, (weak, _) = asking(claim, rsa.generate_private_key(65537, 1024))  # noqa: S505
    _, (good, _) = asking(claim)
    for request in (weak, good[:-1] + bytes([good[-1] ^ 1])):
        with pytest.raises(AdmissionError, match="certificate request"):
            ours.sign("pi:join", request, proof(claim, request), 90)
    ours.sign("pi:join", good, proof(claim, good), 90)  # nothing was used up


def test_a_name_that_is_too_long_for_a_certificate_is_refused(ours):
    ours.claim("a" * 59)
    with pytest.raises(RunError, match="use up to 59 letters"):
        ours.claim("a" * 60)


@pytest.mark.parametrize("name", ["authority.json", "signer.key", "ca.key"])
def test_a_file_that_is_gone_is_not_begun_anew(tmp_path, ours, name):
    assert ours.certificate
    (authority.folder(tmp_path, "barn") / name).unlink()
    with pytest.raises(RunError, match="restore it from a copy"):
        Authority(tmp_path, "barn")


def test_a_damaged_authority_is_named_with_its_remedy(tmp_path, ours):
    (authority.folder(tmp_path, "barn") / "ca.key").write_text(ours.claim("pi"))
    with pytest.raises(RunError, match=r"not the key of ca\.pem; restore it from a copy"):
        Authority(tmp_path, "barn")


@pytest.fixture
def listening(tmp_path):
    """A broker of fleet barn that speaks mutual TLS, and the orchestrator's address of it."""
    if broker.find() is None:
        pytest.skip("mosquitto is not installed: sudo apt install mosquitto")
    folder = enrolment.broker_folder(tmp_path, "barn")
    with broker.start(
        "mosquitto", folder=folder, fleet="barn", port=free_port(),
        certificates=certificates.for_broker(tmp_path, "barn", "127.0.0.1"),
    ) as running:  # fmt: skip
        yield certificates.address(folder, running.url)


class Client:
    """A client of the broker by a certificate and key, or by none."""

    def __init__(self, address: BrokerAddress, folder: Path, held: str, *read: str) -> None:
        self.events: list[LinkEvent] = []
        path = None
        if held:
            path = folder / f"client-{len(list(folder.iterdir()))}.pem"
            path.write_text(held)
        address = BrokerAddress(address.url, ca_file=address.ca_file, cert_file=path)
        self.link = Link(address, f"c{time.monotonic_ns()}", subscriptions=[(t, 1) for t in read],
                         emit=self.events.append)  # fmt: skip
        self.link.start()

    def payloads(self) -> list[bytes]:
        return [event.payload for event in self.events if isinstance(event, Arrived)]


def wait(condition) -> None:
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_no_payload_passes_without_a_certificate_that_is_good_for_its_topic(
    tmp_path, ours, listening
):
    """Hostile clients write to a device's topics and read them; a good one shows what passes."""
    now = time.time()

    def held(made: Authority, user: str) -> str:
        key, request = asking(made.claim("pi"))
        return made.sign(user, *request, HOUR) + pem(key)

    late = Authority(tmp_path, "barn", clock=lambda: now - 86400)
    expired = held(late, "pi:join")
    others = {
        "none": "",
        "expired": expired,
        "wrong CA": held(Authority(tmp_path, "other"), "pi:join"),
        "not yet valid": not_yet_valid(tmp_path),
        "the broker's own": ours.server(),
        "another device's": ours.client("mole", 1),
        "a claim": ours.client("pi:join", 1),
        "a wildcard": ours.client("+", 1),
    }
    others["revoked"] = held(ours, "pi:join")
    up, down = (topics.topic("barn", "pi", channel) for channel in ("result", "order"))
    before = Client(listening, tmp_path, others["revoked"], down, up)
    wait(lambda: before.link.connected)
    certificates.revoke(tmp_path, "barn", "pi")
    wait(lambda: any("it is revoked" in str(event) for event in before.events))
    boss = Client(listening, tmp_path, ours.client("orchestrator", 1), "stillhouse/1/barn/#")
    good = Client(listening, tmp_path, ours.client("pi", 1), down)
    wait(lambda: boss.link.connected and good.link.connected)
    clients = {n: Client(listening, tmp_path, text, down, up, "#") for n, text in others.items()}
    inside = {"another device's", "a claim", "a wildcard"}
    wait(lambda: all(clients[name].link.connected for name in inside))
    wait(lambda: all(clients[name].events for name in clients))
    for name, client in clients.items():
        client.link.publish(up, name.encode())
    boss.link.publish(down, b"for pi")
    good.link.publish(up, b"from pi")
    wait(lambda: good.payloads() == [b"for pi"] and b"from pi" in boss.payloads())
    assert [p for p in boss.payloads() if p not in (b"for pi", b"from pi")] == []
    assert not [name for name, client in clients.items() if client.payloads()]
    assert {name for name in clients if clients[name].link.connected} == inside
    for name, text in (
        ("revoked", "it is revoked"),
        ("expired", "it has ended"),
        ("wrong CA", "of another authority"),
        ("none", "there is none, and the broker asks for one"),
    ):
        assert any(text in str(event) for event in clients[name].events)
    for client in (before, boss, good, *clients.values()):
        client.link.close()


def not_yet_valid(tmp_path: Path) -> str:
    """A certificate of the authority, but from next year on."""
    folder = authority.folder(tmp_path, "barn")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pi")])
    ca = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    by = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    year = datetime.now(UTC).year
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(ca.subject)
        .public_key(key.public_key()).serial_number(7)
        .not_valid_before(datetime(year + 1, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(year + 2, 1, 1, tzinfo=UTC)).sign(by, hashes.SHA256())
    )  # fmt: skip
    return made.public_bytes(serialization.Encoding.PEM).decode() + pem(key)


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_broker_of_another_fleet_is_not_taken_for_ours(tmp_path, listening):
    other = Authority(tmp_path, "other")
    (tmp_path / "other.pem").write_text(other.certificate)
    (tmp_path / "held.pem").write_text(other.client("pi", 1))
    events: list[LinkEvent] = []
    address = BrokerAddress(listening.url, ca_file=tmp_path / "other.pem",
                            cert_file=tmp_path / "held.pem")  # fmt: skip
    link = Link(address, "pi", subscriptions=[], emit=events.append)
    link.start()
    wait(lambda: events)
    link.close()
    assert "certificate verify failed" in str(events[0])


def test_a_host_that_a_kit_names_stands_in_the_brokers_certificate(tmp_path, ours):
    kit = certificates.kit(tmp_path, "barn", "pi", "barn.example", 14)
    assert kit["kit.authority"] == ours.certificate
    ours.add_host("10.0.0.7")
    made = x509.load_pem_x509_certificate(ours.server().encode())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "barn.example" in names.get_values_for_type(x509.DNSName)
    assert "10.0.0.7" in map(str, names.get_values_for_type(x509.IPAddress))


def test_tls_below_1_3_is_not_spoken_by_our_broker(listening, tmp_path, ours):
    path = tmp_path / "pi.pem"
    path.write_text(ours.client("pi", 1))
    context = ssl.create_default_context(cafile=listening.ca_file)
    context.load_cert_chain(path)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection((listening.host, listening.port)) as plain,
        pytest.raises(ssl.SSLError, match=r"(?i)version"),
    ):
        context.wrap_socket(plain, server_hostname=listening.host)


def test_files_that_cannot_be_used_are_an_error_at_once(tmp_path, listening):
    (tmp_path / "bad.pem").write_text("no certificate")
    address = BrokerAddress(listening.url, ca_file=listening.ca_file,
                            cert_file=tmp_path / "bad.pem")  # fmt: skip
    with pytest.raises(LinkError, match="must be readable PEM files"):
        Link(address, "pi", subscriptions=[], emit=lambda _: None)
