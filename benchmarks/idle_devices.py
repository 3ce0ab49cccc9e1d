"""Many devices that are connected and idle: what they cost our broker, and how they come back.

    python -m benchmarks.idle_devices --devices 10000 --json idle.json

Mosquitto, as `orchestrator start` runs it, speaks mutual TLS. The devices are bare MQTT clients in
two processes: each connects with a session that is kept, subscribes as an agent does, and sends a
ping every `KEEPALIVE_S` / 2. All of a process show one certificate, so the broker checks as many as
in a fleet. When all are there, the broker is killed (`kill -9`); it is started again by its
supervisor, and devices come back after the agent's back-off.

Each device takes a file descriptor at both ends: `ulimit -n` must be above the number of devices.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import random
import resource
import ssl
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import command
from orchestrator import broker
from orchestrator.broker import Broker
from orchestrator.fleet import certificates, enrolment
from orchestrator.fleet.authority import Authority
from wire import topics
from wire.errors import SettingsError
from wire.link import BACKOFF_BASE_S, BACKOFF_CAP_S, KEEPALIVE_S

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

PROCESSES = 2
AT_ONCE = 64  # connections that a process makes at the same time
LIMIT_S = 540.0
FLEET = "barn"
_CONNACK, _SUBACK = 0x20, 0x90


def _text(text: str) -> bytes:
    return struct.pack(">H", len(text)) + text.encode()


def _packet(kind: int, content: bytes) -> bytes:
    """An MQTT 3.1.1 packet of less than 16,384 bytes."""
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return bytes([kind]) + length + content


async def _answer(reader: asyncio.StreamReader, kind: int) -> None:
    """Read one packet with a body of less than 128 bytes.

    Raises:
        ConnectionError: it is of another kind.
    """
    got, size = await reader.readexactly(2)
    await reader.readexactly(size)
    if got != kind:
        raise ConnectionError(f"expected packet {kind:#x}, got {got:#x}")


class Clients:
    """Some of the devices; `there` counts those that are connected and subscribed."""

    def __init__(self, port: int, context: ssl.SSLContext, there: "Synchronized[int]") -> None:
        self._port, self._context, self._there = port, context, there
        self._making = asyncio.Semaphore(AT_ONCE)

    async def stay(self, name: str) -> None:
        """Keep one device connected."""
        attempt = 0
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                async with self._making:
                    reader, writer = await self._join(name)
                attempt = 0
                with self._there.get_lock():
                    self._there.value += 1
                try:
                    await self._idle(reader, writer)
                finally:
                    writer.close()
                    with self._there.get_lock():
                        self._there.value -= 1
            ceiling = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** min(attempt, 10))
            attempt += 1
            await asyncio.sleep(random.uniform(0, ceiling))

    async def _join(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self._port, ssl=self._context, ssl_handshake_timeout=60
        )
        try:
            connect = _text("MQTT") + bytes([4, 0]) + struct.pack(">H", KEEPALIVE_S) + _text(name)
            writer.write(_packet(0x10, connect))
            await _answer(reader, _CONNACK)
            places = (("device", "order", 1), ("device", "down", 0), (topics.ALL, "hello", 1))
            filters = (_text(topics.topic(FLEET, d, c)) + bytes([qos]) for d, c, qos in places)
            writer.write(_packet(0x82, b"\0\1" + b"".join(filters)))
            await _answer(reader, _SUBACK)
        except BaseException:
            writer.close()
            raise
        return reader, writer

    async def _idle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                async with asyncio.timeout(KEEPALIVE_S / 2):
                    if not await reader.read(4096):
                        return
            except TimeoutError:
                writer.write(_packet(0xC0, b""))


def _work(port: int, folder: Path, names: Sequence[str], there: "Synchronized[int]") -> None:
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    context.load_cert_chain(folder / "device.pem")

    async def stay() -> None:
        clients = Clients(port, context, there)
        await asyncio.gather(*map(clients.stay, names))

    asyncio.run(stay())


def _all_there(there: "Synchronized[int]", count: int) -> float:
    """Seconds until all devices are connected.

    Raises:
        SettingsError: they are not within `LIMIT_S`.
    """
    began = time.monotonic()
    while there.value < count:
        if time.monotonic() - began > LIMIT_S:
            raise SettingsError(
                f"{there.value:,} of {count:,} devices came within {LIMIT_S:g} s; take fewer"
            )
        time.sleep(0.05)
    return time.monotonic() - began


def _cost(pid: int) -> tuple[float, float]:
    """Megabytes that a process holds, and seconds of processor time that it has taken."""
    pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, ticks / os.sysconf("SC_CLK_TCK")


def _measure(
    running: Broker, count: int, idle_s: float, there: "Synchronized[int]"
) -> dict[str, float]:
    joined_s = _all_there(there, count)
    megabytes, before_s = _cost(running.pid)
    time.sleep(idle_s)
    _, after_s = _cost(running.pid)
    if there.value < count:
        raise SettingsError(f"{count - there.value:,} of {count:,} devices were lost while idle")
    os.kill(running.pid, 9)
    began = time.monotonic()
    while there.value:  # all have noticed
        time.sleep(0.005)
    _all_there(there, count)
    back_s = time.monotonic() - began
    return {
        "devices": count,
        "all_connected_s": joined_s,
        "broker_ms_a_connection": 1e3 * before_s / count,
        "broker_mb": megabytes,
        "broker_kb_a_device": 1e3 * megabytes / count,
        "broker_share_of_a_core_idle": (after_s - before_s) / idle_s,
        "all_back_after_kill_s": back_s,
    }


def measure(options: argparse.Namespace) -> None:
    """Run the benchmark, and print what it found."""
    count: int = options.devices
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if count + 100 > most:
        raise SettingsError(
            f"--devices {count}: this shell allows {most:,} open files a process; raise it: "
            f"ulimit -n {count + 1000}"
        )
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        runs = Path(scratch)
        folder = enrolment.broker_folder(runs, FLEET)
        ours = certificates.for_broker(runs, FLEET, "127.0.0.1")
        running = stack.enter_context(
            broker.start("mosquitto", folder=folder, fleet=FLEET, port=0, certificates=ours)
        )
        (folder / "device.pem").write_text(Authority(runs, FLEET).client("device", 1))
        port = int(running.url.rpartition(":")[2])
        spawn = multiprocessing.get_context("spawn")
        there = spawn.Value("i", 0)
        for part in range(PROCESSES):
            names = [f"stillhouse-{FLEET}-device-{n}" for n in range(part, count, PROCESSES)]
            process = spawn.Process(target=_work, args=(port, folder, names, there), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.terminate)
        found = _measure(running, count, options.idle, there)
    print(
        f"{count:,} devices: all connected after {found['all_connected_s']:.0f} s "
        f"({found['broker_ms_a_connection']:.1f} ms of the broker each); broker "
        f"{found['broker_mb']:.0f} MB ({found['broker_kb_a_device']:.0f} kB a device), "
        f"{100 * found['broker_share_of_a_core_idle']:.1f} % of a core while they are idle; all "
        f"back {found['all_back_after_kill_s']:.0f} s after the broker was killed"
    )
    command.write(options.json, found | {"machine": command.machine()})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = command.parser("idle_devices", __doc__)
    parser.add_argument("--devices", type=command.count, default=1000, help="default: %(default)s")
    parser.add_argument(
        "--idle", type=command.seconds, default=20.0, help="seconds; default: %(default)s"
    )
    command.add_json(parser)
    return command.run(parser, arguments, measure)


if __name__ == "__main__":
    sys.exit(main())
