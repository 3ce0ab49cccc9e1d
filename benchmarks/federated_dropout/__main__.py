"""Federated Dropout with lossy compression, the figures of Caldas et al. 2018 and after.

    python -m benchmarks.federated_dropout --data mnist --settings claim --seeds 3 \
        --rounds 100 --jobs 2 --out results

100 devices with equal shares of the training set (IID), 10 drawn for each round, one local epoch
with batch 10 and the paper's learning rate; accuracy of the global model on the whole test set.
Devices are simulated (`orchestrator.simulate`): every payload is encoded and decoded by the codecs
of the wire, and bytes are those of the payloads.

    down, up    float32 bytes of the whole model over the bytes sent, mean over devices and rounds
    compute     FLOPs of a local epoch of the whole model over those of the sub-model
    accuracy    after the last round; mean over the seeds, lowest and highest

A run that is there already is not done again, and one that was stopped goes on; a folder is for one
way to deal the data out. Results come as `DATA.json`, and pictures `DATA-GROUP.png` of accuracy
over rounds; runs of fewer rounds than the longest are left out, and said to be.

Measured: see docs/federated-dropout.md.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.federated_dropout import report, settings
from benchmarks.federated_dropout.settings import Setting
from benchmarks.race import ContenderError
from wire.errors import SettingsError

DEVICES = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 0, or 2 where the input is bad or a run fails."""
    parser = command.parser("federated_dropout", __doc__)
    parser.add_argument("--data", choices=tuple(settings.DATA), default="mnist")
    parser.add_argument("--train", default="", help=".npz of the training set; default: download")
    parser.add_argument("--heldout", type=Path, help=".npz of the test set, with --train")
    parser.add_argument("--settings", default="claim", help="groups or names, by ;")
    parser.add_argument("--rounds", type=command.count, default=100)
    parser.add_argument("--seeds", type=command.count, default=3)
    parser.add_argument("--devices", type=command.count, default=DEVICES)
    parser.add_argument("--per-device", type=command.count, help="samples; default: all")
    parser.add_argument("--eval-every", type=command.count, default=5)
    parser.add_argument("--jobs", type=command.count, default=1, help="runs at once")
    parser.add_argument("--threads", type=command.count, default=1, help="of each run")
    parser.add_argument("--out", type=Path, default=Path("federated-dropout"))
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    return command.run(parser, arguments, _measure)


def _measure(options: argparse.Namespace) -> None:
    if options.one:
        _one(options, json.loads(options.one))
        return
    chosen = settings.find(options.settings)
    for seed in range(options.seeds):
        _deal(options, seed)
    jobs = [(setting, seed) for seed in range(options.seeds) for setting in chosen]
    with ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(lambda job: _spawn(options, *job), jobs))
    report.write(options.out, options.data)
    if failed := sum(map(bool, codes)):
        raise ContenderError(f"{failed} of {len(jobs)} runs failed; start again to go on with them")


def _spawn(options: argparse.Namespace, setting: Setting, seed: int) -> int:
    """One run in a process of its own, so that torch's threads are its own."""
    if report.is_done(options.out, options.data, setting, seed, options.rounds):
        return 0
    one = json.dumps({"setting": setting.name, "seed": seed})
    plain = ["--data", options.data, "--rounds", str(options.rounds), "--out", str(options.out),
             "--devices", str(options.devices), "--eval-every", str(options.eval_every),
             "--threads", str(options.threads), "--train", options.train]  # fmt: skip
    if options.heldout:
        plain += ["--heldout", str(options.heldout)]
    if options.per_device:
        plain += ["--per-device", str(options.per_device)]
    print(f"{options.data}, seed {seed}: {setting.name}", flush=True)
    module = "benchmarks.federated_dropout"
    line = [sys.executable, "-m", module, *plain, "--one", one]
    return subprocess.run(line, check=False).returncode


def _deal(options: argparse.Namespace, seed: int) -> None:
    """The shards of a seed, unless they are there."""
    from orchestrator import datasets

    folder = settings.data_folder(options.out, options.data, seed)
    if not (folder / "split.json").exists():
        datasets.build(
            options.train or options.data,
            folder,
            devices=options.devices,
            per_device=options.per_device,
            seed=seed,
            heldout=options.heldout,
        )
        return
    dealt = json.loads((folder / "split.json").read_text())
    first = dealt["devices"][0]["samples"]
    for what, there, wanted in (
        ("devices", len(dealt["devices"]), options.devices),
        ("samples a device", first, options.per_device or first),
        ("as its source", dealt["source"], Path(options.train).name or options.data),
    ):
        if there != wanted:
            raise SettingsError(
                f"{folder} was dealt out with {there} {what}, now it is {wanted}; write to another "
                "--out"
            )


def _one(options: argparse.Namespace, job: dict[str, Any]) -> None:
    from orchestrator import simulate

    simulate.hold_threads(options.threads)
    setting = settings.find(job["setting"])[-1]
    config = settings.run_config(
        setting,
        data=options.data,
        seed=job["seed"],
        rounds=options.rounds,
        eval_every=options.eval_every,
        folder=options.out,
    )
    simulate.run(config, config.heldout.parent)
    report.keep(config, setting, options.out)


if __name__ == "__main__":
    sys.exit(main())
