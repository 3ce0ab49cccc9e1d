"""The benchmark of the compiler's choices: a short real race, and what it refuses."""

import re

import pytest

from benchmarks import choices, race
from benchmarks.choices import CONTROL, GRAPHS, SESSIONS, WHOLE, main
from benchmarks.race import Course
from benchmarks.train_step import network


@pytest.mark.e2e
def test_a_short_run_compares_every_variant_with_the_whole_step(capsys):
    assert main(["--batch", "4", "--rounds", "1", "--seconds", "0.2"]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "resnet8, batch 4, 1 threads"
    names = [
        WHOLE,
        CONTROL,
        *(f"without {key}" for key in GRAPHS),
        *(f"with {key}" for key in SESSIONS),
    ]
    assert len(lines) == len(names)
    for name, line in zip(names, lines, strict=True):
        figures = r" +([\d.]+) +([\d.]+) +([\d.]+) - ([\d.]+) +(\d+) MB"
        found = re.fullmatch(re.escape(name) + figures, line)
        assert found, line
        rate, ratio, lowest, highest, memory = map(float, found.groups())
        assert rate > 0
        assert lowest == ratio == highest  # there is only one round
        assert memory > 20
        if name == WHOLE:
            assert ratio == 1


def test_without_the_whole_step_there_is_nothing_to_compare_with(monkeypatch, capsys):
    def failing(entries, **_):
        return [
            Course(entry, failed="OSError: no session" if entry.name == WHOLE else "")
            for entry in entries
        ]

    monkeypatch.setattr(race, "run", failing)
    monkeypatch.setattr(network, "export_step", lambda *_: None)
    assert choices.main(["--batch", "4"]) == 2
    out, err = capsys.readouterr()
    assert "the whole step fails, so nothing compares: OSError: no session" in err
    assert not out
