"""A few ten thousand corrupt frames; a million by `python -m tests.attacks.corrupt_frames`."""

from tests.attacks.corrupt_frames import attack


def test_corrupt_frames_end_in_wire_errors_and_reach_every_check():
    ended = attack(20_000, seed=1)
    assert sum(ended.values()) == 20_000
    # An attack that only ever meets the first check proves nothing.
    assert ended["FrameError"] < 10_000
    for stage in ("header", "Zstandard", "bytes in the frame", "NaN or infinity", "limit", "take"):
        assert ended[f"CodecError: {stage}"] > 20, ended
    assert ended["decoded"] > 1000
