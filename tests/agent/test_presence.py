"""Births and deaths: the end of an old connection does not end a new one."""

from types import SimpleNamespace

from edge_agent.presence import Presence

IMAGES = SimpleNamespace(y=[0] * 10, digest="ab" * 32, names=("cat", "dog"))
NO_UPDATES = SimpleNamespace(own=None, word="")


def test_each_connection_has_a_number_of_its_own_in_the_count_of_the_state_folder():
    folder = SimpleNamespace(first_session=58, state_id="0123456789ab")
    presence = Presence("pi", folder, IMAGES, NO_UPDATES)
    will = presence.begin_session()
    assert (will.session, will.state_id) == (58, "0123456789ab")
    birth = presence.birth()
    assert (birth.session, birth.state_id, birth.samples) == (58, "0123456789ab", 10)
    assert presence.begin_session().session > will.session
    assert presence.birth().session == presence.death().session
