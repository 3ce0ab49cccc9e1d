"""Real parts for tests: brokers, processes, image shards."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from orchestrator import broker, datasets
from orchestrator.broker import Broker

ROOT = Path(__file__).parent.parent

# The time of an example, or of making it, only shows how busy the machine is.
hypothesis.settings.register_profile(
    "stillhouse", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("stillhouse")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # inherited from a shell's background job
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed PyTorch before a test's fixtures, so that weights do not depend on earlier tests."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def free_port() -> int:
    """A free port below the range from which the system assigns ports."""
    for port in range(20_000 + os.getpid() % 10_000, 32_768):
        with contextlib.suppress(OSError), socket.socket() as trial:
            trial.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


class Processes:
    """Processes of a test, each with its log; all are ended when the test ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str | Path) -> "subprocess.Popen[bytes]":
        """Start `python -m COMMAND...` under a name."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", *map(str, command)],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
            )
        return self.running[name]

    def pause(self, name: str) -> None:
        """Suspend a process; it neither reads nor answers anything until `resume`."""
        self.running[name].send_signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """Let a paused process continue."""
        self.running[name].send_signal(signal.SIGCONT)

    def kill(self, name: str) -> None:
        """`kill -9`."""
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait_for(self, what: str, condition: Callable[[], bool], timeout_s: float = 300.0) -> None:
        """Wait until `condition` is true; on time-out, show the ends of all logs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                ends = "\n".join(f"--- {n}\n{self.log(n)[-2000:]}" for n in self.running)
                pytest.fail(f"{what}: not within {timeout_s:g} s\n{ends}")
            time.sleep(0.01)

    def end(self) -> None:
        for process in self.running.values():
            process.terminate()
            process.send_signal(signal.SIGCONT)  # a paused process cannot end
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Limits PyTorch and numpy to one thread: on a busy machine, threads wait for each other."""
    from benchmarks.codec import turns

    with turns.one_thread():
        yield


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts processes in the test's folder."""
    made = Processes(tmp_path)
    yield made
    made.end()


@pytest.fixture(params=["embedded", "mosquitto"])
def any_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Broker]:
    """Each of our brokers in turn, on a free port."""
    if request.param == "mosquitto" and broker.find() is None:
        pytest.skip("mosquitto is not installed: sudo apt install mosquitto")
    with broker.start(request.param, folder=tmp_path / "broker", fleet="fleet", port=0) as running:
        yield running


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of handwritten digits: 3 devices with 64 images each, 100 images held out."""
    folder = tmp_path_factory.mktemp("digits")
    datasets.build("digits", folder, devices=3, per_device=64, heldout_samples=100)
    return folder


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, leave: int = 0) -> None:
        """Fill the disk, but for `leave` bytes."""
        with (self.path / "fill").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            for size in (1 << 16, 1 << 10, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass
            file.truncate(max(file.tell() - leave, 0))

    def make_room(self) -> None:
        (self.path / "fill").unlink()

    def read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system of 8 MiB; the test is skipped if none can be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        fault = done.stderr if done.returncode else ""
    except OSError as missing:
        fault = str(missing)
    if fault:
        pytest.skip(f"no file system can be mounted here: {fault.strip()}")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", path], check=True)
