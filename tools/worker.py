"""A contender's side of a pipe: it prepares, then runs when asked, and sleeps in between.

`benchmarks.race` and `ondevice.peer` are at the other end. Each message is one line. After its
preparation the contender writes {"loss": L}, the loss of its very first step (null if there is
none). For every number of seconds that it reads, it runs that long and writes its measurements.
Any failure ends it with {"failed": why}.

It needs only the standard library: onnxruntime-training runs it in a separate environment.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable

Turn = Callable[[float], dict[str, float]]
Prepared = tuple[Turn, float | None]

WARM_UP = 3


def serve(prepare: Callable[[], Prepared]) -> int:
    """Answer on standard output until standard input ends; returns the exit code."""
    # Libraries print to standard output as well; that goes to standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: dict[str, float] | dict[str, float | None] | dict[str, str]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        turn, loss = prepare()
        say({"loss": loss})
        for line in sys.stdin:
            say(turn(float(line)))
    except Exception as fault:  # noqa: BLE001 - the report says what stopped a contender
        say({"failed": one_line(fault)})
        return 1
    return 0


def steps(step: Callable[[], float], batch: int) -> Prepared:
    """Turns of whole training steps; `step` returns its loss."""
    first = step()
    for _ in range(WARM_UP):
        step()

    def turn(seconds: float) -> dict[str, float]:
        done, elapsed, loss = 0, 0.0, first
        began = time.perf_counter()
        while elapsed < seconds:
            loss = step()
            done += 1
            elapsed = time.perf_counter() - began
        if not math.isfinite(loss):
            raise ArithmeticError(f"training diverged: expected a finite loss, got {loss}")
        return {"images_per_s": done * batch / elapsed}

    return turn, first


def one_line(fault: BaseException) -> str:
    """A fault's class and the first line of its message."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return f"{type(fault).__name__}: {lines[0]}" if lines else type(fault).__name__
