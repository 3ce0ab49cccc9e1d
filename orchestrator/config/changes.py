"""What may change in a run that has begun: pure rules on two configurations.

What devices were promised, and what decides the numbers of the rounds, stays. The table for people
is in docs/fleet.md.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# A table stands for all its keys. Held-out images may move: `prepare` looks at what they are.
FREE = (
    "name", "runs", "heldout", "heldout_limit", "admission", "chunk_bytes", "transfer_chunks",
    "retry_s", "max_upload_bytes", "broker", "cohort", "release",
    "server.torch_device", "server.compile", "server.eval_batch",
)  # fmt: skip
WHOLE = "strategy_settings"  # compared as one: only the strategy knows the defaults of its keys


class Change(NamedTuple):
    """A setting by its key, such as `device.lr`, and why it is refused if that needs a word."""

    key: str
    before: Any
    now: Any
    why: str = ""

    def __str__(self) -> str:
        """For an error."""
        text = f"{self.key}: the run began with {self.before!r}, run.toml says {self.now!r}"
        return f"{text} ({self.why})" if self.why else text


def refused(before: Mapping[str, Any], now: Mapping[str, Any], round_: int) -> list[Change]:
    """The changes that a run cannot go on with.

    Args:
        before: the configuration that it was begun with, as JSON has it.
        now: the one of this start.
        round_: the round that is open, or the last that was.
    """
    found = []
    for change in _changes(before, now):
        why = _why(change, now, round_)
        if why is not None:
            found.append(change._replace(why=why))
    return found


def _why(change: Change, now: Mapping[str, Any], round_: int) -> str | None:
    """Why a change is refused, "" where that needs no word; None if it is not."""
    key, schedules = change.key, [now[part]["schedule"] for part in ("device", "server")]
    if any(key == free or key.startswith(f"{free}.") for free in FREE):
        return None
    if key == "rounds":
        if "cosine" in schedules:
            return 'schedule = "cosine" spreads the learning rate over all rounds'
        return f"the run is in round {round_}" if change.now < round_ else None
    if key == "pretrained":  # what it began with lies in its folder; where that came from may go
        return None if change.before and change.now else ""
    if key == "server.eval_every":
        return "evaluations decide the learning rate" if "plateau" in schedules else None
    return ""


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> Iterator[Change]:
    for key in now:
        old, new = before.get(key), now[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping) and key != WHOLE:
            yield from _changes(old, new, f"{at}{key}.")
        elif old != new:
            yield Change(at + key, old, new)
