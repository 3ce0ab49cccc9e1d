"""Exports what a run has learnt as one inference graph: `orchestrator export RUN --out model.onnx`.

    fedgkt                a device's extractor with the large model on top (He et al. 2020, section
                          3.3); with `--small` the device's own network, as the large one taught it
    fedavg, feddropout    the global model
    local                 with `--small`, a device's network

`orchestrator.deploy.graph` describes input and output of the graph. The file's `metadata_props`
hold everything else: the fields of `ondevice.card.ModelCard`, each with the prefix `stillhouse.`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import models
from ondevice import card
from ondevice.card import ModelCard
from ondevice.images import Preprocess
from orchestrator.config import RunConfig
from orchestrator.deploy import graph
from orchestrator.launch import networks
from orchestrator.run_folder.store import last_checkpoint
from orchestrator.strategies.gkt import extractors
from orchestrator.strategies.strategy import Checkpoint
from orchestrator.training import distill
from wire import __version__, records
from wire.errors import RunError
from wire.manifest import MANIFEST, Manifest
from wire.names import title, written

Form = Literal["float32", "uint8"]


@dataclass(frozen=True)
class Deployed:
    """An exported file.

    Attributes:
        path: the file.
        card: its metadata.
        difference: the largest difference between its answers and PyTorch's.
        replaced: whether it replaced another file.
    """

    path: Path
    card: ModelCard
    difference: float
    replaced: bool

    @property
    def text(self) -> str:
        """What was exported, in two lines for people."""
        about = self.card
        whose = f", {about.model}" + (f" ({about.device})" if about.device else "")
        share = (
            f", {100 * about.accuracy:.1f} % of held-out images"
            if about.accuracy is not None
            else ""
        )
        axes = {"N": "N", "C": about.channels, "H": about.size[0], "W": about.size[1]}
        shape = ", ".join(str(axes[axis]) for axis in about.layout)
        return (
            f"{self.path} {'replaced' if self.replaced else 'written'}: round {about.round}{whose}"
            f"{share}; differs from PyTorch by at most {self.difference:.1e}\n"
            f"it takes `image`, {about.input} ({shape}); try it: orchestrator predict {self.path} "
            "PHOTO ..."
        )

    @property
    def plain(self) -> dict[str, object]:
        """As --json prints it."""
        about = {"path": self.path, "replaced": self.replaced, "difference": self.difference}
        return {**records.plain(about), **records.plain(self.card)}


def read_config(folder: Path) -> RunConfig:
    """The configuration that a run was started with.

    Raises:
        RunError: the folder holds no run.
    """
    path = folder / "run.json"
    try:
        table = json.loads(path.read_text())
        table.pop("broker", None)  # decides no numbers, and rules for it have become stricter
    except FileNotFoundError as fault:
        raise RunError(f"{folder} holds no run; look for it under the `runs` folder") from fault
    except (OSError, ValueError, AttributeError, TypeError) as fault:
        raise RunError(f"{folder} holds no run: {path.name} cannot be read ({fault})") from fault
    return records.build(RunConfig, table, where=str(path), error=RunError)


def export_run(
    folder: Path,
    out: Path,
    device: str | None = None,
    *,
    small: bool = False,
    form: Form = "float32",
) -> Deployed:
    """Write the run's model as ONNX and compare it with PyTorch through onnxruntime.

    Args:
        folder: the run's folder.
        out: the .onnx file to write; an existing one is replaced.
        device: whose extractor or network to take; None takes the one that evaluates best.
        small: export the network that a device trains and keeps, not the large model (fedgkt,
            local).
        form: type of the input; see `orchestrator.deploy.graph`.

    Raises:
        RunError: no round is finished, there is no such device, the strategy has no such model,
            PyTorch cannot export the model or does not agree with the graph, or `out` cannot be
            written.
        ArtifactError: the manifest of the run's artifact is damaged.
    """
    config = read_config(folder)
    replaced = _check_out(out)
    networks.unchanged(folder, config)
    round_, state = last_checkpoint(folder)
    chosen = _chosen(folder, config, state, device, small=small)
    parts, description = _parts(config, state, chosen, small=small)
    classes, preprocess = _trained_with(folder, config)
    about = ModelCard(
        classes=classes,
        input=form,
        layout="NHWC" if form == "uint8" else "NCHW",
        channels=config.device.input[0],
        size=config.device.input[1:],
        scale=255.0 if form == "uint8" else 1.0,
        mean=preprocess.mean,
        std=preprocess.std,
        run=config.name,
        strategy=title(config.strategy),
        round=round_,
        device=chosen,
        model=description,
        version=__version__,
        accuracy=_accuracy(folder, round_, chosen, small=small),
    )
    network = nn.Sequential(*parts).eval()
    proto = graph.build(network, about)
    difference = graph.difference(proto, network, about)
    graph.write(proto, out)
    return Deployed(out, about, difference, replaced)


def _chosen(
    folder: Path, config: RunConfig, state: Checkpoint, device: str | None, *, small: bool
) -> str:
    """The device whose network, or extractor with the large model, to export; "" for no device.

    The state says what there is, whatever the strategy: `global/...`, or `device/NAME/...` and
    perhaps `server/...` with `extractor/NAME/...`.

    Raises:
        RunError: the state does not hold what is asked for.
    """
    strategy = f"strategy {title(config.strategy)}"
    asked = small or device is not None
    if state.under("global") and not (asked and state.under("device")):
        if asked:
            option = "--small" if small else "--device"
            raise RunError(f"{strategy} has one model for all; export without {option}")
        return ""
    names = sorted(state.by_device("device" if small else "extractor"))
    if not names and not small and state.under("device"):
        raise RunError(f"{strategy} has no model of the whole fleet; --small exports a device's")
    if not names:
        raise RunError(f"{strategy} keeps no model of the whole fleet, nor networks of devices")
    if device is not None and device not in names:
        raise RunError(f"no device {device!r} in {folder}; there are {', '.join(names)}")
    return device or _best(folder, names, small=small)


def _parts(
    config: RunConfig, state: Checkpoint, device: str, *, small: bool
) -> tuple[list[nn.Module], str]:
    """The networks that make up the graph, from pixels to logits, and their names in words."""
    classes, shape = config.device.class_count, config.device.input
    name = config.device.model_of(device)
    model = models.build(name, classes=classes, input_shape=shape)
    if not device:
        return [distill.load(model, state.under("global"))], title(name)
    if small:
        head = state.under(f"network/{written(name)}")  # that devices with this model share
        shared = head | extractors.in_network(state.under("shared"))
        weights = shared if head else state.under(f"device/{device}")
        return [distill.load(model, weights)], title(name)
    extractor = distill.load(
        model.get_submodule("extractor"), state.under(f"extractor/{device}")
    ).eval()
    with torch.inference_mode():
        maps = extractor(torch.zeros(1, *shape))
    server = models.build(config.server.model, classes=classes, input_shape=tuple(maps.shape[1:]))
    clip = [models.Clip(config.device.clip)] if config.device.clip else []
    parts = [extractor, *clip, distill.load(server, state.under("server"))]
    return parts, f"{title(config.server.model)} on the extractor of {title(name)}"


def _check_out(out: Path) -> bool:
    """Whether a file exists at `out`, to be replaced.

    Raises:
        RunError: nothing can be written there, or the file is of another kind.
    """
    try:
        if out.is_dir():
            raise RunError(f"{out} is a folder; name a file in it, such as {out / 'model.onnx'}")
        if not out.parent.is_dir():
            raise RunError(f"{out}: {out.parent} is no folder; make it")
        there = out.exists()
    except OSError as fault:
        raise RunError(f"{out}: {fault.strerror}; name another file") from fault
    if there and out.suffix != ".onnx":
        raise RunError(f"{out} is there and is no .onnx file; name another, or remove it")
    return there


def _trained_with(folder: Path, config: RunConfig) -> tuple[tuple[str, ...], Preprocess]:
    """The class names and the normalization with which devices train.

    They are those in the artifacts that devices get. A simulated run has no artifacts; then they
    are those of its configuration.

    Raises:
        ArtifactError: a manifest is damaged.
        RunError: a manifest cannot be read.
    """
    classes, device = config.device.class_names, config.device
    preprocess = Preprocess(device.mean, device.std)
    for path in sorted(folder.glob(f"artifact*/{MANIFEST}")):
        try:
            manifest = Manifest.parse(path.read_bytes(), where=str(path))
        except OSError as fault:
            raise RunError(f"{path}: cannot be read ({fault.strerror})") from fault
        classes = manifest.model.class_names or classes
        preprocess = Preprocess(manifest.preprocess.mean, manifest.preprocess.std)
    return classes or card.numbers(config.device.class_count), preprocess


def _history(folder: Path) -> list[dict[str, Any]]:
    """The entries of closed rounds that status.json holds."""
    try:
        history: list[dict[str, Any]] = json.loads((folder / "status.json").read_text())["history"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return history


def _accuracy(folder: Path, round_: int, device: str, *, small: bool) -> float | None:
    """Share of held-out images that the model recognized after a round; None if not evaluated."""
    entry: dict[str, Any] = next((e for e in _history(folder) if e["round"] == round_), {})
    scores = entry["devices"].get(device, {}) if device and entry else entry
    accuracy: float | None = scores.get("device_accuracy" if small else "server_accuracy")
    return accuracy


def _best(folder: Path, names: list[str], *, small: bool = False) -> str:
    """The device whose network, or extractor with the large model, did best when last evaluated."""
    key = "device_accuracy" if small else "server_accuracy"
    evaluated = (entry for entry in reversed(_history(folder)) if key in entry)
    devices: dict[str, Any] = next(evaluated, {"devices": {}})["devices"]
    return max(names, key=lambda n: devices.get(n, {}).get(key, 0.0))
