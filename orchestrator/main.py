"""The command `orchestrator`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands import demo, fleet, networks, runs, setup
from wire import __version__, records, stopping, storage
from wire.errors import StillhouseError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"orchestrator {__version__}")
        raise typer.Exit


@app.callback()
def orchestrator(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """The server of a fleet: runs its rounds, and keeps what it has learnt."""
    del version


for _command in (
    setup.init,
    runs.start,
    runs.simulate,
    runs.rollback,
    setup.enroll,
    setup.revoke,
    setup.renew,
    runs.status,
    fleet.devices,
    fleet.measure_report,
    networks.export,
    networks.predict,
):
    app.command()(_command)
# `tools.export` parses the options of `compile` and prints its help.
app.command(
    "compile",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)(networks.compile_step)
app.command()(demo.demo)


def main() -> None:
    """Run the command line; the exit code is 0, or 2 with one line on what is wrong.

    If a signal ends the command, the exit code is 128 + the signal's number.
    """
    stopping.listen()
    sys.exit(stopping.run(_main))


def _main() -> int:
    try:
        with storage.at(Path()):
            app(records.expanded(sys.argv[1:]))
    except StillhouseError as fault:
        print(f"orchestrator: {fault}", file=sys.stderr)
        return 2
    except OSError as fault:
        if fault.filename is None:
            raise
        print(f"orchestrator: {fault.filename}: {fault.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    main()
