"""A measurement is accepted only as its device signed it, and only if tables can show it."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from wire import measurement, signing
from wire.errors import SignatureError, StillhouseError, WireError
from wire.measurement import FORMAT

REPORT = {
    "format": FORMAT,
    "name": "pi-3",
    "agent": "0.1.0",
    "measured_at": "2026-11-22T05:00:00Z",
    "platform": {"model": "Raspberry Pi 5 Model B Rev 1.0", "machine": "aarch64", "cores": 4,
                 "memory_bytes": 8 << 30, "python": "3.11.2", "onnxruntime": "1.31.1"},
    "threads": 4,
    "artifact": {"digest": "ab" * 32, "task": "distill", "batch": 32, "micro_batches": 1,
                 "model": {"name": "resnet8", "classes": 10, "input": [3, 32, 32],
                           "keep_rate": 1.0},
                 "parameters": 10586, "step_flops": 10**9, "activation_bytes": 10**6},
    "machine": {"gemm_gflops": 40.0, "copy_gbytes": 8.0},
    "step": {"timed": 20, "median_s": 0.1, "quartiles_s": [0.09, 0.1, 0.11],
             "images_per_s": 320.0, "gflops": 10.0},
    "layers": [{"name": "", "phase": "forward", "flops": 10**9, "bytes": 10**6,
                "activation_bytes": 10**6, "seconds": 0.05}],
    "memory": {"idle_bytes": 1, "loaded_bytes": 2, "train_peak_bytes": 3, "pss_bytes": 3,
               "group_peak_bytes": 0, "foretold_bytes": 4, "budget_bytes": 5, "largest_batch": 6},
    "energy": {"sensor": "PMIC", "joules_per_sample": 0.02, "watts": 6.4},
    "heat": {"celsius_before": {"cpu-thermal": -3.5}, "celsius_after": {}, "held_back_before": [],
             "held_back_after": [], "held_back_meanwhile": []},
    "valid": True,
}  # fmt: skip


@pytest.fixture
def key(tmp_path):
    return signing.own_key(tmp_path / "device.pem")


def test_programs_that_make_a_key_at_once_end_up_with_one(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: signing.own_key(tmp_path / "shared.pem"), range(16)))
    assert [path.name for path in tmp_path.iterdir()] == ["shared.pem"]


def changed(where, value):
    """The report with one value replaced, at a path such as step.timed."""
    made = json.loads(json.dumps(REPORT))
    place = made
    *path, last = where.split(".")
    for part in path:
        place = place[int(part) if part.isdigit() else part]
    place[last] = value
    return made


def test_what_a_device_signed_is_read_back_whatever_its_layout(key):
    signed = measurement.sign(key, REPORT)
    assert signed.device == signing.public(key)
    for data in (signed.to_bytes(), json.dumps(json.loads(signed.to_bytes()), indent=3).encode()):
        assert measurement.verify(data, where="x.json") == signed


def test_anyone_can_check_a_file_without_our_code(key):
    """The check is the one in docs/measure.md."""
    report = json.loads(measurement.sign(key, REPORT).to_bytes())
    signature = base64.b64decode(report.pop("signature"))
    owner = base64.b64decode(report["device"].removeprefix("ed25519:"))
    text = json.dumps(report, sort_keys=True, separators=(",", ":"))
    signed = b"stillhouse-measure/2\0" + text.encode()
    Ed25519PublicKey.from_public_bytes(owner).verify(signature, signed)


def test_one_changed_figure_is_noticed(key):
    whole = json.loads(measurement.sign(key, REPORT).to_bytes())
    for name, value in (("threads", 1), ("name", "pi-4"), ("valid", False), ("pytorch", None)):
        forged = {**whole, name: value}
        if forged == whole:
            del forged[name]
        with pytest.raises(SignatureError, match="this is not signed by ed25519:"):
            measurement.verify(json.dumps(forged).encode(), where="x.json")


@pytest.mark.parametrize(
    ("where", "value", "text"),
    [
        ("format", "stillhouse-measure/1", "expected format stillhouse-measure/2, got 'stillhouse"),
        ("name", "../pi", "device name '../pi': use 1 to 64"),
        ("measured_at", "yesterday", "measured_at: expected 2026-01-31T12:00:00Z"),
        ("steps", {}, "unknown key 'steps'; did you mean 'step'"),
        ("step.images_per_s", "many", "images_per_s: expected float, got str"),
        ("step.images_per_s", -1.0, "step.images_per_s: expected 0 or more"),
        ("step.quartiles_s", [0.1, 0.0, 0.1], "quartiles_s: expected three over 0"),
        ("step.timed", 10**40, "a number of 41 digits"),
        ("machine.copy_gbytes", 0.0, "expected over 0"),
        ("platform.model", "Pi\n| x", "platform: model: expected up to 256 printable"),
        ("heat.celsius_after", {"x" * 300: 1.0}, "heat.celsius_after: expected up to 256"),
        ("artifact.digest", 3, "digest: expected str"),
    ],
)
def test_what_is_no_measurement_is_refused_by_name(where, value, text):
    made = {**changed(where, value), "device": "ed25519:", "signature": ""}
    with pytest.raises(WireError) as caught:
        measurement.verify(json.dumps(made).encode(), where="x.json")
    assert text in str(caught.value)
    assert "x.json" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"[" * 100_000, b"\xff", b'{"format": NaN}', b"0" * (measurement.MAX_BYTES + 1)],
)
def test_hostile_bytes_end_in_an_error_of_ours(data):
    with pytest.raises(StillhouseError):
        measurement.verify(data, where="x.json")


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity", "1e99"])
def test_no_figure_is_infinite(number, key):
    text = measurement.sign(key, REPORT).to_bytes().replace(b"320.0", number.encode())
    with pytest.raises(WireError):
        measurement.verify(text, where="x.json")
