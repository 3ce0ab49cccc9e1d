"""The command `demo`: a whole fleet on one machine."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from orchestrator import config
from orchestrator.commands.terminal import console
from orchestrator.display import view, words
from wire import records
from wire.names import anchored


def demo(
    *,
    data: Annotated[
        str, typer.Option(help="digits, cifar10, cifar100, mnist, ..., or a path.")
    ] = "digits",
    heldout: Annotated[
        Path | None, typer.Option(help="The held-out file of a --data path.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Resize the images, such as 32x32.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Agents, each a process.")] = 4,
    samples: Annotated[
        int | None, typer.Option(help="Images on each device; default: all.")
    ] = None,
    heldout_samples: Annotated[
        int | None, typer.Option(help="Held-out images; default: all.")
    ] = None,
    split: Annotated[str, typer.Option(help="iid or dirichlet.")] = "iid",
    alpha: Annotated[float, typer.Option(help="Alpha of the Dirichlet split.")] = 0.5,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the run.")] = 6,
    model: Annotated[
        str, typer.Option(help="The devices' network: ours, or your own, nets.py:make@features.3.")
    ] = "resnet8",
    server_model: Annotated[
        str, typer.Option(help="The server's network: ours, or your own, nets.py:large.")
    ] = "resnet10",
    server_epochs: Annotated[int, typer.Option(min=1, help="Epochs of the server in a round.")] = 4,
    server_alpha: Annotated[float, typer.Option(help="Weight of the devices' logits.")] = 0.1,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the devices in a round.")] = 4,
    batch: Annotated[int, typer.Option(help="Images in a step of the devices.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate of the devices.")] = 0.02,
    features: Annotated[str, typer.Option(help="Codec of feature maps.")] = "identity|q=8",
    augment: Annotated[bool, typer.Option(help="Random crops and flips.")] = False,
    broker: Annotated[str, typer.Option(help="embedded or mosquitto.")] = "embedded",
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    name: Annotated[str, typer.Option(help="Name of the run and of its folder.")] = "demo",
    seed: Annotated[int, typer.Option(help="Same seed, same split and weights.")] = 0,
    floor: Annotated[bool, typer.Option(help="Train the devices alone as well.")] = True,
) -> None:
    """Teach a large model on this machine: broker, orchestrator, and agents as processes."""
    from orchestrator import datasets
    from orchestrator import demo as demonstration

    name = demonstration.free_name(runs, name)
    settings = {
        "name": name,
        "fleet": name,
        "strategy": "fedgkt",
        "rounds": rounds,
        "runs": str(runs),
        "seed": seed,
        "broker": {"kind": broker, "port": 0},
        "cohort": {"min_devices": devices, "wait_s": 0.0, "deadline_s": 3600.0},
        "device": {
            "model": anchored(model, Path()),
            "epochs": epochs,
            "batch": batch,
            "lr": lr,
            "features": features,
            "augment": augment,
        },
        "server": {
            "model": anchored(server_model, Path()),
            "epochs": server_epochs,
            "alpha": server_alpha,
        },
        "transfer": {"extractor": "shared", "network": "shared"},
    }
    run = records.of_table(config.RunConfig, settings, "demo")
    floor_run = None
    if floor:
        settings |= {"name": name + demonstration.ALONE, "strategy": "local", "transfer": {}}
        floor_run = records.of_table(config.RunConfig, settings, "demo")
    deal = functools.partial(
        datasets.build,
        data,
        devices=devices,
        per_device=samples,
        split=split,  # type: ignore[arg-type]  # datasets.build checks it
        alpha=alpha,
        seed=seed,
        size=None if size is None else datasets.parse_size(size),
        heldout=heldout,
        heldout_samples=heldout_samples,
    )
    with view.Display(console) as show:
        taught, alone = demonstration.play(run, floor_run, deal, show)
    console.print(view.rounds(taught.entries))
    console.print()
    console.print(view.agents(taught.entries))
    last = taught.entries[-1]
    console.print(f"\nlarge model on held-out images   {words.percent(last['server_accuracy'])}")
    console.print(f"small model that devices share   {words.percent(last['device_accuracy'])}")
    if alone:
        best = words.percent(alone.entries[-1]["device_accuracy"])
        console.print(f"devices trained alone            {best}")
    console.print(f"\nreport: {run.folder / 'report.json'}")
