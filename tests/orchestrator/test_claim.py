"""A fleet serves one run at a time: a second one is told the first one's name, and ends."""

import pytest

from orchestrator.fleet import claim
from orchestrator.fleet.claim import ANSWER_S, CHANNEL, Claim, Say
from wire.errors import RunError
from wire.messages import Hello
from wire.storage import Patience

FIRST, SECOND = Hello("100", "first.0a"), Hello("200", "second.0b")


def holding(hello: Hello) -> Claim:
    """The held claim of a run that was alone when it came."""
    made = Claim("home", hello.run, hello.boot)
    assert made.connected(0.0) == (Say(CHANNEL, Hello(hello.boot)),)
    assert not made.held
    said = made.heard(Hello(hello.boot))  # its own question comes back
    assert said == (Say(CHANNEL, hello, retain=True), Say("hello", hello))
    assert made.held
    return made


def asking(hello: Hello) -> Claim:
    made = Claim("home", hello.run, hello.boot)
    made.connected(0.0)
    return made


def test_who_comes_second_is_told_the_name_of_the_first_which_goes_on():
    first, second = holding(FIRST), asking(SECOND)
    assert second.heard(FIRST) == ()  # as the broker kept it
    assert second.heard(Hello("200")) == ()
    (answer,) = first.heard(Hello("200"))
    assert answer == Say(CHANNEL, Hello("100", "first.0a", answers="200"), retain=True)
    with pytest.raises(RunError, match=r"fleet 'home' is in use by run 'first\.0a'"):
        second.heard(answer.hello)
    assert first.held


def test_the_clock_of_the_second_may_be_behind_that_of_the_first():
    early = asking(Hello("50", "second.0b"))
    with pytest.raises(RunError, match=r"in use by run 'first\.0a'"):
        early.heard(Hello("100", "first.0a", answers="50"))


def test_a_claim_that_nobody_answers_for_is_taken_over_after_a_while(caplog):
    second = asking(SECOND)
    second.heard(FIRST)
    second.heard(Hello("200"))
    assert second.ticked(ANSWER_S - 1) == ()
    assert second.ticked(ANSWER_S)[0] == Say(CHANNEL, SECOND, retain=True)
    assert "first.0a, which does not answer" in caplog.text


def test_a_claim_that_the_broker_takes_away_frees_the_fleet_at_once():
    second = asking(SECOND)
    second.heard(FIRST)
    assert second.heard(None)[0] == Say(CHANNEL, SECOND, retain=True)


def test_a_will_of_another_does_not_take_our_claim_away():
    assert holding(FIRST).heard(None)[0] == Say(CHANNEL, FIRST, retain=True)


def test_what_a_former_process_of_the_same_run_left_is_no_rival():
    again = asking(Hello("200", "first.0a"))
    assert again.heard(FIRST) == ()
    assert again.heard(Hello("200"))[0].retain
    assert again.heard(FIRST) == ()


def test_a_broker_that_keeps_our_question_from_us_does_not_stop_the_run():
    assert asking(FIRST).ticked(ANSWER_S)[0] == Say(CHANNEL, FIRST, retain=True)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_that_have_it_after_an_outage_the_later_one_ends(order):
    both = holding(FIRST), holding(SECOND)
    hellos = FIRST, SECOND
    ended = []
    for number in order:  # each hears of the other's claim, and asks whether that run is there
        other = 1 - number
        (question,) = both[number].heard(hellos[other])
        assert question == Say(CHANNEL, Hello(hellos[number].boot))
        (answer,) = both[other].heard(question.hello)
        try:
            assert both[number].heard(answer.hello) == ()
        except RunError:
            ended.append(number)
    assert ended == [1]


def test_a_lock_says_on_one_machine_who_has_the_fleet(tmp_path):
    runs = tmp_path / "runs"
    with claim.locked(runs, "home", "first", Patience()):
        with (
            pytest.raises(RunError, match="in use by run 'first'"),
            claim.locked(runs, "home", "second", Patience()),
        ):
            pass
        with pytest.raises(RunError, match="run 'first' of fleet 'home' is running already"):
            claim.locked(runs, "home", "first", Patience()).__enter__()
        with claim.locked(runs, "barn", "second", Patience()):
            pass
    with claim.locked(runs, "home", "second", Patience()):
        pass
