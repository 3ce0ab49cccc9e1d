"""Who may take part in a run, and what is believed of a device."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config import RunConfig
from orchestrator.fleet import devices, roster
from orchestrator.fleet.roster import Roster
from orchestrator.fleet.updates import Rollout
from tests.wire.test_measurement import REPORT
from wire import measurement, signing
from wire.messages import Birth, Measured, Platform

MACHINE = Platform("Pi", "aarch64", 4, 1 << 30, "3.11", "1.31")


def birth(device, update=""):
    return Birth(device, 1, "0.1.0", 100, "ab" * 32, MACHINE, update=update)


@pytest.fixture
def told():
    return []


@pytest.fixture
def make(tmp_path, told):
    """A roster of the open fleet `fleet`, or of one with enrolled devices."""
    config = RunConfig(name="run", heldout=Path("heldout.npz"), runs=tmp_path, fleet="fleet")

    def build(*enrolled):
        names = frozenset(enrolled) or None
        return Roster(config, names, Rollout(), lambda *said: told.append(said))

    return build


def reasons(told):
    return [(device, receipt.reason) for device, receipt in told]


def test_a_birth_counts_on_its_own_topic_only(make, told):
    there = make()
    assert there.born("pi", birth("other"), 0.0) is None
    assert there.births == {}
    assert there.born("pi", birth("pi"), 0.0) == birth("pi")
    assert there.births == {"pi": birth("pi")}
    assert told == []


def test_who_is_not_enrolled_is_told_so_and_leaves_nothing(make, told, tmp_path):
    there = make("pi")
    assert there.born("spy", birth("spy"), 0.0) is None
    there.measured("spy", Measured("spy", "ab" * 32), b"{}", 0.0)
    assert [device for device, reason in reasons(told) if "is not enrolled" in reason] == 2 * [
        "spy"
    ]
    assert there.births == {}
    assert list(tmp_path.iterdir()) == []


def test_an_updates_fault_is_shown_in_one_printable_line(make, caplog):
    shown = make().born("pi", birth("pi", "0.2 is refused\x1b[2J\n" + 600 * "x"), 0.0)
    assert shown.update.isprintable()
    assert len(shown.update) == roster.MAX_REASON
    assert caplog.messages == [f"pi: update: {shown.update}"]


def test_a_measurement_is_kept_and_a_second_one_within_a_moment_is_not(make, told, tmp_path):
    key = signing.own_key(tmp_path / "device.pem")
    there = make()
    for second, moments in enumerate((0.0, 0.9, 1.1)):
        report = {**REPORT, "name": "pi", "measured_at": f"2026-01-01T00:00:0{second}Z"}
        body = measurement.sign(key, report).to_bytes()
        there.measured(
            "pi",
            Measured("pi", hashlib.sha256(body).hexdigest()),
            body,
            moments * roster.MEASURED_S,
        )
    assert reasons(told) == [
        ("pi", ""),
        ("pi", "a report came a moment ago; measure again"),
        ("pi", ""),
    ]
    (device,) = devices.known(tmp_path, "fleet")
    assert device.measured.measured_at == "2026-01-01T00:00:02Z"


def test_two_agents_of_one_name_are_told_of_and_a_new_card_is_not(make, caplog):
    there = make()
    for state_id in ("", "ab", "ab", "cd", ""):  # an update, a new card, a roll-back
        there.born("pi", replace(birth("pi"), state_id=state_id), 0.0)
    assert "take turns" not in caplog.text
    there.born("pi", replace(birth("pi"), state_id="ab"), 0.0)
    assert "pi: two agents of this name take turns" in caplog.text
