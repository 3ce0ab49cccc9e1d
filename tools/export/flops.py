"""FLOPs of one run of an ONNX graph: 2 x multiply-accumulates of its convolutions and products."""

import math

import onnx


def count(model: onnx.ModelProto) -> int:
    """The sum over Conv, ConvTranspose, MatMul and Gemm nodes, from the inferred shapes."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {
        info.name: [d.dim_value for d in info.type.tensor_type.shape.dim]
        for info in [*inferred.input, *inferred.value_info, *inferred.output]
    }
    shapes |= {constant.name: list(constant.dims) for constant in inferred.initializer}
    return sum(_flops(node, shapes) for node in inferred.node)


def _flops(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    if node.op_type not in {"Conv", "ConvTranspose", "MatMul", "Gemm"}:
        return 0
    left, right = shapes[node.input[0]], shapes[node.input[1]]
    out = shapes[node.output[0]]
    if node.op_type == "Conv":  # weight (outputs, inputs / groups, *kernel)
        return 2 * math.prod(out) * math.prod(right[1:])
    if node.op_type == "ConvTranspose":  # weight (inputs, outputs / groups, *kernel)
        return 2 * math.prod(left) * math.prod(right[1:])
    if node.op_type == "MatMul":
        return 2 * math.prod(out) * left[-1]
    flipped = any(a.name == "transA" and a.i for a in node.attribute)
    return 2 * math.prod(out) * left[0 if flipped else 1]
