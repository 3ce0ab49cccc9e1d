"""The agent's messages to systemd, read from a socket such as systemd makes."""

import os
import socket

import pytest

from edge_agent import notify
from edge_agent.notify import Notifier


@pytest.fixture
def systemd(tmp_path):
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(path)
        end.settimeout(1.0)
        yield path, lambda: end.recv(4096).decode()


def test_ready_status_and_stopping_reach_the_socket(systemd):
    path, heard = systemd
    notifier = Notifier({"NOTIFY_SOCKET": path})
    notifier.ready("64 images")
    assert heard() == "READY=1\nSTATUS=64 images"
    notifier.status("connected")
    assert heard() == "STATUS=connected"
    notifier.stopping()
    assert heard() == "STOPPING=1"


def test_the_abstract_namespace_is_spoken_to():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(f"\0stillhouse-{os.getpid()}")
        end.settimeout(1.0)
        Notifier({"NOTIFY_SOCKET": f"@stillhouse-{os.getpid()}"}).ready("")
        assert end.recv(100) == b"READY=1\nSTATUS="


def test_the_watchdog_is_fed_twice_in_its_time(systemd, monkeypatch):
    path, heard = systemd
    now = [100.0]
    monkeypatch.setattr(notify.time, "monotonic", lambda: now[0])
    notifier = Notifier(
        {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}
    )
    fed = []
    for _ in range(20):  # a tick each half second
        notifier.alive()
        now[0] += 0.5
    notifier.status("end")
    while (word := heard()) != "STATUS=end":
        fed.append(word)
    assert fed == ["WATCHDOG=1", "WATCHDOG=1"]


def test_the_watchdog_waits_while_images_are_read(systemd):
    path, heard = systemd
    notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "10000000"})
    with notifier.busy():
        assert heard() == "WATCHDOG_USEC=1800000000\nWATCHDOG=1"
    assert heard() == "WATCHDOG_USEC=10000000\nWATCHDOG=1"


def test_a_text_of_several_lines_is_one_status(systemd):
    path, heard = systemd
    Notifier({"NOTIFY_SOCKET": path}).status("the disk at /a\nMAINPID=1 is full")
    assert heard() == "STATUS=the disk at /a MAINPID=1 is full"


@pytest.mark.parametrize(
    "environment", [{}, {"WATCHDOG_USEC": "10"}, {"NOTIFY_SOCKET": "/nowhere/notify"}]
)
def test_without_systemd_nothing_happens(environment):
    notifier = Notifier(environment)
    notifier.ready("")
    notifier.alive()
    notifier.stopping()


def test_a_watchdog_of_another_process_is_not_fed(systemd):
    path, heard = systemd
    notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"})
    notifier.alive()
    notifier.status("end")
    assert heard() == "STATUS=end"
