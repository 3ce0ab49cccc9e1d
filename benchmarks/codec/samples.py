"""The values to encode: random ones, a network's real update, a network's real feature maps."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator import datasets
from orchestrator.datasets import Images

Floats = NDArray[np.float32]

SEED = 0
BATCH = 10
LR = 0.01
MAPS = 64  # samples of feature maps, 16 x 32 x 32 values each


@dataclass(frozen=True)
class Samples:
    """All values to encode.

    Attributes:
        normal, lognormal: vectors of the same length; the second is exp(z) with random signs.
        update: the change of `caldas_cnn` in its last steps, by tensor.
        maps: (N, 16, 32, 32), feature maps after the ReLU of `resnet8`'s extractor.
    """

    normal: Floats
    lognormal: Floats
    update: Mapping[str, Floats]
    maps: Floats


def make(data: str, *, values: int, steps: int) -> Samples:
    """Draw random values, and train networks for the others.

    Args:
        data: what `orchestrator.datasets.read` takes: a name, or the path of an `.npz`.
        values: length of the vectors.
        steps: training steps of each network; the update is the change in the last half of them.

    Raises:
        DataError: the data cannot be read.
    """
    images, _ = datasets.read(data, seed=SEED)
    random = np.random.default_rng(SEED)
    normal = random.standard_normal(values, np.float32)
    signs = random.choice(np.array([-1, 1], np.float32), values)
    lognormal = signs * np.exp(random.standard_normal(values, np.float32))
    return Samples(normal, lognormal, _update(images, steps), _maps(images, steps))


def _update(images: Images, steps: int) -> dict[str, Floats]:
    import torch

    import models

    torch.manual_seed(SEED)
    net = models.build("caldas_cnn", classes=max(2, len(images.classes)))
    small = images.resized((28, 28), 1)
    _train(net, small, steps - steps // 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    _train(net, small, max(1, steps // 2))
    return {n: (t - before[n]).numpy() for n, t in net.state_dict().items()}


def _maps(images: Images, steps: int) -> Floats:
    import torch

    import models

    torch.manual_seed(SEED)
    net = models.build("resnet8", classes=max(2, len(images.classes)))
    colour = images.resized((32, 32), 3)
    _train(net, colour, steps)
    with torch.no_grad():
        x = torch.from_numpy(_pixels(colour.x[:MAPS]))
        maps: Floats = net.eval().extract(x)[0].numpy()  # type: ignore[operator]
    return maps


def _train(net: object, images: Images, steps: int) -> None:
    import torch
    from torch.nn import functional as F

    assert isinstance(net, torch.nn.Module)  # noqa: S101 - torch is not imported above
    sgd = torch.optim.SGD(net.parameters(), LR, momentum=0.9)
    random = np.random.default_rng(SEED)
    net.train()
    for _ in range(steps):
        chosen = random.integers(0, len(images.y), BATCH)
        logits = net(torch.from_numpy(_pixels(images.x[chosen])))
        sgd.zero_grad()
        loss = F.cross_entropy(logits, torch.from_numpy(images.y[chosen]))
        loss.backward()  # type: ignore[no-untyped-call]
        sgd.step()


def _pixels(x: NDArray[np.uint8]) -> Floats:
    """Pixels (N, C, H, W) with mean near 0 and deviation near 1, from bytes (N, H, W, C)."""
    scaled = (x.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.3)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
