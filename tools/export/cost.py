"""What a program costs, counted from its nodes: floating-point operations as 2 x multiply-adds."""

import math

from tools.export.program import Node, Program


def flops(program: Program) -> int:
    """2 x multiply-accumulates of the convolutions and matrix products, in one run."""
    return sum(node_flops(program, node) for node in program.nodes)


def node_flops(program: Program, node: Node) -> int:
    """2 x multiply-accumulates of one node; 0 for what is neither convolution nor product."""
    if node.op not in {"Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm"}:
        return 0
    left, right = (program.specs[name].shape for name in node.inputs[:2])
    out = program.specs[node.outputs[0]].shape
    if node.op in {"Conv", "FusedConv"}:  # weight (outputs, inputs / groups, *kernel)
        return 2 * math.prod(out) * math.prod(right[1:])
    if node.op == "ConvTranspose":  # weight (inputs, outputs / groups, *kernel)
        return 2 * math.prod(left) * math.prod(right[1:])
    if node.op == "Gemm":
        return 2 * math.prod(out) * left[0 if node.attribute("transA", 0) else 1]
    return 2 * math.prod(out) * left[-2 if node.attribute("transA", 0) else -1]
