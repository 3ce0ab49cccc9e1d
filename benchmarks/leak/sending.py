"""The ways to send feature maps H (cut, codec and noise), and the privacy from the noise."""

import difflib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wire import frames, tensors
from wire.errors import SettingsError

DELTA, RELEASES = 1e-5, 20
RECORD = 32  # samples in a payload's record, as an agent sends them


@dataclass(frozen=True)
class Setting:
    """One way to send H: the network whose extractor makes H, the codec, and the noise."""

    name: str
    model: str = "resnet8"
    codec: str = "float32"
    sigma: float = 0.0


SETTINGS = (
    Setting("float32"),
    *(Setting(f"q={q}", codec=f"relu|q={q}|zstd") for q in (4, 2, 1)),
    *(Setting(f"noise {sigma:g}", sigma=sigma) for sigma in (0.003, 0.01, 0.03, 5)),
    *(
        Setting(f"block{n}{', q=2' if q else ''}", f"resnet8-block{n}", q or "float32")
        for n in (1, 2)
        for q in ("", "relu|q=2|zstd")
    ),
)


class Sent(NamedTuple):
    """H (N, C, 32, 32) as the server decodes it, and its size as sent."""

    maps: Tensor
    bytes_a_sample: float


def find(names: str) -> list[Setting]:
    """The settings that --settings names.

    Raises:
        SettingsError: a name is unknown; the message shows the nearest one.
    """
    known = {setting.name: setting for setting in SETTINGS}
    for name in names.split(";"):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise SettingsError(
                f"--settings: expected names by ;, got {name!r}; did you mean {near!r}? known are: "
                f"{'; '.join(known)}"
            )
    return [known[name] for name in names.split(";")]


def send(maps: Tensor, setting: Setting, *, clip: float, seed: int) -> Sent:
    """H (N, C, H, W) after noise and codec.

    Args:
        maps: H, the extractor's output.
        setting: the codec and the noise.
        clip: the L2 norm C to which H is clipped before noise is added.
        seed: seeds the noise.
    """
    random = torch.Generator().manual_seed(seed)
    size, arrived = 0, []
    for number, part in enumerate(torch.split(maps, RECORD)):
        batch = part
        if setting.sigma:
            batch = noised(batch, setting.sigma, clip, random)
        record = [("features", np.ascontiguousarray(batch.numpy()), setting.codec)]
        packed = tensors.pack(record, seed=number)
        size += len(packed)
        frame = frames.decode(packed, max_bytes=len(packed))
        arrived.append(torch.from_numpy(tensors.unpack(frame, where="leak")["features"]))
    return Sent(torch.cat(arrived), size / len(maps))


def noised(maps: Tensor, sigma: float, clip: float, random: torch.Generator) -> Tensor:
    """ReLU of H clipped to an L2 norm of `clip`, plus N(0, (sigma * clip)^2)."""
    norms = maps.flatten(1).norm(dim=1).clamp(min=1e-12)
    scale = (clip / norms).clamp(max=1).view(-1, 1, 1, 1)
    noise = torch.randn(maps.shape, generator=random)
    return torch.relu(maps * scale + sigma * clip * noise)


def epsilon(sigma: float, releases: int = 1) -> float:
    """Epsilon of (epsilon, DELTA)-DP after `releases` of one sample, each with noise sigma * C.

    Two maps with norms up to C are at most 2 C apart, so the noise is sigma / 2 times the
    sensitivity.
    """
    import dp_accounting
    from dp_accounting import rdp

    orders = (
        1 + np.logspace(-4, 3, 400)
    ).tolist()  # the best Renyi order is high for strong noise, near 1 for weak
    accountant = rdp.RdpAccountant(orders, dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(dp_accounting.GaussianDpEvent(sigma / 2), releases)
    return float(accountant.get_epsilon(DELTA))
