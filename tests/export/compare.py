"""Compare a compiled module to PyTorch, forward and backward, in float32 and float64.

In float32, on ONNX Runtime, it must be as near to PyTorch's float64 as PyTorch's float32 is. The
same graph with every float32 widened to float64 must give PyTorch's numbers to ten digits, which
reveals a constant that is a little wrong, or a formula that is only nearly right. The float64 graph
runs on ONNX Runtime if its CPU kernels have float64, otherwise on ONNX's reference. Conv,
ConvTranspose, AveragePool, Resize, Erf and all trigonometric kernels but Sin and Cos lack float64.
"""

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
from torch.func import functional_call, vjp
from torch.nn import functional as F

from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Spec
from tools.export.lower import lower, trace


class Wide(Graph):
    """A graph with float64 where a rule says float32."""

    def input(self, name, shape, dtype=torch.float32):
        return super().input(name, shape, _wide(dtype))

    def constant(self, value, dtype=torch.float32):
        return super().constant(value, _wide(dtype))

    def nodes(self, op, *inputs, outputs, **attributes):
        if op == "Cast" and attributes["to"] == onnx.TensorProto.FLOAT:
            attributes["to"] = onnx.TensorProto.DOUBLE
        if op == "Resize":  # its factors are float32 by definition
            inputs = (*inputs[:2], super().constant(self._constants[inputs[2].name]))
        wide = [Spec(spec.shape, _wide(spec.dtype)) for spec in outputs]
        return super().nodes(op, *inputs, outputs=wide, **attributes)


def _wide(dtype):
    return torch.float64 if dtype == torch.float32 else dtype


# Operators that ONNX's reference lacks, or supports only in float32 or for one group.


class FusedMatMul(OpRun):
    op_domain = "com.microsoft"

    def _run(self, a, b, alpha=1.0, transA=0, transB=0):
        left = np.swapaxes(a, -1, -2) if transA else a
        return (alpha * (left @ (np.swapaxes(b, -1, -2) if transB else b)),)


class Erf(OpRun):
    def _run(self, x):
        return (torch.erf(torch.tensor(x)).numpy(),)


class ConvTranspose(OpRun):
    def _run(self, x, w, b=None, **settings):
        rank = x.ndim - 2
        pads = settings["pads"] or [0] * 2 * rank
        y = getattr(F, f"conv_transpose{rank}d")(
            torch.tensor(x), torch.tensor(w), None if b is None else torch.tensor(b),
            settings["strides"], pads[:rank], settings["output_padding"] or 0,
            settings["group"], settings["dilations"],
        )  # fmt: skip
        assert pads[:rank] == pads[rank:]
        return (y.numpy(),)


class Pad(OpRun):
    def _run(self, data, pads, value=0.0, _=None, mode="constant"):
        before, after = np.split(np.asarray(pads), 2)
        inside = tuple(
            slice(max(0, -b), n - max(0, -a))
            for b, a, n in zip(before, after, data.shape, strict=True)
        )
        amounts = list(zip(np.maximum(before, 0), np.maximum(after, 0), strict=True))
        settings = {"constant_values": value} if mode == "constant" else {}
        return (np.pad(data[inside], amounts, mode, **settings),)


def evaluate(model, feed):
    """All outputs of a model, from ONNX Runtime if it has the kernels."""
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
    except NoKernel:
        session = ReferenceEvaluator(model, new_ops=[FusedMatMul, Erf, ConvTranspose, Pad])
    return session.run(None, feed)


def compiled(g, traced, inputs):
    """The outputs of a traced function, lowered to graph g, for these inputs."""
    names = [f"in{i}" for i in range(len(inputs))]
    arguments = [g.input(n, t.shape, t.dtype) for n, t in zip(names, inputs, strict=True)]
    for number, value in enumerate(lower(g, traced, arguments)):
        g.output(f"out{number}", value)
    model = g.program("rule").model()
    used = {i.name for i in model.graph.input}
    feed = {n: t.detach().numpy() for n, t in zip(names, inputs, strict=True) if n in used}
    return evaluate(model, feed)


def assert_same(module, shape, *, digits=10):
    """Compare the output, the gradients of input and parameters, and the buffers after one pass.

    If an ONNX operator has a float32 attribute, such as a slope or a scale, allow fewer `digits`.
    """
    torch.manual_seed(0)
    module.train()
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    x = torch.randn(shape)
    cotangent = torch.randn_like(module(x))
    state = [*parameters.values(), *buffers.values()]

    def function(x, cotangent, *flat):
        named = dict(zip([*parameters, *buffers], flat, strict=True))
        changed = {n: named[n].clone() for n in buffers}

        def forward(x, trained):
            return functional_call(module, {**trained, **changed}, (x,))

        y, back = vjp(forward, x, {n: named[n] for n in parameters})
        dx, grads = back(cotangent)
        return [y, dx, *grads.values(), *changed.values()]

    inputs = [x, cotangent, *(t.detach().clone() for t in state)]
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    labels = ["y", "dx", *(f"d{n}" for n in parameters), *buffers]
    traced = trace(function, inputs, module)
    for label, exact, torch32, got32, got64 in zip(
        labels, function(*wide), function(*inputs), compiled(Graph(), traced, inputs),
        compiled(Wide(), traced, wide), strict=True,
    ):  # fmt: skip
        truth = exact.detach().double().numpy()
        assert got32.shape == got64.shape == truth.shape, label
        scale = max(1.0, np.abs(truth).max())
        rounding = np.abs(torch32.detach().numpy() - truth).max()
        assert np.abs(got32 - truth).max() <= 4 * rounding + 1e-6 * scale, label
        assert np.abs(got64 - truth).max() <= 10.0**-digits * scale, label
