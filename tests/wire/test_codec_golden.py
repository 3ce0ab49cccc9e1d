"""Golden bytes: the meaning of a codec's bytes is fixed, for any numpy and any processor.

float32, float16 and identity are exact in both directions, because they sum nothing. `relu` decodes
exactly, but its scale is a sum. hadamard, kashin and eden rotate with a matrix product, which
processors sum in different orders: scales and decoded values agree within TOLERANCE, and levels
agree unless a coefficient lies on the border of two. None does here: noise of 1e-5 of the largest
coefficient changes no level.
"""

import numpy as np
import pytest

from wire import codecs, seeds

RAMP = np.linspace(-1, 1, 20, dtype=np.float32)
EXACT = ("float32", "float16", "identity")
TOLERANCE = 1e-6  # of the largest; OpenBLAS's Haswell, SkylakeX and Nehalem differ by 4.4e-7

GOLDEN = {
    "float32": "000080bf790d65bff31a4abf6c282fbfe53514bfbd86f2beafa1bcbea2bc86be28af21be369457bd"
    "3694573d28af213ea2bc863eafa1bc3ebd86f23ee535143f6c282f3ff31a4a3f790d653f0000803f",
    "identity|q=8": "000080bf8180003c000d1b283643515e6c798693a1aebcc9d7e4f2ffffffffff",
    "identity|q=3": "000080bf2549923e4012692359b6f6ffff",
    "hadamard|q=4": "74baa6bfc31c043e948b8976a9a86759c9c6bdb0edf3aca3",
    "float16": "00bc28bb51ba79b9a2b894b7e5b536b40db1bdaabd2a0d313634e5359437a2387939513a283b003c",
    "identity|s=0.5|q=4": "790d65bfed58013e104286b9edff0000",
    "hadamard|q=1": "74baa6bfeeb5f73f5e57bdbf",
    "hadamard|s=0.5|q=4": "f4f621bf26c3ac3d86158463079afe7a",
    "kashin|q=4": "964c8fbfca0df53db697977bc2ec4970a2fb4781d967d65a",
    "kashin|s=0.5|q=2": "964c8fbf75470e3faa2c5957",
    "eden|b=0.5": "f0bb963f3ee3e49f",
    "drive": "b113013f5d2b05bc229c5547",
    "eden|b=1.5": "2af8dd3ea772ce4d2654b59a229c5547",
    "eden|b=2": "37d8af3ea772ce4d2654b59a4d4ca08676727e20",
    "eden|b=2|mse": "46c79e3ea772ce4d2654b59a4d4ca08676727e20",
    "eden|b=5": "5a2cae3ef7c96a0966149fcbee59f0d181947bcce12a2b8b8b9f64f248e8d408dbb1f75d360d7e94"
    "df744c2c",
    "relu|q=1.5": "3694d73eaa550055aa00",
    "relu|q=2": "a622963ebf5a41a5fe00",
    "relu|q=3": "7034103eb7cb4d01a28db50f00",
}

# Places at which values decoded from `drawn_body` are checked: 5,000 in whole blocks and a tail.
PLACES = [0, 1, 1023, 3480, 3481, 4095, 4096, 4999]
DECODED = {
    "identity|q=8": [
        -0.6313726, -0.8901961, 0.38823533, 0.85882366, 0.20784318, -0.8745098,
        0.12156868, 0.73333347,
    ],
    "identity|q=3": [1, 0.42857146, 1, -0.4285714, 1, 0.71428585, 0.71428585, 0.71428585],
    "identity|s=0.5|q=4": [0, 2, 0, 0, -2, 0.9333334, 0, 0],
    "hadamard|q=4": [
        -1.0604198, 0.96875, 0.06875008, -0.17708328, 0.7229169, 0.5020833, 0.42500153, 1.0666666,
    ],
    "hadamard|q=1": [0.09375, 0.21875, -0.53125, 1.21875, 1.65625, -0.15625, -0.06250012, 2.1875],
    "hadamard|s=0.25|q=8": [
        1.3117614, 0.53823537, 0.10294102, -0.005882662, -0.7441182, -0.35588288,
        0.33823705, -0.3421569,
    ],
    "kashin|q=4": [
        0.96875, -0.5687502, -0.73125017, 0.5020833, 0.388911, 0.67175144, -0.43604913, -1.2197593,
    ],
    "kashin|s=0.5|q=2": [
        -1.0625, 0.20833325, 0.2500001, 0.5208336, -0.47140354, -0.5303302, -1.9740063, -1.0901233,
    ],
    "eden|b=0.5": [
        0.0038959086, -0.027271397, -0.07480164, -0.0662307, 0.33738673, 0.25089735,
        -0.50958645, -0.067009896,
    ],
    "drive": [
        -0.08298309, -0.41179883, -0.1258383, 0.18817285, -0.3050506, -1.1481278,
        -0.043634288, 0.86645275,
    ],
    "eden|b=1.5": [
        0.16420457, -0.90159106, 0.82160413, -0.2496394, 0.061124295, -0.3115468,
        -0.772793, 0.18244642,
    ],
    "eden|b=2": [
        0.7842181, -0.30171177, -0.17711169, -0.4078863, -0.48288265, -0.5741374,
        -0.25259572, 0.46602428,
    ],
    "eden|b=2|mse": [
        -0.087326385, -0.06604838, 0.13917151, 0.62532645, 0.07080079, 0.2005215,
        -0.0047523826, -0.52385056,
    ],
    "eden|b=5": [
        1.1544353, 0.96445256, -0.7479917, 0.83139896, -1.7109265, 0.09494232, 1.1350547,
        -1.4518976,
    ],
    "relu|q=1.5": [1.5, 1, 0.5, 1.5, 1, 1.5, 1.5, 1],
    "relu|q=3": [1.5, 3.5, 2, 1.5, 1.5, 3.5, 1.5, 2.5],
}  # fmt: skip


def head_bytes(spec):
    """The bytes of a block's scale, or of its minimum and step."""
    return 4 if spec.startswith(("eden", "drive", "relu")) else 8


def near(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("spec", GOLDEN)
def test_values_encode_to_golden_bytes(spec):
    values = np.abs(RAMP) if spec.startswith("relu") else RAMP
    body = codecs.parse(spec).encode(values, seed=7, name="x")
    golden = bytes.fromhex(GOLDEN[spec])
    if not spec.startswith(EXACT):
        head = head_bytes(spec)
        near(np.frombuffer(body[:head], "<f4"), np.frombuffer(golden[:head], "<f4"))
        body, golden = body[head:], golden[head:]
    assert body.hex() == golden.hex()


@pytest.mark.parametrize("spec", DECODED)
def test_bytes_decode_to_golden_values(spec):
    codec = codecs.parse(spec)
    decoded = codec.decode(drawn_body(spec, 5000), 5000, seed=7, name="x")
    expected = np.array(DECODED[spec], np.float32)
    if spec.startswith((*EXACT, "relu")):
        np.testing.assert_array_equal(decoded[PLACES], expected)
    else:
        near(decoded[PLACES], expected)


def drawn_body(spec, n):
    """A body of random levels for `n` values; each block spans -1 to 1, or has a scale of 0.5."""
    codec = codecs.parse(spec)
    noise = seeds.raw(1, 0, codec.size(n) // 8 + 1).astype("<u8").tobytes()
    fields = [0.5] if head_bytes(spec) == 4 else [-1, 2 / (2**codec.coder.bits - 1)]
    scale = np.array(fields, "<f4").tobytes()
    body = b""
    while n:
        size = codec.coder.row_bytes(min(n, codec.coder.block))
        body += scale + noise[len(body) + len(scale) : len(body) + size]
        n -= min(n, codec.coder.block)
    return body


def test_golden_bytes_of_zstd_decode():
    """Other versions of Zstandard may compress to other bytes, but must always decompress these."""
    packed = bytes.fromhex(
        "28b52ffd2020010100000080bf8180003c000d1b283643515e6c798693a1aebcc9d7e4f2ffffffffff"
    )
    decoded = codecs.parse("identity|q=8|zstd").decode(packed, 20, seed=7, name="x")
    plain = codecs.parse("identity|q=8").decode(packed[9:], 20, seed=7, name="x")
    np.testing.assert_array_equal(decoded, plain)


def test_zeros_of_either_sign_encode_alike():
    """Which of 0.0 and -0.0 counts as smaller depends on the processor."""
    signed = np.array([0.0, -0.0] * 8, np.float32)
    for zeros in (signed, -signed, np.abs(signed)):
        body = codecs.parse("identity|q=8").encode(zeros, seed=0, name="x")
        assert body == bytes(8 + 16)
