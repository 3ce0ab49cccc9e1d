"""What all commands share: the terminal that they print on, and options of the same meaning."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")]
ConfigFile = Annotated[Path, typer.Option("--config", help="run.toml")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Another value in the file, such as device.lr=0.05; may be repeated.",
    ),
]
# Texts are printed as they are: paths are not wrapped, and names hold no markup.
console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
