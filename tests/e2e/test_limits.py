"""A broker that takes no large messages: the error names the size and the remedy, which works."""

import os
import socket
import subprocess

import pytest

from orchestrator import broker
from tests.conftest import Processes
from tests.e2e.test_run import Fleet

LIMIT = 20_000


@pytest.fixture(params=["max_packet_size", "message_size_limit"])
def limited_broker(request, tmp_path):
    """A Mosquitto that silently drops a larger message, or ends its sender's connection."""
    program = broker.find()
    if program is None:
        pytest.skip("mosquitto is not installed: sudo apt install mosquitto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lines = [f"listener {port} 127.0.0.1", "allow_anonymous true", f"{request.param} {LIMIT}"]
    lines += ["max_inflight_messages 64", "set_tcp_nodelay true"]
    lines += ["user root"] if os.geteuid() == 0 else []
    path = tmp_path / "limited.conf"
    path.write_text("\n".join(lines) + "\n")
    with (tmp_path / "limited.log").open("wb") as log:
        process = subprocess.Popen([program, "-c", path], stdout=log, stderr=log)
    yield f"mqtt://127.0.0.1:{port}"
    process.terminate()
    process.wait()


def settings(processes: Processes, name: str, chunk_bytes: int) -> None:
    path = processes.folder / name
    lines = [line for line in path.read_text().splitlines() if "chunk_bytes" not in line]
    path.write_text("\n".join([f"chunk_bytes = {chunk_bytes}", *lines]) + "\n")


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_broker_that_takes_no_chunk_is_told_of_and_smaller_chunks_mend_it(
    processes, digits, limited_broker
):
    fleet = Fleet(processes, digits, limited_broker, strategy="fedavg", rounds=1)
    path = fleet.folder / "run.toml"
    text = path.read_text().replace("min_devices = 3", "min_devices = 1")
    path.write_text("retry_s = 0.5\n" + text.replace("deadline_s = 1000.0", "deadline_s = 1e6"))
    settings(processes, "run.toml", 128 * 1024)
    settings(processes, "agent-0.toml", 128 * 1024)
    path = fleet.folder / "agent-0.toml"
    path.write_text(path.read_text().replace("retry_s = 2.0", "retry_s = 0.5"))
    fleet.orchestrator()
    fleet.agent(0)

    def told(file: str) -> bool:
        text = " ".join(processes.log("run").split())
        return "do not come" in text and f"Set a smaller chunk_bytes in {file}" in text

    processes.wait_for("the size of what goes down", lambda: told("run.toml"), 300.0)
    assert "Set a smaller chunk_bytes in run.toml" in processes.log("agent-0")
    processes.kill("run")
    settings(processes, "run.toml", 8192)
    fleet.orchestrator()
    up = "agent.toml of device-0"
    processes.wait_for("the size of what goes up", lambda: told(up), 300.0)
    processes.kill("agent-0")
    settings(processes, "agent-0.toml", 8192)
    fleet.agent(0)
    report = fleet.finish()
    assert report["rounds"][0]["devices"]["device-0"]["accepted"]
