"""Every benchmark's command line ends with exit code 2 and a reason if its input is bad."""

import importlib

import pytest

BAD = {
    "benchmarks.choices": [
        (["--rounds=0"], "--rounds: expected a whole number from 1 on, got '0'"),
        (["--batch=-4"], "--batch: expected a whole number from 1 on, got '-4'"),
        (["--threads=1.5"], "--threads: expected a whole number from 1 on, got '1.5'"),
        (["--seconds=0"], "--seconds: expected over 0 to 600, got '0'"),
        (["--seconds=nan"], "--seconds: expected over 0 to 600, got 'nan'"),
        (["--model=resnet9"], "did you mean 'resnet"),
    ],
    "benchmarks.codec.__main__": [
        (["--rounds=0"], "--rounds: expected a whole number from 1 on, got '0'"),
        (["--values=many"], "--values: expected a whole number from 1 on, got 'many'"),
        (["--seconds=0"], "--seconds: expected over 0 to 600, got '0'"),
        (["--data=digitz"], "source 'digitz': expected one of digits"),
        (["--json=/nowhere/at/all.json"], "/nowhere/at is no folder"),
    ],
    "benchmarks.round_overhead.__main__": [
        (["--devices", "0"], "expected a whole number from 1 on, got '0'"),
        (["--without", "fedml"], "invalid choice: 'fedml'"),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at is no folder"),
    ],
    "benchmarks.train_step.__main__": [
        (["--model", "resnet9"], "did you mean 'resnet"),
        (["--threads", "1,0"], "expected a whole number from 1 on, got '0'"),
        (["--rounds", "none"], "expected a whole number from 1 on, got 'none'"),
        (["--without", "tensorflow"], "invalid choice: 'tensorflow'"),
        (["--seconds", "0"], "--seconds: expected over 0 to 600, got '0'"),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at is no folder"),
    ],
    "benchmarks.distill": [
        (["--images=0"], "--images: expected a whole number from 1 on, got '0'"),
        (["--features=huffman"], "unknown codec 'huffman'; did you mean"),
        (["--model=resnet9"], "no model is named 'resnet9'; did you mean 'resnet"),
    ],
    "benchmarks.federated_dropout.__main__": [
        (["--rounds=0"], "--rounds: expected a whole number from 1 on, got '0'"),
        (["--data=imagenet"], "invalid choice: 'imagenet'"),
        (["--settings=papre"], "no setting is named 'papre'; known are: baseline; down;"),
    ],
}
CASES = [(module, *case) for module, cases in BAD.items() for case in cases]


@pytest.mark.parametrize(("module", "arguments", "reason"), CASES)
def test_a_bad_argument_ends_with_two_and_a_reason(module, arguments, reason, capsys):
    try:
        code = importlib.import_module(module).main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert reason in capsys.readouterr().err
