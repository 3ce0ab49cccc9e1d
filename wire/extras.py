"""Checks that the extra `orchestrator` is installed, which the server and the exporter need."""

import sys
from collections.abc import Sequence
from importlib import util
from pathlib import Path

MODULES = ("amqtt", "matplotlib", "onnx", "onnxscript", "rich", "sklearn", "torch", "torchvision",
           "typer")  # fmt: skip
COMMANDS = ("-m", "orchestrator")  # sys.argv[0] while a package of a command is imported


def check(package: str, modules: Sequence[str] = MODULES) -> None:
    """Return if the modules that a package needs are installed.

    If some are missing, a command ends with one line on standard error and exit code 2. A program
    that imports the package may need fewer (a simulation needs no broker); only torch is required.

    Args:
        package: needs the modules.
        modules: by default, all that the extra brings.

    Raises:
        ModuleNotFoundError: torch is missing, and the process is not one of our commands.
    """
    missing = [name for name in modules if util.find_spec(name) is None]
    if not missing:
        return
    text = (
        f"{package}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed "
        "here, where the agent alone is; install the server's part: "
        "pip install 'stillhouse[orchestrator]', in a checkout pip install '.[orchestrator]'"
    )
    if Path(sys.argv[0]).name in COMMANDS:
        print(text, file=sys.stderr)
        sys.exit(2)
    if "torch" in missing:
        raise ModuleNotFoundError(text, name="torch")
