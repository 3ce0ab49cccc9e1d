"""Commands on a fleet's devices: `devices`, `measure-report`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from orchestrator import config
from orchestrator.commands.terminal import AsJson, ConfigFile, console


def devices(
    config_file: ConfigFile,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the fleet's devices, and what training costs on each; times are UTC."""
    from orchestrator.display import devices as display
    from orchestrator.fleet import devices

    chosen = config.load(config_file)
    found = devices.known(chosen.runs, chosen.fleet)
    if markdown:
        print(display.markdown(found), end="")
    elif as_json:
        print(json.dumps(display.plain(found)))
    else:
        console.print(display.table(found, console.width))


def measure_report(
    config_file: ConfigFile,
    out: Annotated[Path | None, typer.Option(help="Folder; default: beside the reports.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write what training costs on the fleet's devices: Markdown and pictures."""
    from orchestrator.display import devices as display
    from orchestrator.fleet import devices

    chosen = config.load(config_file)
    found = devices.known(chosen.runs, chosen.fleet)
    folder = out or chosen.runs / f"measured-{chosen.fleet}" / "report"
    title = f"Devices of fleet {chosen.fleet}"
    paths = display.write_report(found, title, folder)
    if as_json:
        print(json.dumps({"files": [str(path) for path in paths]}))
        return
    for path in paths:
        console.print(f"{path} written")
