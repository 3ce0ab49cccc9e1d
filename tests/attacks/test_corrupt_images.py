"""Some damaged pictures and archives; `python -m tests.attacks.corrupt_images` tries many."""

from tests.attacks.corrupt_images import attack


def test_damaged_pictures_end_in_a_reason_and_reach_every_decoder():
    ended = attack(1_500, seed=1)
    assert sum(ended.values()) == 1_500
    # If most inputs fail at the first check, the attack proves nothing.
    assert ended["picture: decoded"] > 100
    assert ended["npz: DataError"] > 20
    assert len(ended) > 5
