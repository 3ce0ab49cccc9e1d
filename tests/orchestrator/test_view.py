"""The view fits the terminal, and says which devices are awaited and how long it will take."""

import io
import logging
import re
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
from rich.console import Console

from orchestrator.config import CohortConfig, RunConfig
from orchestrator.display import view, words
from orchestrator.display.report import Report, names_of
from orchestrator.rules.attempt import Verdict
from orchestrator.rules.rounds import Phase, RoundState
from orchestrator.run_folder.store import Store
from wire import records
from wire.errors import WireError
from wire.messages import Birth, Platform, Result, Telemetry

NAMES = [f"pi-{n:02}" for n in range(40)]
LONG = "its images are 1x28x28,\nand the run's 3x32x32; " + "name a folder of such images. " * 9


@pytest.fixture
def config(tmp_path):
    return RunConfig(
        name="first", heldout=tmp_path / "heldout.npz", strategy="fedavg", rounds=100,
        runs=tmp_path / "runs", cohort=CohortConfig(min_devices=2),
    )  # fmt: skip


@pytest.fixture
def report(config):
    store = Store(config)
    yield Report(config, store, enrolled=frozenset(NAMES))
    store.close()


def entry(number, seconds=20.0, names=NAMES):
    devices = {n: {"accepted": True, "bytes_up": 6e6, "bytes_down": 2e5} for n in names}
    return {"round": number, "seconds": seconds, "cohort": names, "devices": devices,
            "server_accuracy": 0.9, "device_accuracy": 0.5}  # fmt: skip


def busy(report, rounds=17):
    """Forty devices in the middle of a round: one has failed, one is offline, the others train."""
    report.entries.extend(entry(number) for number in range(1, rounds + 1))
    live = dict.fromkeys(NAMES[:-1], 1)
    state = RoundState(100, 0, rounds + 1, Phase.COLLECTING, live=live, cohort=frozenset(NAMES))
    report.rounds(replace(state, failed=frozenset(["pi-07"]), returned=frozenset(["pi-01"])))
    for n, name in enumerate(NAMES):
        told = {"device": name, "run": "r", "round": rounds + 1, "phase": "train",
                "done": 40 - n, "total": 100, "memory_bytes": 117_000_000}  # fmt: skip
        report.telemetry(name, records.build(Telemetry, told, where="x", error=WireError))
    result = Result("pi-07", "r", 1, rounds + 1, 0)
    report.decided(Verdict("pi-07", accepted=False, reason=LONG, result=result))
    return report.snapshot()


def lines(snapshot, width, height):
    """The lines that a terminal of this size shows."""
    out = io.StringIO()
    Console(file=out, width=width, height=height).print(view.live(snapshot, width, height))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("size", [(80, 20), (60, 11), (40, 8), (200, 46), (80, 60)])
def test_forty_devices_fit_the_terminal(report, size):
    width, height = size
    shown = lines(busy(report), width, height)
    assert len(shown) <= height
    assert max(map(len, shown)) <= width
    text = "\n".join(shown)
    assert "first  fedavg  round 18 of 100" in text
    assert "pi-07 failed: its images are" in text
    if height < 40:
        assert text.rindex("pi-07 ") < text.index("pi-38")  # slowest first
    if width >= 80:
        assert "its images are 1x28x28,\\nand the run's" in text
        assert "40 devices: 1 failed, 37 train, 1 away, 1 returned" in text
        assert re.search(r"(?m)^ +17 +90.0 % +50.0 % ", text)  # the newest round


@pytest.mark.parametrize("phase", get_args(get_type_hints(Telemetry)["phase"]))
def test_whatever_phase_a_device_is_in_is_shown(report, phase):
    busy(report)
    told = {"device": "pi-02", "run": "r", "round": 18, "phase": phase, "done": 0, "total": 9,
            "memory_bytes": 0}  # fmt: skip
    report.telemetry("pi-02", records.build(Telemetry, told, where="x", error=WireError))
    text = "\n".join(lines(report.snapshot(), 80, 20))
    assert re.search(rf"40 devices: .*\b1 {phase}|37 {phase}", text)


def test_few_devices_are_all_shown_by_name(report):
    snapshot = busy(report)
    snapshot["devices"] = {name: snapshot["devices"][name] for name in NAMES[:4]}
    text = "\n".join(lines(snapshot, 80, 20))
    assert re.findall(r"(?m)^pi-0\d", text) == ["pi-00", "pi-01", "pi-02", "pi-03"]


def test_without_a_terminal_every_device_and_round_is_there(report):
    text = "\n".join(lines(busy(report), 80, None))
    assert set(re.findall(r"(?m)^pi-\d\d", text)) == set(NAMES)
    assert len(re.findall(r"(?m)^ +\d+ +90.0 %", text)) == 17


def test_time_left_is_that_of_the_newest_rounds(report):
    assert words.time_left(report.snapshot()) == ""
    seconds = (999, 10, 10, 20, 30, 30)
    report.entries.extend(entry(n, each) for n, each in enumerate(seconds, 1))
    assert report.snapshot()["left_s"] == 94 * 20.0
    assert words.time_left(report.snapshot()) == "about 31 min left, by the last 5 rounds"
    report.opened()
    assert 93 * 20 <= report.snapshot()["left_s"] < 94 * 20
    report.entries.extend(entry(n) for n in range(7, 101))
    assert words.time_left(report.snapshot()) == ""


def test_time_left_counts_epochs_of_server_training(report):
    server = replace(report._config.server, epochs=(8, 2, 2, 0))
    report._config = replace(report._config, rounds=10, server=server)
    report.entries.extend(
        {**entry(n, 10 + 5 * epochs), "server_train_s": 5 * epochs}
        for n, epochs in ((1, 8), (2, 2))
    )
    assert report.snapshot()["left_s"] == 8 * 10 + 2 * 5
    report.entries.append(entry(3, 20))
    report.opened()
    assert 7 * 40 / 3 - 1 < report.snapshot()["left_s"] < 7 * 40 / 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (3590, "1 h"),
        (3600, "1 h"),
        (12_000, "3 h 20 min"),
        (200_000, "2 d 8 h"),
    ],
)
def test_times_are_said_in_two_units_at_most(seconds, text):
    assert words.duration(seconds) == text


def test_who_is_awaited_is_logged_and_shown(report, caplog):
    caplog.set_level(logging.INFO)
    report._enrolled = frozenset(["pi-3", "pi-4", "pi-7"])
    forming = RoundState(10, 0, live={"pi-3": 1})
    report.rounds(forming)
    report.rounds(forming)
    text = "waiting for devices: 1 of at least 2 here (pi-3); enrolled and not here: pi-4, pi-7"
    assert [record.getMessage() for record in caplog.records] == [text]
    assert text[:60] in "\n".join(lines(report.snapshot(), 80, 20))
    report.rounds(replace(forming, live={"pi-3": 1, "pi-4": 1}))
    assert report.snapshot()["awaited"] == "2 devices are here; waiting 10 s for more"
    gone = replace(forming, phase=Phase.COLLECTING, round=3, cohort=frozenset(["pi-3", "pi-4"]),
                   returned=frozenset(["pi-3"]))  # fmt: skip
    report.rounds(gone)
    assert report.snapshot()["awaited"] == (
        "round 3: waiting for devices that are away: pi-4; it ends without them 600 s after its "
        "start"
    )
    report.rounds(replace(gone, live={"pi-4": 1}))
    assert report.snapshot()["awaited"] == ""
    assert names_of(NAMES) == f"{', '.join(NAMES[:8])} and 32 more"


def test_a_file_gets_lines_and_no_view(report, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # asks for a terminal's codes
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    out = io.StringIO()
    with view.Display(Console(file=out), simulated=True) as show:
        show(report)
        logging.getLogger("orchestrator").warning("pi-3: \x1b[31m%s", LONG)
    logging.captureWarnings(capture=False)
    (line,) = out.getvalue().splitlines()
    assert re.match(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d WARNING pi-3: \\x1b\[31mits", line
    )
    assert len(line) > 200


def test_a_simulated_run_says_what_it_does(report):
    live = dict.fromkeys(NAMES, 1)
    now = RoundState(10, 0, 3, Phase.COLLECTING, live=live, cohort=frozenset(NAMES[:4]))
    report.rounds(replace(now, returned=frozenset(NAMES[:1])))
    assert words.progress(report.snapshot()) == "round 3 of 100, 1 of 4 devices done"
    report.rounds(replace(now, phase=Phase.AGGREGATING))
    report.progress("distill", 3, 20)
    report.entries.extend([entry(1), entry(2)])
    assert words.progress(report.snapshot()) == (
        "round 3 of 100, server: distill 3/20, about 33 min left, by the last 2 rounds"
    )


def test_a_device_that_is_refused_is_shown_with_the_reason_until_it_is_not(report):
    reason = "device 'odd': a class is not known: 'Pin'"
    report.turned_away("odd", reason)
    shown = report.snapshot()["devices"]["odd"]
    assert (shown["live"], shown["stand"], shown["fault"]) == (True, "refused", reason)
    assert "1 refused" in view.summary(report.snapshot()["devices"])
    machine = Platform("board", "aarch64", 4, 1 << 30, "3.11", "1.31")
    report.born("odd", Birth("odd", 1, "0.1.0", 10, "ab" * 32, machine))
    assert "odd" not in report.snapshot()["devices"]
