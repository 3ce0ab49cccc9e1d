"""The benchmark of server training: a short real run, and figures that must hold anywhere."""

import json

import pytest

from benchmarks.distill import main


@pytest.mark.usefixtures("one_thread")
def test_a_short_run_reports_every_contender_beside_the_reference(tmp_path, capsys):
    path = tmp_path / "distill.json"
    command = ["--model=resnet10", "--images=72", "--devices=3", "--batch=16", "--rounds=2"]
    assert main([*command, "--without-compiled", "--device=cpu", f"--json={path}"]) == 0
    figures = json.loads(path.read_text())["figures"]
    names = ["reference", "stillhouse", "stillhouse, bfloat16"]
    assert [figure["name"] for figure in figures] == names
    for figure in figures:
        for what in ("train", "teach"):
            assert 0 < figure[what]["lowest"] <= figure[what]["median"] <= figure[what]["highest"]
        assert 0 < figure["of_peak"] < 10  # on a busy machine, the measured peak may be too low
        assert 0 < figure["of_memory"] < 10
    assert figures[0]["train"]["to_reference"] == 1
    assert "72 images of 3 devices as relu|q=4|zstd" in capsys.readouterr().out
