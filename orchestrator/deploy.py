"""What a run has learnt as one inference graph: `orchestrator export RUN --out model.onnx`.

For fedgkt the graph is a device's extractor with the large model on top (He et al. 2020, section
3.3), or with `--small` the device's own network, as the large one taught it; for fedavg and
feddropout the global model; for local, with `--small`, a device's. Normalization is part of it, so
that its input is plain pixels: `image` float32 (N, C, H, W) from 0 to 1; its output `logits`
(N, classes).
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import models
from orchestrator.config import RunConfig
from orchestrator.store import last_checkpoint
from orchestrator.strategies import extractors
from orchestrator.training import distill
from wire import records
from wire.errors import RunError

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Deployed:
    """What was written: from which round and device, and its largest difference to PyTorch."""

    path: Path
    round: int
    device: str
    difference: float


class _Stack(nn.Module):
    def __init__(self, config: RunConfig, parts: list[nn.Module]) -> None:
        super().__init__()
        shape = (-1, 1, 1)
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(config.device.mean).view(shape))
        self.register_buffer("std", torch.tensor(config.device.std).view(shape))
        self.parts = nn.Sequential(*parts)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.parts((image - self.mean) / self.std)
        return logits


def read_config(folder: Path) -> RunConfig:
    """The configuration that a run was started with.

    Raises:
        RunError: the folder holds no run.
    """
    path = folder / "run.json"
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as fault:
        raise RunError(f"{folder} holds no run: {path.name} cannot be read ({fault})") from fault
    table.pop("broker", None)  # decides no numbers, and rules for it have become stricter
    return records.build(RunConfig, table, where=str(path), error=RunError)


def export_run(
    folder: Path, out: Path, device: str | None = None, *, small: bool = False
) -> Deployed:
    """Write the run's model as ONNX and compare it with PyTorch through onnxruntime.

    Args:
        folder: of the run.
        out: the .onnx file to write.
        device: whose extractor or network; None takes the one that evaluates best.
        small: the network that a device trains and keeps, not the large model (fedgkt, local).

    Raises:
        RunError: no round is finished, there is no such device, the strategy has no such model, or
            the graph does not agree with PyTorch.
    """
    config = read_config(folder)
    if config.strategy == "local" and not small:
        raise RunError("strategy local has no model of the whole fleet; --small exports a device's")
    if small and config.strategy not in ("fedgkt", "local"):
        raise RunError(f"strategy {config.strategy} has one model for all; export without --small")
    round_, state = last_checkpoint(folder)
    names = sorted({key.split("/")[1] for key in state.tensors if key.startswith("device/")})
    if device is not None and names and device not in names:
        raise RunError(f"no device {device!r} in {folder}; there are {', '.join(names)}")
    chosen = (device or _best(folder, names, small=small)) if names else ""
    if not names:
        parts = [distill.load(_device_model(config, ""), state.under("global"))]
    elif small:
        weights = extractors.network(state, config.device, chosen)
        parts = [distill.load(_device_model(config, chosen), weights)]
    else:
        extractor = distill.load(
            _device_model(config, chosen).get_submodule("extractor"),
            state.under(f"extractor/{chosen}"),
        )
        shape = _feature_shape(extractor, config)
        server = models.build(config.server.model, classes=config.device.classes, input_shape=shape)
        clip = [models.Clip(config.device.clip)] if config.device.clip else []
        parts = [extractor, *clip, distill.load(server, state.under("server"))]
    stacked = _Stack(config, parts).eval()
    difference = _write(stacked, config, out)
    return Deployed(out, round_, chosen, difference)


def _best(folder: Path, names: list[str], *, small: bool = False) -> str:
    """The device whose network, or extractor under the large model, did best when last looked."""
    key = "device_accuracy" if small else "server_accuracy"
    try:
        history = json.loads((folder / "status.json").read_text())["history"]
        devices = next(e["devices"] for e in reversed(history) if key in e)
    except (OSError, ValueError, KeyError, StopIteration):
        return names[0]
    return max(names, key=lambda n: devices.get(n, {}).get(key, 0.0))


def _device_model(config: RunConfig, name: str) -> nn.Module:
    device = config.device
    return models.build(device.model_of(name), classes=device.classes, input_shape=device.input)


def _feature_shape(extractor: nn.Module, config: RunConfig) -> tuple[int, int, int]:
    with torch.inference_mode():
        _, *shape = extractor.eval()(torch.zeros(1, *config.device.input)).shape
    return shape[0], shape[1], shape[2]


def _write(model: nn.Module, config: RunConfig, out: Path) -> float:
    import onnxruntime

    example = torch.rand(2, *config.device.input, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():  # torch.onnx warns of its own use of torch's older names
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.onnx.export(
            model,
            (example,),
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes={"image": {0: torch.export.Dim("N")}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # noqa: S101 - dynamo=True always returns a program
    partial = out.with_name(out.name + ".new")
    program.save(partial, external_data=False)
    images = torch.rand(5, *config.device.input, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": images.numpy()})
    with torch.inference_mode():
        expected = model(images).numpy()
    difference = float(np.abs(logits - expected).max())
    if difference > TOLERANCE * max(1.0, float(np.abs(expected).max())):
        partial.unlink()
        raise RunError(f"the exported graph differs from PyTorch by {difference:.2g}; not written")
    partial.replace(out)
    return difference
