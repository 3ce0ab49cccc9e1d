"""Ctrl-C in a program's first moments, while Python still imports what the program needs.

Until `wire.stopping` listens, Ctrl-C is left to the system, which ends the process without a
traceback. Python itself needs a moment before it imports us; Ctrl-C then is Python's to answer.
"""

import _signal  # type: ignore[import-not-found]  # `signal` takes milliseconds to import
import sys


def listen(package: str, script: str = "") -> None:
    """Listen from here on if this process was started as a program of a package.

    Call this first in the package's __init__.py.

    Args:
        package: as in `python -m PACKAGE...`.
        script: the name of its command, if it has one.
    """
    command = sys.orig_argv
    module = command[command.index("-m") + 1] if "-m" in command[:-1] else ""
    ours = module.split(".")[0] == package
    if not ours and not (script and sys.argv[0].rpartition("/")[2] == script):
        return
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # not under nohup
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from wire import stopping

    stopping.listen()
