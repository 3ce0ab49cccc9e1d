"""Hundreds of devices with certificates come back after their broker was killed."""

import json

import pytest

from benchmarks import idle_devices
from orchestrator import broker


@pytest.mark.e2e
@pytest.mark.skipif(broker.find() is None, reason="mosquitto is not installed")
def test_300_devices_are_there_and_come_back_after_the_broker_was_killed(tmp_path, capsys):
    path = tmp_path / "idle.json"
    assert not idle_devices.main(["--devices", "300", "--idle", "1", "--json", str(path)])
    assert json.loads(path.read_text())["all_back_after_kill_s"] > 0
    assert "300 devices: all connected after" in capsys.readouterr().out


def test_more_devices_than_files_that_may_be_open_are_refused(capsys):
    assert idle_devices.main(["--devices", str(1 << 24)]) == 2
    assert "ulimit -n" in capsys.readouterr().err
