"""The command line of an attack: how many inputs, from which seed, and how they ended."""

import argparse
import time
from collections import Counter
from collections.abc import Callable


def run(doc: str, attack: Callable[[int, int], Counter[str]], *, inputs: int) -> int:
    """Attack, and print how many inputs ended in which way; return the exit code.

    Args:
        doc: the module's docstring, whose first line is the command's help.
        attack: makes an attack, given the number of inputs and their seed.
        inputs: default number of inputs.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=inputs)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    ended = attack(options.inputs, options.seed)
    for name, count in ended.most_common():
        print(f"{count:>9,}  {name}")
    print(f"{sum(ended.values()):>9,}  in {time.monotonic() - began:.0f} s, none otherwise")
    return 0
