"""Which devices may take part in a run, and what is accepted from them."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config import DeviceConfig, RunConfig
from orchestrator.fleet import classes, devices, enrolment, roster
from orchestrator.fleet.roster import Roster
from orchestrator.fleet.updates import Rollout
from orchestrator.rules.attempt import MAX_REASON
from tests.wire.test_measurement import REPORT
from wire import measurement, signing
from wire.classes import digest
from wire.classes import told as told_names
from wire.messages import Birth, Hello, Measured, Platform

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


def test_strangers_of_many_names_leave_a_bounded_memory(make, monkeypatch):
    monkeypatch.setattr(roster, "REFUSED", 3)
    there = make("pi")
    for name in ("a", "b", "c", "a", "d", "e"):
        there.born(name, birth(name), 0.0)
    assert list(there.refused) == ["c", "d", "e"]


def test_who_is_not_enrolled_is_told_so_and_leaves_nothing(make, told, tmp_path):
    there = make("pi")
    assert there.born("spy", birth("spy"), 0.0) is None
    there.measured("spy", Measured("spy", "ab" * 32), b"{}", 0.0)
    assert [device for device, reason in reasons(told) if "is not enrolled" in reason] == 2 * [
        "spy"
    ]
    assert there.births == {}
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_enrolled_while_the_run_goes_on_may_take_part(make, told, tmp_path):
    there = make("pi")
    enrolment.enroll(tmp_path, "fleet", "late")
    assert there.born("late", birth("late"), 0.0) == birth("late")
    enrolment.path(tmp_path, "fleet").write_text("{")  # damaged: no new devices
    assert there.born("spy", birth("spy"), 0.0) is None
    assert there.born("late", birth("late"), 0.0) == birth("late")
    assert [device for device, _ in reasons(told)] == ["spy"]
    enrolment.path(tmp_path, "fleet").unlink()
    enrolment.path(tmp_path, "fleet").mkdir()  # it cannot be read: written by root, say
    assert there.born("spy", birth("spy"), 0.0) is None


def test_a_device_that_is_revoked_while_the_run_goes_on_may_no_longer_take_part(
    make, told, tmp_path
):
    for name in ("pi", "other"):
        enrolment.enroll(tmp_path, "fleet", name)
    before = enrolment.password(tmp_path, "fleet", "pi")
    there = make("pi", "other")
    for name in ("pi", "other"):
        there.born(name, birth(name), 0.0)
    assert there.revoked() == {}
    enrolment.revoke(tmp_path, "fleet", "pi")
    ((name, reason),) = there.revoked().items()
    assert name == "pi"
    assert "is not enrolled in fleet 'fleet'; run: orchestrator enroll pi" in reason
    there.turn_away(name, reason)
    assert [*there.births] == ["other"]
    assert reasons(told) == [("pi", reason)]
    assert there.revoked() == {}
    assert there.born("pi", birth("pi"), 0.0) is None
    enrolment.enroll(tmp_path, "fleet", "pi")
    assert there.born("pi", birth("pi"), 0.0) == birth("pi")
    assert enrolment.password(tmp_path, "fleet", "pi") != before
    enrolment.path(tmp_path, "fleet").write_text("{")  # damaged: nobody is turned away
    assert there.revoked() == {}
    assert make().revoked() == {}, "anybody may take part"


def test_an_updates_fault_is_shown_in_one_printable_line(make, caplog):
    shown = make().born("pi", birth("pi", "0.2 is refused\x1b[2J\n" + 600 * "x"), 0.0)
    assert shown.update.isprintable()
    assert len(shown.update) == MAX_REASON
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


# Names of classes

NAMES = ("bolt", "nut", "pin")


def made(device, *names, session=1):
    return replace(birth(device), classes=names, session=session)


@pytest.fixture
def run(tmp_path, told):
    """Rosters of a run with `classes` in run.toml, whose folder exists."""

    def build(of):
        config = RunConfig(
            name="run", heldout=Path("held.npz"), runs=tmp_path, device=DeviceConfig(classes=of)
        )
        config.folder.mkdir(exist_ok=True)
        return Roster(config, None, Rollout(), lambda *said: told.append(said))

    return build


def test_a_device_may_lack_classes_and_have_none_that_the_run_does_not_know(run, told, caplog):
    there = run(NAMES)
    assert there.born("a", made("a", "pin", "bolt"), 0.0)
    assert there.born("numbers", birth("numbers"), 0.0)
    for _ in range(2):  # the device comes back, but the log says it once
        assert there.born("b", made("b", "Pin", "bolt"), 0.0) is None
    reason = (
        "device 'b': a class is not known: 'Pin' ('pin' differs in capitals only); expected names "
        "among 'bolt', 'nut', 'pin', got 'Pin', 'bolt'; rename it there, or begin a run whose "
        "`classes` names it too"
    )
    assert reasons(told) == [("b", reason)] * 2
    assert caplog.messages == [f"refused: {reason}"]
    assert there.births.keys() == {"a", "numbers"}
    assert there.born("b", made("b", "pin", "bolt", session=2), 0.0), "it was renamed"
    assert not there.refused


def test_where_classes_are_a_number_the_first_devices_names_decide(run, told, tmp_path):
    there = run(3)
    assert there.born("few", made("few", "bolt", "nut"), 0.0) is None
    assert there.born("a", made("a", *NAMES), 0.0)
    assert there.born("same", made("same", *NAMES), 0.0)
    assert there.born("numbers", birth("numbers"), 0.0)
    assert there.born("b", made("b", "bolt", "nut", "Pin"), 0.0) is None
    assert there.born("c", made("c", "nut", "bolt", "pin"), 0.0) is None
    few, capital, order = (reason for _, reason in reasons(told))
    assert "expected 3 classes, got 2: 'bolt', 'nut'; the run knows classes by number" in few
    assert "'Pin' ('pin' differs in capitals only)" in capital
    assert "as a has them" in capital
    assert "classes = ['bolt', 'nut', 'pin'] in run.toml" in capital
    assert "('nut', 'bolt', 'pin') are not in the order of the run's" in order
    there.opened()
    again = run(3)  # a restarted orchestrator, which meets another device first
    assert again.born("b", made("b", "bolt", "nut", "Pin"), 0.0) is None
    assert again.born("a", made("a", *NAMES), 0.0)
    assert classes.read(tmp_path / "run").by == "a"


@pytest.mark.parametrize("how", ["renamed", "gone"])
def test_until_a_round_is_opened_a_first_device_can_be_mended(run, told, how):
    there = run(3)
    assert there.born("a", made("a", "Bolt", "nut", "pin"), 0.0)
    assert there.born("b", made("b", *NAMES), 0.0) is None
    assert there.born("c", made("c", *NAMES), 0.0) is None
    told.clear()
    there.died("a", 1, "")
    if how == "renamed":
        assert there.born("a", made("a", *NAMES, session=2), 0.0)
    assert sorted((device, type(said)) for device, said in told) == [("b", Hello), ("c", Hello)]
    assert there.born("b", made("b", *NAMES), 0.0), "it answers the hello"


def test_names_too_many_for_a_birth_are_compared_by_digest(run, told):
    many = tuple(f"species {n:06} of a long list" for n in range(10_000))
    assert told_names(many) == ((), digest(many))
    there = run(10_000)
    for device, names in (("a", many), ("b", many), ("c", many[::-1])):
        said, its = told_names(names)
        born = replace(birth(device), classes=said, classes_digest=its)
        assert (there.born(device, born, 0.0) is None) == (device == "c")
    assert "as a has them" in reasons(told)[0][1]
    listed = run(many)  # the device checks the names itself, before it trains
    assert listed.born("c", replace(birth("c"), classes_digest=digest(many[::-1])), 0.0)


def test_a_run_that_was_begun_before_there_were_names_goes_on_by_number(run, tmp_path):
    there = run(3)
    config = there._config
    assert classes.resolve(config, NAMES).mapped, "the held-out images name them,"
    (tmp_path / "run" / "artifact").mkdir()
    assert classes.resolve(config, NAMES) == classes.Classes(3), "but the artifact does not"


def test_two_agents_of_one_name_are_told_of_and_a_new_card_is_not(make, caplog):
    there = make()
    for state_id in ("", "ab", "ab", "cd", ""):  # an update, a new card, a roll-back
        there.born("pi", replace(birth("pi"), state_id=state_id), 0.0)
    assert "take turns" not in caplog.text
    there.born("pi", replace(birth("pi"), state_id="ab"), 0.0)
    assert "pi: two agents of this name take turns" in caplog.text
