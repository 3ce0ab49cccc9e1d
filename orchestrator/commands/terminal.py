"""What all commands share: the terminal that they print on, and common options."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")]
ConfigFile = Annotated[Path, typer.Option("--config", help="run.toml")]


def _set(example: str) -> Any:
    about = f"Another value in the file, such as {example}; may be repeated."
    return typer.Option("--set", metavar="KEY=VALUE", help=about)


RunChanges = Annotated[list[str] | None, _set("device.lr=0.05")]
AgentChanges = Annotated[list[str] | None, _set("threads=2")]
# Texts are printed unchanged: no wrapping of paths, no markup or emoji in names.
console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
