"""The process between the orchestrator and its broker.

    python -m orchestrator.broker FOLDER mosquitto PROGRAM
    python -m orchestrator.broker FOLDER embedded HOST PORT FLEET [PASSWORD FILE, or ""]

It runs the broker until its stdin closes, its parent dies, or SIGTERM or SIGINT comes. It writes
the broker's process id to FOLDER/broker.pid. `orchestrator.broker.start` runs it, not a person.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from asyncio.subprocess import Process
from pathlib import Path

from orchestrator.broker.watch import replaced

_SETTLED_S = 1.0  # a Mosquitto that lived this long is started again when it dies
_STOP_S = 8.0
_PR_SET_PDEATHSIG = 1


async def _orphaned() -> None:
    """Return once the process that started us has closed our stdin or died.

    A process forked from it (such as a data loader) may hold the pipe open after its death, so the
    parent's process id is checked too.
    """
    stdin = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    parent = os.getppid()
    while os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await stdin.read()
                return


async def _mosquitto(binary: str, folder: Path) -> None:
    """Run Mosquitto and restart it when it ends; return if it lived less than `_SETTLED_S`."""
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        process = await asyncio.create_subprocess_exec(
            binary,
            "-c",
            str(folder / "mosquitto.conf"),
            stdin=asyncio.subprocess.DEVNULL,
            preexec_fn=_die_with_parent,  # this process has one thread
        )
        _note(folder, process.pid)
        revoked = asyncio.Event()
        watching = [
            asyncio.create_task(_tell_of_users(process, folder)),
            asyncio.create_task(_renewed(process, folder, revoked)),
        ]
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            process.terminate()  # it saves its state
            try:
                await asyncio.wait_for(process.wait(), _STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()
            raise
        finally:
            for task in watching:
                task.cancel()
        if revoked.is_set():
            continue
        print(f"mosquitto ended with code {code}", file=sys.stderr, flush=True)
        if loop.time() - began < _SETTLED_S:
            return


async def _tell_of_users(process: Process, folder: Path) -> None:
    """Tell Mosquitto to read passwords and its certificate again each time they are replaced."""
    async for _ in replaced(folder / "passwd", folder / "server.pem"):
        with contextlib.suppress(ProcessLookupError):  # it has ended; its successor reads the file
            process.send_signal(signal.SIGHUP)


async def _renewed(process: Process, folder: Path, revoked: asyncio.Event) -> None:
    """End Mosquitto when certificates were revoked, and say so: it checks new connections only."""
    async for _ in replaced(folder / "crl.pem"):
        revoked.set()
        with contextlib.suppress(ProcessLookupError):
            process.terminate()  # it saves its state


def _die_with_parent() -> None:
    """Ask Linux to end Mosquitto cleanly if this process is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _note(folder: Path, pid: int) -> None:
    new = folder / "broker.pid.new"
    new.write_text(str(pid), "ascii")
    new.replace(folder / "broker.pid")


async def _run(folder: Path, kind: str, *arguments: str) -> int:
    if kind == "mosquitto":
        (binary,) = arguments
        serve = asyncio.create_task(_mosquitto(binary, folder))
    else:
        from orchestrator.broker import embedded

        _note(folder, os.getpid())
        host, port, fleet, users = arguments
        passwords = Path(users) if users else None
        serve = asyncio.create_task(embedded.serve(host, int(port), fleet, passwords))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    ends = {serve, asyncio.create_task(_orphaned()), asyncio.create_task(stop.wait())}
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if serve.done():
        serve.result()
        return 1
    for task in ends:
        task.cancel()
    await asyncio.gather(*ends, return_exceptions=True)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_run(Path(sys.argv[1]), *sys.argv[2:])))
