"""`python -m orchestrator.datasets`: cuts a data set into one shard for each device."""

import enum
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.datasets import NAMED, build, parse_size
from orchestrator.datasets.picture import span
from wire import __version__, records, stopping, storage
from wire.errors import StillhouseError


class _Split(enum.StrEnum):
    iid = "iid"
    dirichlet = "dirichlet"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"orchestrator.datasets {__version__}")
        raise typer.Exit


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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what split.json holds, for scripts.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """Write DIR/device-0.npz ..., heldout.npz, split.json and split.png."""
    del version
    try:
        with storage.at(out):
            written = build(
                source,
                out,
                devices=devices,
                per_device=per_device,
                split=split.value,
                alpha=alpha,
                seed=seed,
                size=None if size is None else parse_size(size),
                channels=channels,
                heldout=heldout,
                heldout_samples=held_out,
                min_samples=min_samples,
                cache=cache,
            )
    except StillhouseError as fault:
        print(f"error: {fault}", file=sys.stderr)
        raise typer.Exit(2) from fault
    if as_json:
        print(json.dumps(asdict(written)))
        return
    sizes = [shard.samples for shard in written.devices]
    height, width, depth = written.shape
    print(
        f"{out}: {len(sizes)} devices with {span(sizes)} samples of {height}x{width}x{depth}, "
        f"{written.heldout.samples:,} held out; the split is drawn in {out / 'split.png'}"
    )


def main() -> int:
    """Run the command line."""
    try:
        sys.argv[1:] = records.expanded(sys.argv[1:])  # typer.run reads sys.argv
    except StillhouseError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    typer.run(shards)
    return 0


if __name__ == "__main__":
    sys.exit(stopping.run(main))
