"""Tens of thousands of corrupt frames; `python -m tests.attacks.corrupt_frames` tries a million."""

from tests.attacks.corrupt_frames import attack


def test_corrupt_frames_end_in_wire_errors_and_reach_every_check():
    ended = attack(20_000, seed=1)
    assert sum(ended.values()) == 20_000
    # If most inputs fail at the first check, the attack proves nothing.
    assert ended["FrameError"] < 10_000
    for stage in ("header", "Zstandard", "bytes in the frame", "NaN or infinity", "limit", "take"):
        assert ended[f"CodecError: {stage}"] > 20, ended
    assert ended["decoded"] > 1000
