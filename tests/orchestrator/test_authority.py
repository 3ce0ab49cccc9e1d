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
from orchestrator.fleet import authority, certificates, enrolment
from orchestrator.fleet.authority import Authority
from tests.conftest import free_port
from wire import topics
from wire.address import BrokerAddress
from wire.errors import AdmissionError, LinkError, RunError
from wire.link import Arrived, Link, LinkEvent

HOUR = 1 / 24


def key_and_request(key=None):
    key = key or ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return key, request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


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
    ours.claim("pi")
    _, request = key_and_request()
    made = ours.sign("pi:join", request, 90)
    read = x509.load_pem_x509_certificate(made.encode())
    assert read.subject.rfc4514_string() == "CN=pi"
    assert read.not_valid_before_utc.year == 2020
    assert ours.sign("pi:join", request, 90) == made
    with pytest.raises(AdmissionError, match="was used before, with another key"):
        ours.sign("pi:join", key_and_request()[1], 90)


def test_a_new_kit_ends_the_certificates_of_the_former_once_it_is_used(ours):
    ours.claim("pi")
    first = x509.load_pem_x509_certificate(ours.sign("pi:join", key_and_request()[1], 90).encode())
    ours.claim("pi")
    assert not revoked(ours, first)  # the device still works
    ours.sign("pi:join", key_and_request()[1], 90)
    assert revoked(ours, first)


def revoked(ours: Authority, made: x509.Certificate) -> bool:
    read = x509.load_pem_x509_crl(ours.revoked())
    return read.get_revoked_certificate_by_serial_number(made.serial_number) is not None


def test_a_revoked_device_loses_all_its_certificates_and_its_claim(ours):
    claim = x509.load_pem_x509_certificate(ours.claim("pi").encode())
    texts = [ours.sign("pi:join", key_and_request()[1], 90)]
    texts += [ours.sign("pi", key_and_request()[1], 90) for _ in range(2)]
    ours.revoke("pi")
    assert all(revoked(ours, x509.load_pem_x509_certificate(t.encode())) for t in texts)
    assert revoked(ours, claim)
    for user in ("pi", "pi:join", "other", "other:join"):
        with pytest.raises(AdmissionError, match="orchestrator enroll"):
            ours.sign(user, key_and_request()[1], 90)


def test_a_renewal_is_due_in_the_last_third_or_on_request(tmp_path, ours):
    ours.claim("pi")
    ours.sign("pi:join", key_and_request()[1], 90)
    now = time.time()
    assert not authority.due(ours.held()["pi"], now + 59 * 86400, 90)
    assert authority.due(ours.held()["pi"], now + 61 * 86400, 90)
    Authority(tmp_path, "barn").renew("pi")
    assert authority.due(ours.held()["pi"], now, 90)
    ours.sign("pi", key_and_request()[1], 90)
    assert not authority.due(ours.held()["pi"], now, 90)
    with pytest.raises(RunError, match="has no certificate yet"):
        ours.renew("other")


@pytest.mark.parametrize("request_", [b"", b"\x30\x00", bytes(8000)])
def test_a_damaged_request_is_refused(ours, request_):
    ours.claim("pi")
    with pytest.raises(AdmissionError, match="certificate request"):
        ours.sign("pi:join", request_, 90)


def test_a_request_with_a_weak_key_or_signature_is_refused(ours):
    ours.claim("pi")
    _, weak = key_and_request(rsa.generate_private_key(65537, 1024))  # noqa: S505
    _, good = key_and_request()
    for request in (weak, good[:-1] + bytes([good[-1] ^ 1])):
        with pytest.raises(AdmissionError, match="certificate request"):
            ours.sign("pi:join", request, 90)
    ours.sign("pi:join", good, 90)  # nothing was used up


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
    key, request = key_and_request()

    def held(made: Authority, user: str) -> str:
        made.claim("pi")
        return made.sign(user, request, HOUR) + pem(key)

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
    revoked_ = held(ours, "pi:join")
    ours.revoke("pi")
    certificates.revoke(tmp_path, "barn", "pi")
    others["revoked"] = revoked_
    up, down = (topics.topic("barn", "pi", channel) for channel in ("result", "order"))
    boss = Client(listening, tmp_path, ours.client("orchestrator", 1), "stillhouse/1/barn/#")
    good = Client(listening, tmp_path, ours.client("pi", 1), down)
    wait(lambda: boss.link.connected and good.link.connected)
    time.sleep(1.5)  # the broker looks for the revocation list every half second
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
    told = {name: str(clients[name].events[-1]) for name in clients.keys() - inside}
    assert "it is revoked" in told["revoked"]
    assert "it has ended" in told["expired"]
    assert "of another authority" in told["wrong CA"]
    assert "there is none, and the broker asks for one" in told["none"]
    for client in (boss, good, *clients.values()):
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
    made = x509.load_pem_x509_certificate(ours.server(["10.0.0.7"]).encode())
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
