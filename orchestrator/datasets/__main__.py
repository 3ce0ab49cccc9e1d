"""`python -m orchestrator.datasets`: cut a data set into one shard for each device."""

import enum
import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.datasets import NAMED, build
from wire import stopping, storage
from wire.errors import DataError, StillhouseError


class _Split(enum.StrEnum):
    iid = "iid"
    dirichlet = "dirichlet"


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise DataError(f"--size: expected HEIGHTxWIDTH such as 32x32, got {text!r}")
    return int(height), int(width)


def shards(  # noqa: PLR0917 - typer makes options of them
    source: Annotated[
        str, typer.Option(help=f"{', '.join(NAMED)}, or the path of an .npz or image folder.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", file_okay=False)],
    devices: Annotated[int, typer.Option(min=1, help="Number of shards.")],
    per_device: Annotated[
        int | None, typer.Option(min=1, help="Samples in each shard; all are dealt out if unset.")
    ] = None,
    split: Annotated[_Split, typer.Option(help="How labels spread over devices.")] = _Split.iid,
    alpha: Annotated[
        float, typer.Option(help="Dirichlet concentration; small is skewed, large is iid.")
    ] = 0.5,
    min_samples: Annotated[
        int, typer.Option(min=1, help="The least a device may get (Dirichlet, no --per-device).")
    ] = 10,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Resize the images, such as 32x32.")
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="1 (grey) or 3 (RGB); the source's if unset.")
    ] = None,
    heldout: Annotated[
        Path | None, typer.Option(help="Held-out set of a path; 20 % of the source if unset.")
    ] = None,
    held_out: Annotated[
        int | None, typer.Option(min=1, help="Number of held-out samples to keep; all if unset.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Where torchvision keeps its downloads.")] = Path(
        "data"
    ),
) -> None:
    """Write DIR/device-0.npz ..., heldout.npz, split.json and split.png."""
    try:
        with storage.at(out):
            made = build(
                source,
                out,
                devices=devices,
                per_device=per_device,
                split=split.value,
                alpha=alpha,
                seed=seed,
                size=None if size is None else _size(size),
                channels=channels,
                heldout=heldout,
                heldout_samples=held_out,
                min_samples=min_samples,
                cache=cache,
            )
    except StillhouseError as fault:
        print(f"error: {fault}", file=sys.stderr)
        raise typer.Exit(2) from fault
    sizes = [shard.samples for shard in made.devices]
    each = f"{sizes[0]:,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
    height, width, depth = made.shape
    print(
        f"{out}: {len(sizes)} devices with {each} samples of {height}x{width}x{depth}, "
        f"{made.heldout.samples:,} held out; the split is drawn in {out / 'split.png'}"
    )


if __name__ == "__main__":
    sys.exit(stopping.run(lambda: typer.run(shards)))
