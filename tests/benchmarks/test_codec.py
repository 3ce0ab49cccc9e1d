"""The benchmark of codecs: a short real run, and figures that must hold on any machine."""

import json
import math

import numpy as np
import pytest

from benchmarks.codec import contenders, report, samples, turns
from benchmarks.codec.__main__ import main
from benchmarks.codec.contenders import COPY, TORCH, Contender
from benchmarks.codec.report import Size
from benchmarks.codec.turns import Course


@pytest.mark.e2e
def test_a_short_run_reports_every_codec_and_peer(tmp_path, capsys, monkeypatch):
    fewer = [s for s in contenders.UPDATES if "s=" not in s and not s.endswith(("=8", "=3", ".5"))]
    needed = {f"{t}|q={q}" for t in ("hadamard", "kashin") for q in range(1, 5)} | {"hadamard|q=5"}
    monkeypatch.setattr(contenders, "UPDATES", sorted({*fewer, *needed}))
    monkeypatch.setattr(samples, "MAPS", 8)
    out = tmp_path / "codec.json"
    arguments = ["--steps=4", "--values=50000", "--rounds=2", "--seconds=0.001", f"--json={out}"]
    assert main(arguments) == 0
    whole = json.loads(out.read_text())
    assert whole["machine"]["cores"] > 0
    for kind in ("normal", "lognormal", "update"):
        sizes = whole["sizes"][kind]
        assert set(sizes) == set(contenders.UPDATES)
        for spec, size in sizes.items():
            assert math.isfinite(size["error"])
            if "=" in spec and "zstd" not in spec and "s=" not in spec:
                nominal = float(spec.split("=")[1].split("|")[0])
                assert nominal < size["bits"] < 1.2 * nominal + 0.1
        assert sizes["float32"]["error"] == 0
        assert sizes["float32|zstd"]["bits"] < 32.1
        for bits in (1, 2, 4):
            ours, least = sizes[f"eden|b={bits}"], sizes[f"eden|b={bits}|mse"]
            assert least["error"] < ours["error"] < sizes[f"hadamard|q={bits}"]["error"] / 3
            assert sizes[f"kashin|q={bits}"]["error"] < sizes[f"hadamard|q={bits}"]["error"]
    maps = whole["sizes"]["features"]
    for bits in (1, 2, 4):
        # Half of a map is zeros; a codec that rotates them away cannot do as well.
        assert maps[f"relu|q={bits}|zstd"]["bits"] < 0.8 * maps[f"relu|q={bits}"]["bits"]
        assert maps[f"relu|q={bits}|zstd"]["error"] == maps[f"relu|q={bits}"]["error"]
    assert maps["relu|q=4"]["error"] < min(
        maps[s]["error"] for s in ("identity|q=4", "hadamard|q=4")
    )
    behind = {f"maps: {spec}" for spec in contenders.FEATURES}
    assert set(whole["rates"]) == {*contenders.UPDATES, *behind, *whole["peer_bits"]}
    for of in whole["rates"].values():
        for rate in of.values():
            assert 0 < rate["lowest"] <= rate["median"] <= rate["highest"]
            assert rate["to_copy"] > 0
    assert whole["rates"][TORCH]["encode"]["to_pytorch"] == 1
    assert whole["rates"][COPY]["decode"]["to_copy"] == 1
    assert whole["peer_bits"][TORCH] == pytest.approx(4 + 64 / 4096)
    assert whole["peer_bits"][COPY] == 32
    for ratios in whole["kashin_to_hadamard_at_equal_bytes"].values():
        assert list(ratios) == ["1", "2", "3", "4"]
    table = capsys.readouterr().out
    for name in (*contenders.UPDATES, *contenders.FEATURES, *whole["peer_bits"]):
        assert f"│ {name} " in table, name
    assert "kashin's error over hadamard's at equal bytes, update: " in table


def test_pytorchs_transform_makes_the_same_error_as_ours():
    values = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    peer = contenders.pytorch(values)
    decoded = peer.decode(peer.encode())
    theirs = np.square(decoded - values).sum() / np.square(values).sum()
    assert theirs == pytest.approx(report.vector("hadamard|q=4", values).error, rel=0.1)


def test_kashin_is_set_against_blocks_of_two_kinds_that_take_as_many_bytes():
    sizes = {f"hadamard|q={q}": Size(q, 8.0 / 2**q) for q in range(1, 6)}
    sizes |= {f"kashin|q={q}": Size(q + 0.25, 8.0 / 2**q) for q in range(1, 5)}
    # A quarter at q + 1 bits: 3/4 + 1/4 * 1/2 of the error at q.
    assert report.kashin(sizes) == {q: pytest.approx(8 / 7) for q in range(1, 5)}


def test_ratios_are_taken_within_a_round():
    """If the machine halves its speed after the first round, no ratio changes."""
    rates = report.rates([
        Course("ours", [80.0, 40.0], [90.0, 45.0]),
        Course(TORCH, [20.0, 10.0], [30.0, 15.0]),
        Course(COPY, [800.0, 400.0], [900.0, 450.0]),
    ])  # fmt: skip
    ours = rates["ours"]
    assert (ours["encode"].to_pytorch, ours["encode"].to_copy) == (4, 0.1)
    assert (ours["decode"].to_pytorch, ours["decode"].to_copy) == (3, 0.1)
    assert (ours["encode"].median, ours["encode"].lowest, ours["encode"].highest) == (60, 40, 80)


def test_all_take_their_turn_in_every_round():
    calls = []

    def contender(name):
        values = np.zeros(3, np.float32)
        return Contender(name, lambda: calls.append(name), lambda _body: values, 3)

    courses = turns.run([contender(n) for n in "abc"], rounds=4, seconds=1e-9)
    assert [len(course.encode) for course in courses] == [4, 4, 4]
    orders = {tuple(calls[i : i + 3]) for i in range(3, 15, 3)}  # the first three only make bodies
    assert len(orders) > 1
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
