"""Compiled steps without files, and ONNX Runtime set up to run their nodes as they are."""

import numpy as np
import onnxruntime
import torch

from tools.export import Sgd
from tools.export.admission import admit
from tools.export.compiler import Compiler
from tools.export.tracing.step import Extras


def compiler(module, shape, *, batch, classes, parts=1):
    """The compiler of a classifier that trains with SGD."""
    tensors = admit(module, name="net", classes=classes, shape=shape, batch=batch // parts)
    return Compiler(
        module, tensors, optimizer=Sgd(), task="classify", shape=(batch, *shape), classes=classes,
        extras=Extras(parts),
    )  # fmt: skip


def random_inputs(program, *, classes, seed=0):
    """Random inputs by name; scalars and variances are around 1."""
    random = np.random.default_rng(seed)
    inputs = {}
    for name in program.inputs:
        spec = program.specs[name]
        if spec.dtype == torch.int64:
            inputs[name] = random.integers(0, classes, spec.shape)
        else:
            values = random.standard_normal(spec.shape) * 0.1
            one = spec.shape == () or "var" in name
            inputs[name] = np.asarray(values + 1 if one else values, np.float32)
    return inputs


def run(program, feed):
    """The outputs by name, computed without optimizations of the graph."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        program.model().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))
