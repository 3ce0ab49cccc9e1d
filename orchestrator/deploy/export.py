"""What a run has learnt as one inference graph: `orchestrator export RUN --out model.onnx`.

For fedgkt the graph is a device's extractor with the large model on top (He et al. 2020, section
3.3), or with `--small` the device's own network, as the large one taught it; for fedavg and
feddropout the global model; for local, with `--small`, a device's. `orchestrator.deploy.graph`
says what goes in and comes out.

The file's `metadata_props` tell the rest, each key with the prefix `stillhouse.`
(`ondevice.card` writes and reads them): format, classes, input, layout, channels, size, resize,
scale, mean, std, version, run, strategy, round, device, model, accuracy.
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
from ondevice.data import Preprocess
from orchestrator.config import RunConfig
from orchestrator.deploy import graph
from orchestrator.launch import networks
from orchestrator.run_folder.store import last_checkpoint
from orchestrator.strategies.gkt.state import GktState
from orchestrator.strategies.strategy import Checkpoint
from orchestrator.training import distill
from wire import __version__, records
from wire.errors import RunError
from wire.manifest import MANIFEST, Manifest
from wire.names import title

Form = Literal["float32", "uint8"]

LAYOUTS: dict[Form, Literal["NCHW", "NHWC"]] = {"float32": "NCHW", "uint8": "NHWC"}


@dataclass(frozen=True)
class Deployed:
    """What was written.

    Attributes:
        path: of the file.
        card: what it says about itself.
        difference: its largest to PyTorch.
        replaced: whether another file was there.
    """

    path: Path
    card: ModelCard
    difference: float
    replaced: bool

    @property
    def round(self) -> int:
        """After which round."""
        return self.card.round

    @property
    def device(self) -> str:
        """Whose network or extractor, "" for one of all."""
        return self.card.device

    @property
    def text(self) -> str:
        """As a person reads it."""
        about = self.card
        whose = f", {about.model}" + (f" ({about.device})" if about.device else "")
        share = f", {100 * about.accuracy:.1f} % of held-out images" if about.accuracy else ""
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
        table: dict[str, object] = records.plain(about) | records.plain(self.card)
        return table


def read_config(folder: Path) -> RunConfig:
    """The configuration that a run was started with.

    Raises:
        RunError: the folder holds no run.
    """
    path = folder / "run.json"
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError as fault:
        raise RunError(f"{folder} holds no run; look for it under the `runs` folder") from fault
    except (OSError, ValueError) as fault:
        raise RunError(f"{folder} holds no run: {path.name} cannot be read ({fault})") from fault
    table.pop("broker", None)  # decides no numbers, and rules for it have become stricter
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
        folder: of the run.
        out: the .onnx file to write; one that is there is replaced.
        device: whose extractor or network; None takes the one that evaluates best.
        small: the network that a device trains and keeps, not the large model (fedgkt, local).
        form: of the input, see `orchestrator.deploy.graph`.

    Raises:
        RunError: no round is finished, there is no such device, the strategy has no such model,
            PyTorch cannot export the model or does not agree with the graph, or `out` cannot be
            written.
        ArtifactError: the manifest of the run's artifact is damaged.
    """
    config = read_config(folder)
    replaced = _check_out(out)
    if config.strategy == "local" and not small:
        raise RunError("strategy local has no model of the whole fleet; --small exports a device's")
    has_devices = config.strategy in ("fedgkt", "local")
    if (small or device is not None) and not has_devices:
        option, made = "--small" if small else "--device", title(config.strategy)
        raise RunError(f"strategy {made} has one model for all; export without {option}")
    networks.unchanged(folder, config)
    round_, state = last_checkpoint(folder)
    names = sorted({key.split("/")[1] for key in state.tensors if key.startswith("device/")})
    if has_devices and not names:
        raise RunError(f"{folder}: no device has returned a network yet; wait for the next round")
    if device is not None and device not in names:
        raise RunError(f"no device {device!r} in {folder}; there are {', '.join(names)}")
    chosen = (device or _best(folder, names, small=small)) if has_devices else ""
    parts, made_of = _parts(config, state, chosen, small=small)
    classes, preprocess = _trained_with(folder, config)
    about = ModelCard(
        classes=classes,
        input=form,
        layout=LAYOUTS[form],
        channels=config.device.input[0],
        size=config.device.input[1:],
        scale=255.0 if form == "uint8" else 1.0,
        mean=preprocess.mean,
        std=preprocess.std,
        run=config.name,
        strategy=title(config.strategy),
        round=round_,
        device=chosen,
        model=made_of,
        version=__version__,
        accuracy=_accuracy(folder, round_, chosen, small=small),
    )
    network = nn.Sequential(*parts).eval()
    proto = graph.build(network, about)
    difference = graph.difference(proto, network, about)
    graph.write(proto, out)
    return Deployed(out, about, difference, replaced)


def _parts(
    config: RunConfig, state: Checkpoint, device: str, *, small: bool
) -> tuple[list[nn.Module], str]:
    """The networks that the graph consists of, from pixels on, and what they are called."""
    name = config.device.model_of(device)
    model = models.build(name, classes=config.device.class_count, input_shape=config.device.input)
    if not device:
        if not (weights := state.under("global")):
            raise RunError(f"strategy {title(config.strategy)} keeps no model of the whole fleet")
        return [distill.load(model, weights)], title(name)
    if config.strategy == "local":
        return [distill.load(model, state.under(f"device/{device}"))], title(name)
    learnt = GktState.unpack(state, config.device.models)
    if small:
        return [distill.load(model, learnt.network(name, device))], title(name)
    extractor = distill.load(model.get_submodule("extractor"), learnt.extractors[device])
    server = models.build(
        config.server.model,
        classes=config.device.class_count,
        input_shape=_feature_shape(extractor, config),
    )
    clip = [models.Clip(config.device.clip)] if config.device.clip else []
    parts = [extractor, *clip, distill.load(server, learnt.server)]
    return parts, f"{title(config.server.model)} on the extractor of {title(name)}"


def _check_out(out: Path) -> bool:
    """Whether a file is there, which may be replaced.

    Raises:
        RunError: nothing can be written there, or it is a file of another kind.
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
    """Names of the classes and normalization, as devices train by them.

    They stand in the artifacts that devices get. A simulated run has none, and follows its
    configuration.

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
    """The entries of closed rounds, as far as the run has told them."""
    try:
        history: list[dict[str, Any]] = json.loads((folder / "status.json").read_text())["history"]
    except (OSError, ValueError, KeyError):
        return []
    return history


def _accuracy(folder: Path, round_: int, device: str, *, small: bool) -> float | None:
    """Share of held-out images that the model recognized after a round, if that was looked at."""
    entry: dict[str, Any] = next((e for e in _history(folder) if e["round"] == round_), {})
    found = entry["devices"].get(device, {}) if device and entry else entry
    accuracy: float | None = found.get("device_accuracy" if small else "server_accuracy")
    return accuracy


def _best(folder: Path, names: list[str], *, small: bool = False) -> str:
    """The device whose network, or extractor under the large model, did best when last looked."""
    key = "device_accuracy" if small else "server_accuracy"
    looked = (entry for entry in reversed(_history(folder)) if key in entry)
    devices: dict[str, Any] = next(looked, {"devices": {}})["devices"]
    return max(names, key=lambda n: devices.get(n, {}).get(key, 0.0))


def _feature_shape(extractor: nn.Module, config: RunConfig) -> tuple[int, int, int]:
    with torch.inference_mode():
        _, *shape = extractor.eval()(torch.zeros(1, *config.device.input)).shape
    return shape[0], shape[1], shape[2]
