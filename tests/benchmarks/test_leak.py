"""What feature maps reveal: a small real run, and the measures compared with their definitions."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.leak import likeness, sending
from benchmarks.leak.__main__ import main

TINY = ["--data=digits", "--public=digits", "--images=160", "--epochs=4", "--precision=float32"]


@pytest.mark.usefixtures("one_thread")
def test_coarser_and_noisier_maps_look_less_like_the_image(tmp_path, capsys):
    path = tmp_path / "leak.json"
    names = ["float32", "q=1", "noise 5", "block2, q=2"]
    command = [*TINY, f"--settings={';'.join(names)}", f"--out={tmp_path}", f"--json={path}"]
    assert main(command) == 0
    record = json.loads(path.read_text())
    plain, coarse, noisy, deep = record["figures"]
    assert [figure["name"] for figure in record["figures"]] == names
    assert plain["psnr"] > coarse["psnr"] > noisy["psnr"] + 5
    assert plain["ssim"] > coarse["ssim"] > noisy["ssim"]
    assert plain["psnr"] > record["mean_public_image"]["psnr"] + 3
    assert 16 * 32 * 32 * 4 < plain["bytes"] < 16 * 32 * 32 * 4 + 50
    assert coarse["bytes"] < plain["bytes"] / 30
    assert deep["model"] == "resnet8-block2"
    assert plain["accuracy"] > noisy["accuracy"]
    assert plain["epsilon"] is None
    assert 1 < noisy["epsilon"] < noisy["epsilon_of_releases"]
    assert (tmp_path / "leak.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "160 of digits" in shown
    assert all(name in shown for name in names)


def test_ssim_is_that_of_wang_et_al_window_by_window():
    random = np.random.default_rng(0)
    a, b = random.random((2, 2, 3, 13, 12))
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    expected = []
    for image, other in zip(a, b, strict=True):
        values = []
        for x, y in zip(image, other, strict=True):
            for i, j in np.ndindex(3, 2):
                p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                u, v = (window * p).sum(), (window * q).sum()
                pp, qq = (window * (p - u) ** 2).sum(), (window * (q - v) ** 2).sum()
                pq = (window * (p - u) * (q - v)).sum()
                top = (2 * u * v + 0.01**2) * (2 * pq + 0.03**2)
                values.append(top / ((u**2 + v**2 + 0.01**2) * (pp + qq + 0.03**2)))
        expected.append(np.mean(values))
    found = likeness.ssim(torch.from_numpy(a), torch.from_numpy(b))
    assert found.numpy() == pytest.approx(expected, abs=1e-12)
    assert likeness.ssim(*[torch.from_numpy(a)] * 2).numpy() == pytest.approx(1)


def test_psnr_of_an_error_of_a_tenth_is_twenty():
    a = torch.full((2, 3, 4, 4), 0.5)
    assert likeness.psnr(a, a + 0.1).numpy() == pytest.approx(20, abs=1e-4)


def test_epsilon_falls_with_noise_and_grows_with_releases():
    bounds = [sending.epsilon(sigma) for sigma in (0.003, 0.01, 0.1, 1, 5, 20)]
    assert bounds == sorted(bounds, reverse=True)
    assert sending.epsilon(5, 20) > sending.epsilon(5)
    # Noise equal to the sensitivity: Balle and Wang 2018, theorem 8, gives 4.3766 at delta 1e-5.
    assert 4.3766 <= sending.epsilon(2) < 4.3766 * 1.1
    # Twenty releases equal one with 1 / sqrt(20) of the noise.
    assert sending.epsilon(5, 20) == pytest.approx(sending.epsilon(5 / math.sqrt(20)), rel=1e-6)


def test_noised_map_is_clipped_first_and_never_negative():
    maps, random = torch.ones(2, 1, 10, 10), torch.Generator().manual_seed(0)
    maps[1] *= 0.01
    silent = sending.noised(maps, 1e-9, 2.0, random)
    assert silent.flatten(1).norm(dim=1).tolist() == pytest.approx([2.0, 0.1], rel=1e-5)
    noise = sending.noised(0 * maps, 0.5, 2.0, random).flatten()
    assert noise.min() == 0
    assert noise[noise > 0].square().mean().sqrt() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--settings=float32;blok1", "got 'blok1'; did you mean 'block1'"),
        ("--data=nowhere", "source 'nowhere': expected one of digits"),
        ("--public=nowhere", "source 'nowhere': expected one of digits"),
        ("--json=nowhere/leak.json", "nowhere is no folder"),
        (f"--out={__file__}", "test_leak.py: expected a folder, got a file"),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_bad_input_is_named(option, reason, tmp_path, capsys):
    assert main([*TINY, f"--out={tmp_path / 'out'}", option]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
