"""Federated Dropout with lossy compression: the figures of Caldas et al. 2018, and beyond.

    python -m benchmarks.federated_dropout --data mnist --settings claim --seeds 3 \
        --rounds 100 --jobs 2 --out results

100 devices have equal shares of the training set (IID), and 10 are drawn for each round. They train
one local epoch with batch 10 and the paper's learning rate. Accuracy is that of the global model on
the whole test set. Devices are simulated (`orchestrator.simulation`), but every payload is encoded
and decoded by the real codecs, and bytes are those of the payloads.

    down, up    float32 bytes of the whole model divided by the bytes sent; mean over devices and
                rounds
    compute     FLOPs of a local epoch of the whole model divided by those of the sub-model
    accuracy    after the last round; mean over the seeds, lowest and highest

A finished run is not done again, and a stopped one goes on; a folder is for one way to deal the
data out. Results are `DATA.json`, and pictures `DATA-GROUP.png` of accuracy over rounds. Runs with
fewer rounds than the longest are left out, and named.

Measured: see docs/federated-dropout.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from benchmarks import command, runs
from benchmarks.federated_dropout import report, settings

DEVICES = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; return 0, 2 if the input is bad or a run fails, or 3 if rounds are left."""
    parser = command.parser("federated_dropout", __doc__)
    runs.add_options(
        parser,
        data=tuple(settings.DATA),
        settings="claim",
        out="federated-dropout",
        rounds=100,
        devices=DEVICES,
        eval_every=5,
    )
    return runs.main(parser, arguments, _measure)


def _measure(options: argparse.Namespace) -> None:
    if options.one:
        _one(options, **json.loads(options.one))
        return
    chosen = settings.find(options.settings)
    for seed in range(options.seeds):
        runs.deal(
            runs.data_folder(options.out, options.data, seed),
            options.train or options.data,
            devices=options.devices,
            per_device=options.per_device,
            seed=seed,
            heldout=options.heldout,
        )
    runs.do(
        options,
        "benchmarks.federated_dropout",
        [setting.name for setting in chosen],
        lambda name, seed: runs.is_done(options.out, options.data, name, seed, options.rounds),
        lambda: report.write(options.out, options.data),
    )


def _one(options: argparse.Namespace, name: str, seed: int, seconds: float | None) -> None:
    setting = settings.find(name)[-1]
    config = settings.run_config(
        setting,
        data=options.data,
        seed=seed,
        rounds=options.rounds,
        eval_every=options.eval_every,
        folder=options.out,
    )
    shards = runs.data_folder(options.out, options.data, seed)
    runs.simulate(options, config, shards, seconds)
    report.keep(config, setting, options.out)


if __name__ == "__main__":
    sys.exit(main())
