"""No device costs more than its budget, and an honest one never meets it."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.rules import budgets
from orchestrator.rules.budgets import Bucket, Budgets
from wire.frames import Kind


@given(
    st.floats(1, 100),
    st.floats(0, 50),
    st.lists(st.tuples(st.floats(0, 20), st.floats(0, 10)), max_size=60),
)
def test_a_bucket_never_gives_more_than_its_size_and_what_flowed_in(size, rate, asked):
    bucket, now, given_out = Bucket(size, rate, size, 0.0), 0.0, 0.0
    for amount, pause in asked:
        now += pause
        before = bucket.level
        if bucket.take(amount, now):
            given_out += amount
        else:
            assert amount > min(size, before + rate * pause)
        assert 0 <= bucket.level <= size
    assert given_out <= size + rate * now + 1e-6


def test_each_device_and_each_kind_has_its_own_budget():
    all_ = Budgets()
    for _ in range(int(budgets.MESSAGES)):
        assert all_.reads("loud", Kind.TELEMETRY, 5.0)
    assert not all_.reads("loud", Kind.RESULT, 5.0)
    assert not all_.reads("loud", None, 5.0)
    assert all_.reads("loud", Kind.WANT, 5.0)
    assert all_.reads("other", Kind.RESULT, 5.0)
    assert all_.reads("loud", Kind.RESULT, 5.0 + 1.01 / budgets.MESSAGES_S)


def test_a_device_that_pulls_a_large_package_by_small_chunks_stays_within():
    """Half a window of chunks of 1 KiB a question, at 1 MB a second."""
    all_, now = Budgets(), 0.0
    for _ in range(20_000):
        now += 4 / 1000
        assert all_.reads("pi", Kind.WANT, now)
        assert all_.download("pi", 4 * 1024, now)


def test_chunks_that_were_asked_for_add_up_to_a_limit():
    all_ = Budgets()
    for _ in range(100):
        all_.asked("pi", 64, 0.0)
    read = sum(all_.reads("pi", Kind.CHUNK, 0.0) for _ in range(10_000))
    assert read == budgets.MOST_ASKED


def test_a_log_line_about_a_device_comes_once_a_minute():
    all_ = Budgets()
    told = [second for second in range(150) if all_.tells("pi", float(second))]
    assert told == [0, 60, 120]


def test_invented_names_take_no_memory_and_lock_nobody_out(monkeypatch):
    monkeypatch.setattr(budgets, "DEVICES", 100)
    all_ = Budgets()
    for _ in range(int(budgets.MESSAGES)):
        all_.reads("loud", Kind.BIRTH, 0.0)
    for number in range(1000):
        assert all_.reads(f"stranger-{number}", Kind.BIRTH, 0.0)
        assert not all_.reads("loud", Kind.BIRTH, 0.0), "it is heard of all the time"
    assert len(all_._devices) == 100
