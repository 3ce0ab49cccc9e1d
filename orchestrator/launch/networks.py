"""A run's strategy and networks, tried out before the run begins.

The run's folder holds digests of the source files of users' strategies and networks: a run is
resumed only with the sources that it was begun with.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import models
from models import split
from orchestrator import strategies
from orchestrator.config import RunConfig
from orchestrator.strategies.gkt import extractors
from orchestrator.training import distill
from wire import storage
from wire.errors import RunError, StillhouseError
from wire.names import cut, parse, title, written

Sources = Mapping[str, Mapping[str, str]]
FILE = "sources.json"


def check(config: RunConfig) -> Sources:
    """Let the strategy check the settings, then build and run every network on two images.

    Returns:
        SHA-256 of each source file of the user's networks and strategy: by name, then by path.

    Raises:
        StillhouseError: the message names the key of the configuration, what is wrong and what to
            do.
    """
    strategies.check(config)
    device, found = config.device, {}
    has_maps = "feature maps" in strategies.needs(config.strategy)
    sources: dict[str, Mapping[str, str]] = {}
    if files := strategies.sources(config.strategy):
        sources[written(config.strategy)] = files
    for name in device.models:
        key = "device.model" if name == device.network else "device.others"
        with _saying(key):
            model, shape = _tried(config, name, device.input, sources)
            _check_ties(model, title(name))
            found[name] = shape, distill.weights(model)
            if has_maps and shape is None:
                raise RunError(_without_extractor(model, name, config))
            if has_maps and extractors.crops(config):
                _check_crops(model, name, device.input)
            if not config.submodel.whole:
                models.layout(model, device.input)
    if has_maps:
        maps = extractors.feature_shape(config, found)
        with _saying("server.model"):
            _tried(config, config.server.model, maps, sources)
        if config.server.small_crops and extractors.crops(config):
            _check_small_crops(config, maps)
    return sources


def check_names(config: RunConfig) -> None:
    """Refuse names of networks that `check` would refuse for certain; nothing is built.

    A name with a colon passes, as the file that it names may not be written yet.

    Raises:
        StillhouseError: the message names the key of the configuration and the nearest name.
    """
    device = config.device
    named = [("device.model", device.network)]
    named += [("device.others", other.network) for other in device.others]
    if "feature maps" in strategies.needs(config.strategy):
        named.append(("server.model", config.server.model))
    for key, name in named:
        whole, _ = parse(name)
        with _saying(key):
            if ":" not in whole and whole not in models.names():
                models.input_shape(name)  # raises, since no network has this name


def claim(folder: Path, sources: Sources) -> None:
    """Note a new run's sources in its folder; refuse to resume a run with other sources.

    Raises:
        RunError: a file has changed since; the message names it.
    """
    path = folder / FILE
    if path.exists():
        _compare(path, sources)
    elif sources:
        with storage.at(path):
            storage.write(path, json.dumps(sources, indent=1).encode())


def unchanged(folder: Path, config: RunConfig) -> None:
    """Check that networks and strategy are made from the sources that the run was begun with.

    Raises:
        RunError: a file has changed since; the message names it.
        StillhouseError: a network can no longer be built.
    """
    path = folder / FILE
    if path.exists():
        _compare(path, check(config))


def _compare(path: Path, sources: Sources) -> None:
    try:
        before = json.loads(path.read_text())
    except ValueError:
        before = None
    if not isinstance(before, dict) or not all(isinstance(f, dict) for f in before.values()):
        raise RunError(
            f"{path} is damaged: expected a table of digests for each network or strategy; restore "
            "it. If they are those that the run was begun with, remove it"
        )
    for name, files in sources.items():
        known = before.get(name, {})
        changed = sorted(file for file in files if known.get(file, files[file]) != files[file])
        if changed:
            raise RunError(
                f"{name}: {', '.join(changed)} changed since run {path.parent.name} was begun; "
                "restore it, or choose another name for a new run. If the network or strategy is "
                f"the same as before, remove {path}"
            )


def _check_ties(model: nn.Module, name: str) -> None:
    """Refuse a device network in which one tensor has two names: payloads hold it by one name."""
    first: dict[int, str] = {}
    for path, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), path) != path:
            raise RunError(
                f"{name}: {first[id(tensor)]!r} and {path!r} are one tensor, and devices send each "
                "tensor by one name; give both layers weights of their own, or call one layer twice"
            )


def folder_name(model: str) -> str:
    """A model's name as part of a folder's name, different for each model."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", title(model))
    if plain == model:
        return plain
    return f"{plain}-{hashlib.sha256(written(model).encode()).hexdigest()[:8]}"


def _tried(
    config: RunConfig, name: str, shape: tuple[int, ...], sources: dict[str, Mapping[str, str]]
) -> tuple[nn.Module, tuple[int, int, int] | None]:
    """A network built with the run's seed, and the shape of its feature map.

    The digests of a user's network are added to `sources`.
    """
    classes = config.device.class_count
    torch.manual_seed(config.seed)
    model = models.build(name, classes=classes, input_shape=shape)
    features = models.try_out(model, title(name), classes=classes, shape=shape)
    if not (files := models.sources(name)):
        return model, features
    sources[written(parse(name)[0])] = files
    torch.manual_seed(config.seed)
    again = models.build(name, classes=classes, input_shape=shape).state_dict()
    for key, tensor in model.state_dict().items():
        if key not in again or not torch.equal(tensor, again[key]):
            raise RunError(
                f"{title(name)}: {key!r} is another one in each network that it makes; draw "
                "initial weights with torch's random numbers, which follow the run's seed"
            )
    return model, features


def _without_extractor(model: nn.Module, name: str, config: RunConfig) -> str:
    places = split.places(model, config.device.input)
    remedy = (
        f'set split = "{places[0]}" beside the model (on a command line '
        f"{cut(written(name), places[0])}), or another of {split.listed(places)}"
        if places
        else "it can be cut nowhere: use a network that is a chain, with feature maps (N, C, H, W)"
    )
    return (
        f"{title(name)} has no feature extractor, which {title(config.strategy)} needs; {remedy}. "
        "Or use strategy fedavg"
    )


def _check_crops(model: nn.Module, name: str, shape: tuple[int, int, int]) -> None:
    """Check that crops of feature maps are feature maps of crops.

    If an image moves by a pixel and its border changes, the middle of its feature map must move by
    a pixel too, and not change otherwise.
    """
    extractor = model.get_submodule("extractor").eval()
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    other = torch.roll(x, (1, 1), (2, 3))
    other[:, :, 0] = other[:, :, :, 0] = 10
    with torch.no_grad():
        plain, moved = extractor(x), extractor(other)
    if plain.shape[2:] != x.shape[2:]:
        return  # `extractors.feature_shape` refuses it
    row, column = plain.shape[2] // 2, plain.shape[3] // 2
    expected, got = plain[0, :, row, column], moved[0, :, row + 1, column + 1]
    if not torch.allclose(expected, got, rtol=1e-2, atol=1e-3 * float(plain.abs().max())):
        raise RunError(
            f"transfer.views: feature maps of {title(name)} are not crops where images are: in the "
            "middle of an image they depend on all of it, or on the place; cut it before such a "
            "layer, or use no views"
        )


def _check_small_crops(config: RunConfig, maps: tuple[int, int, int]) -> None:
    """Check that the large model, made for maps of one size, takes small crops of them, too."""
    large = models.build(
        config.server.model, classes=config.device.class_count, input_shape=maps
    ).train()
    height, width = distill.small(maps)
    try:
        large(torch.zeros(2, maps[0], height, width))
    except (RuntimeError, ValueError, AssertionError, IndexError) as fault:
        raise RunError(
            f"server.small_crops: {title(config.server.model)} does not take crops of {height} x "
            f"{width}; set it to 0, or use a model that pools over the whole map"
        ) from fault


@contextmanager
def _saying(key: str) -> Iterator[None]:
    """Prefix errors with the configuration key that names the network."""
    try:
        yield
    except StillhouseError as fault:
        raise type(fault)(f"{key}: {fault}") from fault
