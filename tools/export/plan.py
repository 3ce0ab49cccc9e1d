"""Fit a training step into a memory budget: which activations to keep, how many micro-batches.

While the agent trains, the memory of its process is the sum of

    agent    the interpreter, its libraries, and what an agent at work holds besides the step
    session  ONNX Runtime's code, and its nodes
    state    the state vector: as it was received, and twice for the step
    tensors  activations and gradients, as the arena lays them out (memory.py)

The first two are measured (x86-64, Python 3.11, onnxruntime 1.31, `benchmarks.train_step`). The
images that the device trains on are not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tools.export.compiler import Compiler
from tools.export.graphs import memory
from tools.export.graphs.program import Program
from tools.export.graphs.recompute import recompute
from wire.errors import ExportError
from wire.manifest import Memory

AGENT = 66_000_000
SESSION, NODE = 11_500_000, 4_500
TIGHT = 1.12  # with fewer large tensors, the kernels' own buffers break up the arena more


@dataclass(frozen=True)
class Plan:
    """A compiled step, and the memory that it takes."""

    compiler: Compiler
    program: Program
    memory: Memory


def fit(
    compile_for: Callable[[int], Compiler], *, batch: int, micro_batches: int, budget: int | None
) -> Plan:
    """The plan that fits with the fewest changes.

    Args:
        compile_for: compiles the step for a number of micro-batches.
        batch: samples in a step.
        micro_batches: the least number to use.
        budget: bytes of the agent's process at its peak; None for no limit. Computing activations
            again comes before splitting the batch, for it changes no result. A micro-batch has two
            samples at least, unless `micro_batches` asks for less.

    Raises:
        ExportError: the budget is too small; the message names the least that was found.
    """
    least: Plan | None = None
    most = micro_batches if budget is None else max(micro_batches, batch // 2)
    allowed = range(micro_batches, most + 1) if micro_batches > 0 else ()
    for parts in allowed:
        if batch % parts:
            continue
        try:
            compiler = compile_for(parts)
        except ExportError:
            if least is None:
                raise
            continue  # the network takes the batch, but not a part of this size
        plan = _within(compiler, compiler.train(), budget)
        if budget is None or plan.memory.process <= budget:
            return plan
        if least is None or plan.memory.process < least.memory.process:
            least = plan
    if least is None or budget is None:
        raise ExportError(
            f"expected a number of micro-batches that divides the batch of {batch}, got "
            f"{micro_batches}"
        )
    described = describe(least.memory, batch, least.compiler.extras.micro_batches)
    raise ExportError(
        f"a budget of {budget / 1e6:.0f} MB is too small: the agent alone takes "
        f"{(AGENT + SESSION) / 1e6:.0f} MB, and the least that was found for a batch of {batch} is "
        f"{described}; raise the budget or lower the batch"
    )


def _within(compiler: Compiler, program: Program, budget: int | None) -> Plan:
    """The plan with the fewest activations computed again that fits, or with the least memory."""
    best = _plan(compiler, program, program)
    if budget is None or best.memory.process <= budget:
        return best
    for trial in recompute(program):
        plan = _plan(compiler, trial, program)
        best = min(best, plan, key=lambda p: p.memory.process)
        if best.memory.process <= budget:
            break
    return best


def _plan(compiler: Compiler, program: Program, plain: Program) -> Plan:
    recomputed = len(program.nodes) - len(plain.nodes)
    tensors = int(memory.arena_bytes(program) * (TIGHT if recomputed else 1))
    state = 4 * sum(value.numel() for value in compiler.state.values())
    process = AGENT + SESSION + NODE * len(program.nodes) + 3 * state + tensors
    return Plan(compiler, program, Memory(tensors, process, recomputed))


def describe(memory: Memory, batch: int, micro_batches: int) -> str:
    """A plan in words."""
    measures = []
    if micro_batches > 1:
        measures.append(
            f"{micro_batches} micro-batches of {batch // micro_batches}, each with a batch norm of "
            f"its own"
        )
    if memory.recomputed:
        measures.append(f"{memory.recomputed} nodes run twice instead of keeping what they make")
    return (
        f"{memory.process / 1e6:.0f} MB at the peak, {memory.tensors / 1e6:.0f} MB of it tensors "
        f"({', '.join(measures) or 'everything kept, one batch'})"
    )
