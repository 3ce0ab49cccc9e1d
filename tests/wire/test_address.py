"""A broker's URL is parsed once or refused with a remedy, and no message contains a secret."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import BrokerConfig
from wire import address, records
from wire.address import BrokerAddress, Endpoint
from wire.errors import SettingsError


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mqtt://broker", Endpoint("mqtt", "broker", 1883)),
        ("mqtts://broker", Endpoint("mqtts", "broker", 8883)),
        ("MQTTS://Broker.Example:8884", Endpoint("mqtts", "broker.example", 8884)),
        ("Mqtt://broker.local./", Endpoint("mqtt", "broker.local", 1883)),
        ("mqtt://my_broker:01883", Endpoint("mqtt", "my_broker", 1883)),
        ("mqtt://192.168.0.7:65535", Endpoint("mqtt", "192.168.0.7", 65535)),
        ("mqtts://[FE80::0001%eth0]", Endpoint("mqtts", "fe80::1%eth0", 8883)),
        ("mqtts://[fe80::1%25eth0]:1", Endpoint("mqtts", "fe80::1%eth0", 1)),
        ("mqtt://[::1]:1", Endpoint("mqtt", "::1", 1)),
    ],
)
def test_a_url_is_read_once_into_scheme_host_and_port(url, expected):
    assert address.parse(url) == expected
    made = BrokerAddress(url)
    assert (made.scheme, made.host, made.port) == expected
    assert made.secure == (expected.scheme == "mqtts")
    assert address.parse(made.url) == expected  # the normalized URL parses to the same address


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("", "expected mqtt://HOST"),
        (" mqtts://broker", "spaces stand before or after it; take them out"),
        ("mqtts://broker\n", "spaces stand before or after it"),
        ("broker", "did you mean mqtt://broker?"),
        ("broker:1883", "did you mean mqtt://broker:1883?"),
        ("mqtts:/broker", "did you mean mqtts://broker?"),
        ("mqtts:broker:8883", "did you mean mqtts://broker:8883?"),
        ("mqtt:\\\\broker", "expected mqtt://HOST"),
        ("//broker", "expected mqtt://HOST"),
        ("://broker", "expected mqtt://HOST"),
        ("ssl://broker", "mqtts://HOST[:PORT] for TLS; write mqtts"),
        ("tcp://broker:1883", "write mqtt"),
        ("wss://broker/mqtt", "HTTP and WebSockets are not spoken here"),
        ("HTTPS://broker", "HTTP and WebSockets are not spoken here"),
        ("mqt://broker", "scheme 'mqt': expected"),
        ("mqtt://", "the host is missing"),
        ("mqtt://:1883", "the host is missing"),
        ("mqtt:///broker", "the host is missing"),
        ("mqtt://bro ker", "without spaces"),
        ("mqtt://bro\tker", "without spaces"),
        ("mqtt://bro\x00ker", "without spaces"),
        ("mqtt://br\u00fccke.example", "did you mean mqtt://xn--brcke-lva.example:1883?"),
        ("mqtts\uff1a//broker", "in ASCII"),
        ("mqtt://bro%20ker", "host 'bro%20ker': expected a name"),
        ("mqtt://bro,ker", "expected a name"),
        ("mqtt://-broker", "expected a name"),
        ("mqtt://broker..example", "expected a name"),
        ("mqtt://" + "a" * 64, "expected a name"),
        ("mqtt://" + ".".join(["a" * 60] * 5), "expected a name"),
        ("mqtt://300.1.2.3", "expected a name"),
        ("mqtt://1.2.3", "expected a name"),
        ("mqtt://0.0.0.0:1883", "nothing can connect to it"),
        ("mqtt://[::]", "nothing can connect to it"),
        ("mqtt://::1", "an IPv6 address stands in brackets"),
        ("mqtt://fe80::1:1883", "an IPv6 address stands in brackets"),
        ("mqtt://[broker]", "expected an IPv6 address in the brackets"),
        ("mqtt://[::1", "expected mqtt://HOST"),
        ("mqtt://[::1]1883", "expected mqtt://HOST"),
        ("mqtt://broker:", "port '': expected a number from 1 to 65535"),
        ("mqtt://broker:0", "port '0': expected a number"),
        ("mqtt://broker:65536", "port '65536'"),
        ("mqtt://broker:-1", "port '-1'"),
        ("mqtt://broker:+1883", "port '+1883'"),
        ("mqtt://broker:1_883", "port '1_883'"),
        ("mqtt://broker:" + "9" * 5000, "expected a number"),
        ("mqtt://broker:port", "port: expected a number"),
        ("mqtt://[fe80::1%a:b]", "expected an IPv6 address in the brackets"),
        ("mqtt://[fe80::1%]", "expected an IPv6 address in the brackets"),
        ("mqtt://broker:18:83", "there is one ':', before the port"),
        ("mqtt://broker/fleet", "nothing after the host and port"),
        ("mqtt://broker//", "nothing after the host and port"),
        ("mqtt://broker?tls=1", "nothing after the host and port"),
        ("mqtt://broker#1", "nothing after the host and port"),
    ],
)  # fmt: skip
def test_a_url_that_is_none_is_refused_with_what_to_write(url, text):
    with pytest.raises(ValueError, match=r"^url ") as caught:
        BrokerAddress(url)
    assert text in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "url",
    [
        "mqtt://user:tops3cret@broker",
        "MQTTS://tops3cret@broker",
        "mqtt://user:a@tops3cret@broker:1883",
        "mqtt://user:a/tops3cret@broker",
        "mqtt://user:a?tops3cret@broker",
        " mqtt://user:tops3cret@broker",
        "mqtt:user:tops3cret@broker",
        "user:tops3cret@broker",
        "mqtt://user:\ntops3cret@broker",
        "http://user:tops3cret@broker",
        "mqtt://user:tops3cret%40broker",
        "mqtt://user:tops3cret\uff20broker",
        "mqtt://user:tops3cret",
        "mqtts://user:1883:tops3cret",
        "mqtt://[::1]:tops3cret",
        "user:tops3cret",
        "mqtt://broker?password=tops3cret",
        "mqtt://broker/#tops3cret",
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(url):
    with pytest.raises(SettingsError) as caught:
        records.build(BrokerAddress, {"url": url}, where="agent.toml", error=SettingsError)
    assert "tops3cret" not in str(caught.value)
    assert "***" in str(caught.value)


def test_a_password_is_in_no_repr_and_no_error():
    assert "tops3cret" not in repr(BrokerAddress("mqtt://broker", "pi", "tops3cret"))
    for wrong in (b"tops3cret", ["tops3cret"], 734837):
        table = {"url": "mqtt://broker", "username": "pi", "password": wrong}
        with pytest.raises(SettingsError, match="password: expected text in quotes") as caught:
            records.build(BrokerAddress, table, where="agent.toml", error=SettingsError)
        assert "tops3cret" not in str(caught.value)
        assert "734837" not in str(caught.value)


def test_a_url_in_the_wrong_place_shows_no_password():
    url = "mqtt://user:tops3cret@broker"
    for cls, table in (
        (BrokerAddress, {"url": [url]}),
        (BrokerConfig, {"kind": url}),
        (BrokerConfig, {"host": url}),
        (BrokerConfig, {"port": url}),
        (BrokerConfig, {"host": "user:tops3cret"}),
    ):
        with pytest.raises(SettingsError) as caught:
            records.build(cls, table, where="x.toml", error=SettingsError)
        assert "tops3cret" not in str(caught.value)


def test_what_is_read_from_the_url_is_no_setting():
    made = BrokerAddress("mqtt://broker")
    assert set(records.plain(made)).isdisjoint({"scheme", "host", "port"})
    with pytest.raises(SettingsError, match="unknown key 'port'"):
        records.build(
            BrokerAddress, {"url": "mqtt://broker", "port": 1}, where="x", error=SettingsError
        )


PEM = Path("x.pem")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"url": "mqtt://broker", "ca_file": PEM},
            "ca_file is for TLS, and url mqtt://broker:1883",
        ),
        ({"url": "mqtt://broker", "key_file": PEM}, "write mqtts://"),
        ({"url": "mqtts://broker", "key_file": PEM}, "key_file without cert_file"),
        ({"url": "mqtts://broker", "ca_file": PEM, "key_file": PEM}, "key_file without cert_file"),
        ({"url": "mqtt://broker", "password": "x"}, "password without username"),
        ({"url": "mqtt://broker", "username": "a\0b"}, "without NUL"),
        ({"url": "mqtt://broker", "username": "a", "password": "\u00fc" * 40_000}, "65535 bytes"),
    ],
)
def test_settings_that_would_be_passed_over_in_silence_are_refused(settings, text):
    with pytest.raises(ValueError, match=r"expected|without|TLS") as caught:
        BrokerAddress(**settings)
    assert text in str(caught.value)


def test_files_are_beside_the_settings_and_must_be_there(tmp_path):
    (tmp_path / "ca.pem").touch()
    relative = BrokerAddress("mqtts://broker", ca_file=Path("ca.pem"))
    assert relative.beside(tmp_path).ca_file == tmp_path / "ca.pem"
    absolute = replace(relative, ca_file=tmp_path / "ca.pem")
    assert absolute.beside(Path("/nowhere")).ca_file == tmp_path / "ca.pem"
    with pytest.raises(ValueError, match=r"ca_file: no file /nowhere/ca\.pem"):
        relative.beside(Path("/nowhere"))


@given(st.text(max_size=30) | st.from_regex(r"(?i)mqtts?://[ -~]{0,20}", fullmatch=True))
def test_any_text_is_a_broker_or_one_line_that_says_why_not(url):
    fault = ""
    try:
        endpoint = address.parse(url)
    except ValueError as refused:
        fault = str(refused)
    if fault:
        assert fault.startswith("url ")
        assert fault.isprintable()
    else:
        assert url.lower().startswith(f"{endpoint.scheme}://")
        assert 1 <= endpoint.port <= 65535
