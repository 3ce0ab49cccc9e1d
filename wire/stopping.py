"""Ctrl-C and SIGTERM: the first ends a program in good order, the second ends it at once.

A separate thread hears signals, so that the program answers even while its main thread is busy
computing. The first signal does this:

    while a program is imported, or ends   the program ends at once
    within `instead`                       a function is called, and the program ends when it can
    otherwise                              `Interrupted` is raised in the main thread

Nothing is installed in a process that was not started as one of our programs (`wire.early`).
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, NoReturn

if TYPE_CHECKING:
    import subprocess

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ANSWER_S = 5.0  # longest time that the program's end waits for the answer to be printed
_SHOW_CURSOR = b"\x1b[?25h"  # a live view hides it

asked = threading.Event()  # a first signal came
_answered = threading.Event()
_children: set["subprocess.Popen[bytes]"] = set()
_instead: list["_Instead"] = []
_interrupted: "Interrupted | None" = None  # what `_handle` has raised
_raises = False
_listening = False


class Interrupted(BaseException):
    """The first signal came; the exit code is 128 plus its number."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.code = 128 + number


class _Instead(NamedTuple):
    say: Callable[[], str]
    stop: Callable[[], None] | None


def listen() -> None:
    """Hear both signals from here on; until `run` is called, each ends the process at once."""
    global _listening  # noqa: PLW0603
    if _listening or threading.current_thread() is not threading.main_thread():
        return
    _listening = True
    far, near = os.pipe()
    os.set_blocking(near, False)
    signal.set_wakeup_fd(near, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(far,), name="signals", daemon=True).start()
    sys.unraisablehook = _unraisable
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(number, _handle)


def run(work: Callable[[], int | None]) -> int:
    """Do the work of a program's `main`, and return the exit code, also after a signal.

    If nobody reads what the program prints any more (`| head`), it ends silently.
    """
    global _raises  # noqa: PLW0603
    _raises = True
    try:
        code = work() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        if not _unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # takes what is still in the buffer
        return 128 + signal.SIGPIPE
    except (Interrupted, ImportError) as fault:
        # A module written in C may put an ImportError in the place of `Interrupted`.
        stop = fault if isinstance(fault, Interrupted) else _interrupted
        if stop is None:
            raise
        _answered.wait(ANSWER_S)
        _leave(stop.code)  # threads at work are not waited for
    else:
        return code
    finally:
        _raises = False


@contextmanager
def instead(say: Callable[[], str], stop: Callable[[], None] | None = None) -> Iterator[None]:
    """Within the block, change what the first signal prints and does.

    Args:
        say: returns the text to print: what is kept, and how to go on. Called in another thread.
        stop: called in the main thread instead of raising `Interrupted`, in the middle of whatever
            it does. None: `Interrupted` is raised.

    Raises:
        Interrupted: a first signal came earlier, but the work went on: a library swallowed the
            exception, or another block ended because its work was done.
    """
    if asked.is_set():
        raise Interrupted
    _instead.append(_Instead(say, stop))
    try:
        yield
    finally:
        if asked.is_set():
            _answered.wait(ANSWER_S)  # the answer is still this block's
        _instead.pop()


def at_once() -> None:
    """From here on the first signal, too, ends the process at once."""
    global _raises  # noqa: PLW0603
    _raises = False


@contextmanager
def ends_with_us(child: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Within the block, kill the child process if this process is ended at once."""
    _children.add(child)
    try:
        yield
    finally:
        _children.discard(child)


def command() -> str:
    """The command line that started this process, in a form that can be typed again."""
    import shlex

    program, command = sys.argv[0].rpartition("/")[2], sys.orig_argv
    if program in ("main.py", "__main__.py") and "-m" in command[:-1]:
        return shlex.join(["python", *command[command.index("-m") :]])
    return shlex.join([program, *sys.argv[1:]])


def _unread() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    pipe = select.poll()
    pipe.register(1, 0)
    return any(event & select.POLLERR for _, event in pipe.poll(0))


def _handle(number: int, _frame: object) -> None:
    """Handle a signal in the main thread."""
    global _interrupted  # noqa: PLW0603
    if asked.is_set():
        return  # `_hear` ends the process
    if not _raises:
        _leave(128 + number)  # not left to `_hear`: once it looks, `_raises` may be set
    asked.set()
    if _instead and _instead[-1].stop:
        _instead[-1].stop()
        return
    _interrupted = Interrupted(number)
    raise _interrupted


def _unraisable(ignored: "sys.UnraisableHookArgs") -> None:
    """End the process where Python would ignore `Interrupted`: in a weak reference's callback."""
    if isinstance(ignored.exc_value, Interrupted):
        _answered.wait(ANSWER_S)
        _leave(ignored.exc_value.code)
    sys.__unraisablehook__(ignored)


def _hear(signals: int) -> None:
    """Answer each signal; the body of the listening thread."""
    heard = 0
    while number := os.read(signals, 1)[0]:
        if number not in SIGNALS:
            continue
        heard += 1
        if heard > 1 or not _raises:
            _leave(128 + number)
        say = _instead[-1].say if _instead else lambda: "stopping"
        with suppress(Exception):  # a failing answer must not keep us from hearing the next signal
            print(f"{say()} (Ctrl-C again ends at once)", file=sys.stderr, flush=True)
        _answered.set()


def _leave(code: int) -> NoReturn:
    for child in tuple(_children):
        child.kill()
    with suppress(Exception):
        sys.stdout.flush()
    with suppress(OSError):
        if os.isatty(1):
            os.write(1, _SHOW_CURSOR)
    os._exit(code)
