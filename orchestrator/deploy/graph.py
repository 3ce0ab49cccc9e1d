"""An inference graph as ONNX: pixels in, logits out, with its card in the `metadata_props`.

Its input `image` has one of two forms:

- float32 (N, C, H, W), from 0 to 1. If an image has a value over 1.5, it is assumed to be from 0 to
  255, and divided by 255. Other values (normalized ones, -1 to 1, 16 bits, NaN) make the graph fail
  with an error.
- uint8 (N, H, W, C), as image decoders return it.

Its output is `logits`, float32 (N, classes). The graph includes the normalization.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ondevice.card import ModelCard
from ondevice.images import Preprocess
from wire import storage
from wire.errors import RunError

if TYPE_CHECKING:
    import onnx

TOLERANCE = 1e-3
OPSET, IR_VERSION = 18, 9  # as in training artifacts; every onnxruntime since 1.15 runs them

# The graph before the network, in ONNX's text format: it turns `image` into `unit`, float32
# (N, C, H, W) from 0 to 1.
_UINT8 = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
pixels (uint8[N, {height}, {width}, {channels}] image) => (float[N, C, H, W] unit)
<float white = {{255}}>
{{
    numbers = Cast <to = 1> (image)
    planes = Transpose <perm = [0, 3, 1, 2]> (numbers)
    unit = Div (planes, white)
}}
"""
# `kind` of each image is an index into `white`. For values that are not pixels it is out of range,
# and Gather fails. The limits allow for interpolation, which leaves the range of pixels by less
# than a quarter. The mean catches NaN, which minimum and maximum may ignore.
_FLOAT32 = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
pixels (float[N, {channels}, {height}, {width}] image) => (float[N, C, H, W] unit)
<float[2] white = {{1, 255}}, float over_unit = {{1.5}}, float most = {{320}}, float one = {{1}},
 float quarter = {{-0.25}}, int64 neither = {{2}}, int64[3] axes = {{1, 2, 3}}>
{{
    low = ReduceMin <keepdims = 1> (image, axes)
    high = ReduceMax <keepdims = 1> (image, axes)
    span = Max (high, one)
    least = Mul (span, quarter)
    not_under = GreaterOrEqual (low, least)
    not_over = LessOrEqual (high, most)
    in_range = And (not_under, not_over)
    mean = ReduceMean <keepdims = 1> (image, axes)
    is_number = LessOrEqual (mean, most)
    fits = And (in_range, is_number)
    is_bytes = Greater (high, over_unit)
    number = Cast <to = 7> (is_bytes)
    kind = Where (fits, number, neither)
    scale = Gather (white, kind)
    unit = Div (image, scale)
}}
"""
_FAULT = "image: expected pixels from 0 to 1, or from 0 to 255"  # a node's name; errors quote it


class _Normalized(nn.Module):
    """A network with the normalization before it."""

    def __init__(self, network: nn.Module, about: ModelCard) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(about.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(about.std).view(-1, 1, 1))
        self.network = network

    def forward(self, unit: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network((unit - self.mean) / self.std)
        return logits


def build(network: nn.Module, about: ModelCard) -> "onnx.ModelProto":
    """The graph of a network in evaluation mode, from images in the card's form to logits.

    Raises:
        RunError: PyTorch cannot export the network.
    """
    import onnx.compose
    import onnx.helper
    import onnx.parser

    shape = (about.channels, *about.size)
    with warnings.catch_warnings():  # torch.onnx warns about its own use of deprecated names
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            program = torch.onnx.export(
                _Normalized(network, about).eval(),
                (torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)),),
                input_names=["unit"],
                output_names=["logits"],
                dynamic_shapes={"unit": {0: torch.export.Dim("N")}},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as fault:
            raise RunError(f"PyTorch cannot export {about.model}: {fault}") from fault
    assert program is not None  # noqa: S101 - dynamo=True always returns a program
    proto = program.model_proto
    for node in proto.graph.node:  # paths and lines of our source files
        del node.metadata_props[:]
    text = (_UINT8 if about.input == "uint8" else _FLOAT32).format(
        ir=IR_VERSION, opset=OPSET, channels=shape[0], height=shape[1], width=shape[2]
    )
    front = onnx.parser.parse_model(text)
    # The network's names contain no colon, so this prefix makes the others distinct.
    onnx.compose.add_prefix(
        front, "image:", rename_inputs=False, rename_outputs=False, inplace=True
    )
    for node in front.graph.node:
        node.name = _FAULT if node.op_type == "Gather" else node.output[0]
    front.graph.node.extend(proto.graph.node)
    front.graph.initializer.extend(proto.graph.initializer)
    front.graph.value_info.extend([*proto.graph.input, *proto.graph.value_info])
    del front.graph.output[:]
    front.graph.output.extend(proto.graph.output)
    front.functions.extend(proto.functions)
    del front.opset_import[:]
    front.opset_import.extend(proto.opset_import)
    front.producer_name, front.producer_version = "stillhouse", about.version
    onnx.helper.set_model_props(front, about.metadata)
    return front


def difference(proto: "onnx.ModelProto", network: nn.Module, about: ModelCard) -> float:
    """The largest difference between a graph's logits and PyTorch's.

    It is relative to the largest logit, if that is over 1. PyTorch gets images as devices normalize
    them; the graph gets them in each range of pixels that it takes.

    Raises:
        RunError: rounding cannot explain the difference, or onnxruntime cannot run the graph.
    """
    import onnxruntime

    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (5, *about.size, about.channels), np.uint8)
    x = np.empty((5, about.channels, *about.size), np.float32)
    Preprocess(about.mean, about.std)(pixels, out=x)
    with torch.inference_mode():
        expected = network(torch.from_numpy(x)).numpy()
    planes = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    inputs = [pixels] if about.input == "uint8" else [planes / 255, planes]
    providers = ["CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=providers)
        answers = [session.run(["logits"], {"image": image})[0] for image in inputs]
    except Exception as fault:  # onnxruntime has an exception class for each status code
        raise RunError(f"onnxruntime cannot run the exported graph: {fault}") from fault
    most = max(float(np.abs(logits - expected).max()) for logits in answers)
    most /= max(1.0, float(np.abs(expected).max()))
    if not most <= TOLERANCE:
        raise RunError(f"the exported graph differs from PyTorch by {most:.2g}; not written")
    return most


def write(proto: "onnx.ModelProto", out: Path) -> None:
    """Write a graph to a file, all of it or nothing."""
    try:
        storage.write(out, proto.SerializeToString())
    except OSError as fault:
        raise RunError(
            f"{out}: cannot be written ({fault.strerror}); make room, or name another file"
        ) from fault
