"""What may change in a run that has begun: pure rules on two configurations.

Settings stay if devices rely on them or if they decide the rounds' results. `[cohort]` may change,
although it decides who counts and how much (`max_weight`): it has to suit the devices that are
there, and those change while a run goes on. So may `[average]`, once a device turns out to be
hostile. docs/fleet.md has the table for people.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# A table stands for all its keys. Held-out images may move: `prepare` compares the images.
FREE = (
    "name", "runs", "heldout", "heldout_limit", "admission", "chunk_bytes", "transfer_chunks",
    "retry_s", "max_upload_bytes", "keep_every", "broker", "cohort", "average", "release",
    "server.torch_device", "server.compile", "server.eval_batch",
)  # fmt: skip
WHOLE = "strategy_settings"  # compared as a whole: only the strategy knows its keys' defaults


class Change(NamedTuple):
    """A changed setting: its key, such as `device.lr`, both values, and why it is refused.

    `why` is "" if the refusal needs no explanation.
    """

    key: str
    before: Any
    now: Any
    why: str = ""

    def __str__(self) -> str:
        """The change as text for an error message."""
        text = f"{self.key}: the run began with {self.before!r}, run.toml says {self.now!r}"
        return f"{text} ({self.why})" if self.why else text


def refused(before: Mapping[str, Any], now: Mapping[str, Any], round_: int) -> list[Change]:
    """The changes with which a run cannot be resumed.

    Args:
        before: the configuration that the run was begun with, as JSON values.
        now: the configuration of this start.
        round_: the open round, or the last that was open.
    """
    found = [(change, _why(change, now, round_)) for change in _changes(before, now)]
    return [change._replace(why=why) for change, why in found if why is not None]


def _why(change: Change, now: Mapping[str, Any], round_: int) -> str | None:
    """Why a change is refused, "" if that needs no explanation; None if it is allowed."""
    key, schedules = change.key, [now[part]["schedule"] for part in ("device", "server")]
    if any(key == free or key.startswith(f"{free}.") for free in FREE):
        return None
    if key == "rounds":
        if "cosine" in schedules:
            return 'schedule = "cosine" spreads the learning rate over all rounds'
        return f"the run is in round {round_}" if change.now < round_ else None
    if key == "pretrained":  # the weights are in the run's folder; the run they came from may move
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
