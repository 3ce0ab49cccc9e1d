"""Experiments with FedGKT: those of He et al. 2020 (arXiv 2007.14513), and later ones.

    python -m benchmarks.fedgkt --data cifar10 --settings transfer --preset cpu --seeds 3 --out gkt

Devices train ResNet-8 and send feature maps; the server trains the rest of a large network on them.
Devices are simulated (`orchestrator.simulation`), or with `--wire` each is an agent's process
(`over_wire.py`). Every payload is encoded and decoded by the codecs of the wire, and its real bytes
are counted. `settings.py` lists the runs. All are compared
with the run "two-way", which is always done too; settings of the group "full" with "best".

    --preset paper   16 devices with all images, 200 rounds, resnet55, 20 epochs of server training
                     a round (10 with --split dirichlet)
    --preset cpu     10 devices with 250 images each, 10 rounds, resnet10, 4 epochs in bfloat16, 3
                     epochs of the devices in batches of 16; 2,000 images to evaluate on

    --preset full    16 devices with all images, 30 rounds; with --settings full, for a CPU that
                     computes in bfloat16, and with --engine onnx

An option on the command line wins over the preset's. A finished run is not done again, and a
stopped run goes on. A folder takes one set of options; with `--schedule constant` rounds may be
added. With `--pieces 50` no round begins after 50 minutes, and the exit code is 3 while rounds are
left.

    DATA.json                       all records; a table of them is printed
    DATA-GROUP.png                  accuracy over rounds
    DATA-payload-bytes.png          accuracy over bytes a sample
    DATA-uplink-bytes.png,
    DATA-frugal-bytes.png           accuracy over all bytes sent

Runs with fewer rounds than the longest are left out of the table, and named below it.

Measured: see docs/fedgkt.md; `page.py` writes its tables.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import models
from benchmarks import command, runs
from benchmarks.fedgkt import over_wire, report, settings
from benchmarks.fedgkt.settings import Plan, Setting
from wire.errors import SettingsError
from wire.names import anchored


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; returns 0, 2 if the input is bad or a run fails, or 3 if rounds are left."""
    parser = command.parser("fedgkt", __doc__)
    runs.add_options(
        parser,
        data=tuple(settings.DATA),
        settings="transfer",
        out="fedgkt",
        rounds=None,
        devices=None,
        eval_every=None,
    )
    parser.add_argument("--preset", choices=settings.PRESETS, default="paper")
    parser.add_argument("--split", choices=("iid", "dirichlet"), default="iid")
    parser.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet distribution")
    parser.add_argument("--heldout-limit", type=command.count, help="images to evaluate on")
    parser.add_argument(
        "--server-model",
        help="a known network, or your own, nets.py:large; "
        f"settings of a whole network want one of {', '.join(settings.WHOLE)}",
    )
    parser.add_argument("--server-epochs", type=command.count)
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), help="of server training"
    )
    parser.add_argument("--epochs", type=command.count, help="of devices' training")
    parser.add_argument("--batch", type=command.count, help="of devices' training")
    parser.add_argument("--lr", type=float, help="of devices' training")
    parser.add_argument("--schedule", choices=("constant", "cosine"), help="of learning rates")
    parser.add_argument("--wire", action="store_true",
                        help="agents and Mosquitto instead of simulated devices")  # fmt: skip
    return runs.main(parser, arguments, _measure)


def _measure(options: argparse.Namespace) -> None:
    plan = _plan(options)
    if options.one:
        _one(options, plan, **json.loads(options.one))
        return
    chosen = settings.find(options.settings, plan.devices)
    if options.wire and (late := [setting.name for setting in chosen if setting.late]):
        raise SettingsError(f"--wire: devices are late in {', '.join(late)}, which is simulated")
    models.input_shape(anchored(plan.server_model, Path()))  # there is such a network
    for setting in chosen:
        settings.device_model(setting, plan)
    report.check(plan, options.out)
    for seed in range(options.seeds):
        for setting in chosen:
            deal(options, plan, setting, seed)
    report.claim(plan, options.out)
    runs.do(
        options,
        "benchmarks.fedgkt",
        [setting.name for setting in chosen],
        lambda name, seed: runs.is_done(options.out, plan.data, name, seed, options.rounds),
        lambda: report.write(options.out, plan),
        first={setting.name: setting.start for setting in chosen}.__getitem__,
    )


def _plan(options: argparse.Namespace) -> Plan:
    """What all runs have in common. Writes the preset's values into `options` where it has none.

    Raises:
        SettingsError: the data set cannot be downloaded, and no file was named.
    """
    for key, value in settings.presets(options.split)[options.preset].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if options.data == "cinic10" and not options.train:
        raise SettingsError("cinic10 cannot be downloaded here; give --train and --heldout")
    return Plan(
        data=options.data,
        source=Path(options.train).name or options.data,
        split=options.split,
        alpha=options.alpha if options.split == "dirichlet" else None,
        devices=options.devices,
        per_device=options.per_device,
        heldout_limit=options.heldout_limit,
        server_model=options.server_model,
        server_epochs=options.server_epochs,
        precision=options.precision,
        epochs=options.epochs,
        batch=options.batch,
        lr=options.lr,
        schedule=options.schedule,
        rounds=options.rounds if options.schedule == "cosine" else None,
        eval_every=options.eval_every,
        engine="agents" if options.wire else options.engine,
    )


def deal(options: argparse.Namespace, plan: Plan, setting: Setting, seed: int) -> None:
    """Write the shards of a seed; another number of devices gets the same images, dealt anew."""
    base = settings.data_folder(settings.BASE, plan, seed, options.out)
    own = settings.data_folder(setting, plan, seed, options.out)
    shared: dict[str, Any] = {"split": plan.split, "alpha": options.alpha, "seed": seed}
    if own == base:
        runs.deal(
            base,
            options.train or plan.data,
            devices=plan.devices,
            per_device=plan.per_device,
            heldout=options.heldout,
            heldout_samples=plan.heldout_limit,
            **shared,
        )
        return
    pool = base / "pool.npz"
    if not pool.exists():
        shards = [np.load(base / f"device-{number}.npz") for number in range(plan.devices)]
        x, y = (np.concatenate([shard[key] for shard in shards]) for key in ("x", "y"))
        np.savez(pool, x=x, y=y, classes=shards[0]["classes"])
    # With images a device the Dirichlet distribution is another one than with shares of classes.
    equal = None
    if plan.split == "dirichlet" and plan.per_device:
        equal = plan.per_device * plan.devices // setting.devices
    runs.deal(
        own,
        str(pool),
        devices=setting.devices,
        per_device=equal,
        heldout=base / "heldout.npz",
        **shared,
    )


def _one(
    options: argparse.Namespace, plan: Plan, name: str, seed: int, seconds: float | None
) -> None:
    setting = settings.find(name, plan.devices)[-1]
    config = settings.run_config(
        setting, plan, seed=seed, rounds=options.rounds, folder=options.out
    )
    shards = settings.data_folder(setting, plan, seed, options.out)
    if options.wire:
        over_wire.run(config, shards, runs.watch(config, seconds))
    else:
        more = {"late": setting.late} if setting.late else {}
        runs.simulate(options, config, shards, seconds, **more)
    report.keep(config, setting, plan)


if __name__ == "__main__":
    sys.exit(main())
