"""Lets contenders take turns, each for a moment in every round, on one thread.

`benchmarks.race` gives every contender a process, for turns of a second and to measure its memory.
Here about forty functions of a few milliseconds share one process. Both change the order from round
to round and take ratios within a round, so that a slow moment hits all alike.
"""

import contextlib
import functools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.codec.contenders import Contender


@dataclass
class Course:
    """The results of one contender: values per second in each round."""

    name: str
    encode: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def run(contenders: Sequence[Contender], *, rounds: int, seconds: float) -> list[Course]:
    """Let all contenders take turns of `seconds`, half of it for each direction."""
    courses = [Course(contender.name) for contender in contenders]
    sent = [contender.encode() for contender in contenders]
    for contender, body in zip(contenders, sent, strict=True):
        contender.decode(body)  # not timed: the first call makes tables
    with one_thread():
        for number in range(rounds):
            for i in random.Random(number).sample(range(len(contenders)), len(contenders)):
                contender = contenders[i]
                back = functools.partial(contender.decode, sent[i])
                courses[i].encode.append(_rate(contender.encode, contender.values, seconds / 2))
                courses[i].decode.append(_rate(back, contender.values, seconds / 2))
    return courses


def _rate(work: Callable[[], object], values: int, seconds: float) -> float:
    """Values per second, from at least one call."""
    done, elapsed, began = 0, 0.0, time.perf_counter()
    while not done or elapsed < seconds:
        work()
        done += 1
        elapsed = time.perf_counter() - began
    return done * values / elapsed


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block, limit numpy's and PyTorch's thread pools to one thread."""
    import torch
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)
