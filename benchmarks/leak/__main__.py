"""How much of an image shows in what a FedGKT device sends, and what does hiding it cost?

    python -m benchmarks.leak --data cifar10 --public cifar100 --out leak --json leak.json

A device sends a feature map H of each image. Only a 3x3 convolution, batch norm and ReLU lie
between the image and H. H has 16 values a pixel, where the image has 3, and every edge is in its
place. So H is close to the image, and no codec here changes that.

The attacker is the server, or whoever reads its disk. They know the extractor, whose weights are
sent, and have their own images (--public). On these they train a decoder that turns H, as the codec
returns it, into images. Then they apply it to the H of the victims: held-out images of --data,
which neither they nor the extractor have seen. The extractor is that of a `resnet8` trained on
--images of --data.

    bytes       bytes of H as it is sent, for each sample
    PSNR        dB, mean over the victims; pixels from 0 to 1. Higher is closer to the image
    SSIM        structural similarity, mean over the victims; 1 is the image itself
    accuracy    what hiding costs: accuracy of a `resnet10` on H of held-out images; it is trained
                on H and labels of the same --images of --data, sent in the same way
    epsilon     for (epsilon, 1e-5)-differential privacy of one H, and of 20 H of one image

    q=4 ...     the codec `relu|q=4|zstd`; all others send float32
    noise S     H is scaled down to an L2 norm of C if it is longer, N(0, (S C)^2) is added to each
                value, then comes ReLU, which is post-processing. C is the median norm of public H.
                Neighbouring data sets differ in one replaced sample, so the sensitivity is 2 C.
                Epsilon comes from dp-accounting's Renyi accountant. It covers only H: not the
                label, logits and weights that the device also sends, nor the extractor's training
    block1 ...  the extractor reaches to the first (second) block of `resnet8`; H has 64 channels

A decoder of three layers, trained for a minute and shown one H of each image, is a weak attacker:
PSNR and SSIM are lower bounds of what leaks. A low score is no protection; only epsilon bounds
every attacker. Here the noise comes from torch's seeded generator, so that a run can be repeated. A
device must draw it from the operating system's generator, since noise that can be guessed can be
subtracted.

Measured: see docs/fedgkt.md. All settings together take 14 minutes of processor time.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import models
from benchmarks import command
from benchmarks.leak import report, sending
from benchmarks.leak.likeness import psnr, ssim
from benchmarks.leak.sending import DELTA, RELEASES, SETTINGS, Setting
from orchestrator import datasets
from orchestrator.simulation import simulate
from wire.errors import SettingsError

VICTIMS, SHOWN = 500, 8
SIZE = (32, 32)
PART = 64  # images in one pass without training


class Pictures(NamedTuple):
    """x (N, 3, 32, 32) float32 from 0 to 1, and labels (N,)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Scene:
    """What all settings share: the trained `resnet8`, and the images of device and attacker."""

    device: nn.Module
    train: Pictures
    test: Pictures
    public: Pictures
    classes: int
    options: argparse.Namespace


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 0, or 2 if the input is bad."""
    parser = command.parser("leak", __doc__)
    parser.add_argument("--data", default="cifar10", help="a data set, or the path of an .npz")
    parser.add_argument("--heldout", type=Path, help="its held-out set, where --data is a path")
    parser.add_argument("--public", default="cifar100", help="the attacker's images, likewise")
    parser.add_argument("--images", type=command.count, default=3500,
                        help="from --data, and from --public; default: %(default)s")  # fmt: skip
    parser.add_argument("--epochs", type=command.count, default=3, help="of each training")
    parser.add_argument("--settings", default=";".join(s.name for s in SETTINGS),
                        help="by ; default: %(default)s")  # fmt: skip
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of training; the attack itself is in float32")  # fmt: skip
    parser.add_argument("--threads", type=command.count, default=1)
    parser.add_argument("--out", type=Path, default=Path("leak"), help="folder of leak.png")
    command.add_json(parser)
    return command.run(parser, arguments, _measure)


def _measure(options: argparse.Namespace) -> None:
    simulate.hold_threads(options.threads)
    chosen = sending.find(options.settings)
    if options.out.exists() and not options.out.is_dir():
        raise SettingsError(f"--out {options.out}: expected a folder, got a file; name another")
    machine, began = command.machine(), time.monotonic()
    scene = _scene(options)
    options.out.mkdir(parents=True, exist_ok=True)
    victims = scene.test.x[:VICTIMS]
    rows: dict[str, Tensor] = {"original": victims[:SHOWN]}
    figures = []
    for setting in chosen:
        command.say(setting.name)
        figure, seen = _try(setting, scene)
        figures.append(figure)
        rows[setting.name] = seen[:SHOWN]
    blind = _likeness(scene.public.x.mean(0).expand_as(victims), victims)
    accuracy = _accuracy(scene.device, _normalised(scene.test.x), scene.test.y)
    minutes = (time.monotonic() - began) / 60
    settings = {name: str(value) for name, value in vars(options).items()}
    for name in ("data", "heldout", "public"):  # do not publish the paths of folders
        settings[name] = Path(settings[name]).name
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(
        f"images: {len(scene.train.y)} of {settings['data']} and {len(scene.public.y)} of "
        f"{settings['public']}; victims: {len(victims)}; epochs: {options.epochs}\nresnet8: "
        f"{100 * accuracy:.1f} %; the mean public image for every victim: {blind['psnr']:.1f} dB, "
        f"SSIM {blind['ssim']:.3f}\n{machine['cpu']}, threads: {options.threads}, "
        f"{minutes:.1f} minutes",
        highlight=False,
    )
    console.print(report.table(figures))
    report.draw(options.out / "leak.png", rows)
    whole = {
        "benchmark": "leak",
        "machine": machine,
        "options": settings,
        "images": {"own": len(scene.train.y), "public": len(scene.public.y),
                   "test": len(scene.test.y), "victims": len(victims)},
        "device_accuracy": accuracy,
        "mean_public_image": blind,
        "delta": DELTA,
        "releases": RELEASES,
        "minutes": minutes,
        "figures": figures,
    }  # fmt: skip
    command.write(options.json, whole)


def _scene(options: argparse.Namespace) -> Scene:
    halves = datasets.read(options.data, heldout=options.heldout, seed=0)
    train, test = (_pictures(half, options.images) for half in halves)
    public = _pictures(datasets.read(options.public, seed=0)[0], options.images)
    classes = max(2, len(halves[0].classes))
    command.say("resnet8")
    torch.manual_seed(0)
    device = models.build("resnet8", classes=classes)
    fit(device, _normalised(train.x), train.y, F.cross_entropy, options)
    return Scene(device, train, test, public, classes, options)


def _try(setting: Setting, scene: Scene) -> tuple[dict[str, Any], Tensor]:
    """The figures of a setting, and the victims' images as the attacker reconstructs them."""
    extractor = _cut(scene, setting.model)

    def maps(images: Pictures) -> Tensor:
        return _run(extractor, _normalised(images.x))

    public = maps(scene.public)
    clip = float(public.flatten(1).norm(dim=1).median())
    torch.manual_seed(1)
    attacker = decoder(public.shape[1])
    public = sending.send(public, setting, clip=clip, seed=1).maps
    fit(attacker, public, scene.public.x, F.mse_loss, scene.options, batch=16, lr=1e-2)
    del public  # one large tensor at a time

    sent = sending.send(maps(scene.test), setting, clip=clip, seed=2)
    victims = scene.test.x[:VICTIMS]
    seen = _run(attacker, sent.maps[:VICTIMS]).clamp(0, 1)

    torch.manual_seed(2)
    shape = (sent.maps.shape[1], *SIZE)
    server = models.build("resnet10", classes=scene.classes, input_shape=shape)
    received = sending.send(maps(scene.train), setting, clip=clip, seed=3).maps
    fit(server, received, scene.train.y, F.cross_entropy, scene.options)
    figure = {
        **asdict(setting),
        "bytes": sent.bytes_a_sample,
        **_likeness(seen, victims),
        "accuracy": _accuracy(server, sent.maps, scene.test.y),
        "clip": clip if setting.sigma else None,
        "epsilon": sending.epsilon(setting.sigma) if setting.sigma else None,
        "epsilon_of_releases": (
            sending.epsilon(setting.sigma, RELEASES) if setting.sigma else None
        ),
    }
    return figure, seen


def decoder(planes: int) -> nn.Module:
    """The attacker's network: H (N, planes, H, W) -> images (N, 3, H, W)."""
    return nn.Sequential(
        nn.BatchNorm2d(planes),
        nn.Conv2d(planes, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 3, 3, padding=1),
    )


def fit(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    options: argparse.Namespace,
    *,
    batch: int = 32,
    lr: float = 5e-3,
) -> None:
    """Train in place with Adam; the rate rises for a fifth of all steps, then falls to 0."""
    steps = options.epochs * math.ceil(len(x) / batch)
    rise = max(1, steps // 5)
    adam = torch.optim.Adam(net.parameters(), lr, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda k: min((k + 1) / rise, (steps - k) / max(1, steps - rise))
    )
    net.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    low = options.precision == "bfloat16"
    for _ in range(options.epochs):
        for at in torch.split(torch.randperm(len(x)), batch):
            drawn = x[at].contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                out = net(drawn)
            adam.zero_grad()
            loss(out.float(), y[at]).backward()  # type: ignore[no-untyped-call]
            adam.step()
            rate.step()


def _pictures(images: datasets.Images, most: int) -> Pictures:
    some = images.take(np.arange(min(most, len(images.y)))).resized(SIZE, 3)
    x = torch.from_numpy(np.ascontiguousarray(some.x.transpose(0, 3, 1, 2)))
    return Pictures(x.float() / 255, torch.from_numpy(some.y))


def _normalised(x: Tensor) -> Tensor:
    return (x - 0.5) / 0.25


def _cut(scene: Scene, model: str) -> nn.Module:
    """The trained network's extractor, up to the cut of `model`, which has the same tensors."""
    net: Any = models.build(model, classes=scene.classes)
    trained = scene.device.state_dict().values()
    net.load_state_dict(dict(zip(net.state_dict(), trained, strict=True)))
    extractor: nn.Module = net.extractor
    return extractor


@torch.no_grad()
def _run(net: nn.Module, x: Tensor) -> Tensor:
    net.eval()
    return torch.cat([net(part) for part in torch.split(x, PART)])


def _accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((_run(net, x).argmax(1) == y).float().mean())


def _likeness(seen: Tensor, victims: Tensor) -> dict[str, float]:
    return {"psnr": float(psnr(seen, victims).mean()), "ssim": float(ssim(seen, victims).mean())}


if __name__ == "__main__":
    sys.exit(main())
