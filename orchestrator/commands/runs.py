"""Commands on a run: `start`, `simulate`, `status`."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator import config
from orchestrator.commands.terminal import AsJson, ConfigFile, console
from orchestrator.display import view
from orchestrator.simulation import EngineName
from wire import stopping
from wire.errors import SettingsError, StillhouseError


def start(config_file: ConfigFile) -> None:
    """Do a run, or go on with one that was stopped."""
    from orchestrator import strategies
    from orchestrator.launch import start
    from orchestrator.training import ranks

    chosen = config.load(config_file, strategies.check)
    with ranks.joined(chosen.server) as group:
        if group and group.rank:
            stopping.at_once()
            group.serve()
            return
        with view.Display(console) as show:
            report = start.run(chosen, changed=show)
    console.print(view.rounds(report.entries))
    console.print()
    console.print(view.agents(report.entries))
    console.print(f"report: {chosen.folder / 'report.json'}")


def simulate(
    config_file: ConfigFile,
    *,
    shards: Annotated[Path, typer.Option(help="Folder of device-*.npz, one a device.")],
    engine: Annotated[
        EngineName, typer.Option(help="What trains; onnx is faster on a CPU, once it has compiled.")
    ] = "torch",
    stack: Annotated[
        int, typer.Option(help="Devices trained at once; 0: one on a CPU, all on a GPU.", min=0)
    ] = 0,
    threads: Annotated[
        int, typer.Option(help="Threads; 0: all cores. Onnx trains a device on each.", min=0)
    ] = 0,
    late: Annotated[float, typer.Option(help="Share of devices that miss a round's end.")] = 0.0,
    name: Annotated[str, typer.Option(help="Another name for the run than run.toml's.")] = "",
) -> None:
    """Do a run with its devices simulated in this process."""
    from orchestrator import strategies
    from orchestrator.simulation import simulate as simulation
    from orchestrator.training import ranks

    chosen = config.load(config_file, strategies.check)
    if name:
        try:
            chosen = replace(chosen, name=name)
        except ValueError as fault:
            raise SettingsError(f"--name: {fault}") from fault
    if threads:
        simulation.hold_threads(threads)
    with ranks.joined(chosen.server) as group:
        if group and group.rank:
            stopping.at_once()
            group.serve()
            return
        with view.Display(console, simulated=True) as show:
            report = simulation.run(
                chosen, shards, engine=engine, stack=stack, late=late, told=show
            )
    console.print(view.rounds(report.entries))
    console.print(f"report: {chosen.folder / 'report.json'}")


def rollback(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    round_: Annotated[int, typer.Option("--round", help="The last round to keep.", min=1)],
) -> None:
    """Undo the last rounds of a run, so that its next start goes on after an earlier one."""
    from orchestrator.run_folder.store import roll_back

    roll_back(run, round_)
    console.print(
        f"{run}: back to round {round_}; later checkpoints are set aside as "
        f"{run / 'checkpoints'}/*.undone-*. The same command as ever goes on."
    )


def status(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    as_json: AsJson = False,
) -> None:
    """Show how far a run is."""
    path = run / "status.json"
    try:
        snapshot: dict[str, Any] = json.loads(path.read_text())
        since = time.time() - snapshot["updated"]
    except (FileNotFoundError, NotADirectoryError) as fault:
        raise StillhouseError(f"{run} holds no run; look for it under the `runs` folder") from fault
    except (ValueError, KeyError, TypeError) as fault:
        raise StillhouseError(
            f"{path} is damaged ({fault}); remove it, a run that goes on writes it anew"
        ) from fault
    if as_json:
        print(json.dumps(snapshot))
        return
    console.print(view.live(snapshot, console.width))
    console.print(f"as of {since:.0f} s ago", style="dim")
