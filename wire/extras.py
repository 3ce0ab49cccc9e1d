"""What the base install lacks: the orchestrator and the exporter come with an extra."""

import sys
from collections.abc import Sequence
from importlib import util
from pathlib import Path

MODULES = ("amqtt", "matplotlib", "onnx", "onnxscript", "rich", "sklearn", "torch", "torchvision",
           "typer")  # fmt: skip
COMMANDS = ("-m", "orchestrator")  # sys.argv[0] while a package of a command is imported


def check(package: str, modules: Sequence[str] = MODULES) -> None:
    """Return if what a package needs of the extra `orchestrator` is installed.

    A command ends with one line on standard error and exit code 2. A program that imports the
    package may do with less (a simulation needs no broker), but for torch.

    Args:
        package: that needs it.
        modules: what it needs; all that the extra brings, if nothing is named.

    Raises:
        ModuleNotFoundError: torch is missing, and no command is run.
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
