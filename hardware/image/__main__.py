"""Images to flash.

    python -m hardware.image build --base raspios-lite-arm64.img.xz --deb DEB --out fleet.img
    python -m hardware.image personalize fleet.img --device pi-3 --kit kits --out pi-3.img
    python -m hardware.image personalize /dev/sdX --device pi-3 --kit kits
    python -m hardware.image personalize /media/me/bootfs --device pi-3 --kit kits
    python -m hardware.image fleet devices.csv --image fleet.img --kit kits --out images

See docs/fleet.md.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from hardware.image import listing
from hardware.image.build import about, build
from hardware.image.disk import ImageError, run
from hardware.image.personal import (
    DEVICE,
    Identity,
    boot_of,
    personalize,
    read_devices,
    read_kit,
    write_kit,
)
from wire import records
from wire.errors import StillhouseError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after one line on what is wrong."""
    chosen = _parser().parse_args(arguments)
    before = os.umask(0o077)  # kits hold passwords
    try:
        match chosen.command:
            case "build":
                _build(chosen)
            case "personalize":
                _personalize(chosen)
            case "fleet":
                _fleet(chosen)
    except StillhouseError as fault:
        print(f"image: {fault}", file=sys.stderr)
        return 2
    finally:
        os.umask(before)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hardware.image",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("build", help="join a vendor's image and the package")
    one.add_argument("--base", type=Path, required=True, help="Raspberry Pi OS, .img or .img.xz")
    one.add_argument("--deb", type=Path, required=True, help="the package from `make deb`")
    one.add_argument("--out", type=Path, required=True, help="the image to write")
    one.add_argument("--fleet", default="", help="the fleet of all kits; default any")
    one.add_argument("--list", type=Path, help="write a list for Raspberry Pi Imager there")
    one.add_argument("--url", default="", help="address of the image in the list")
    one = commands.add_parser("personalize", help="write one device's kit to an image or a card")
    one.add_argument("target", type=Path, help="an image, a card's /dev/..., or where its boot "
                                               "partition is mounted")  # fmt: skip
    one.add_argument("--device", required=True, help="its name in the fleet")
    one.add_argument("--out", type=Path, help="write to a copy of the image there instead")
    _identity_options(one)
    one = commands.add_parser("fleet", help="personalize an image for each line of a CSV file")
    one.add_argument("devices", type=Path, help="columns: device, and any of "
                     + ", ".join(f.name for f in fields(Identity)[1:]))  # fmt: skip
    one.add_argument("--image", type=Path, required=True, help="the image from `build`")
    one.add_argument("--out", type=Path, required=True, help="folder to write")
    one.add_argument("--folders", action="store_true",
                     help="write no images, but a folder for each device, to be copied to the boot "
                          "partition of its card")  # fmt: skip
    one.add_argument("--list", type=Path, help="write a list for Raspberry Pi Imager there")
    one.add_argument("--url", default="", help="address of the images in the list")
    _identity_options(one)
    return parser


def _identity_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kit", type=Path, required=True, help="folder with DEVICE.toml, which "
                        "`orchestrator enroll --packaged` writes, and its PEM files")  # fmt: skip
    parser.add_argument("--wifi", default="", help="name of the Wi-Fi network")
    parser.add_argument("--wifi-password", default="", type=_secret,
                        help="its password; @FILE reads it from a file")  # fmt: skip
    parser.add_argument("--country", default="", help="country of the radio, two capitals")


def _secret(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text().rstrip("\n")
    except OSError as fault:
        raise argparse.ArgumentTypeError(f"{text[1:]}: {fault.strerror}") from fault


def _defaults(chosen: argparse.Namespace) -> dict[str, str]:
    return {
        f.name: getattr(chosen, f.name) for f in fields(Identity)[1:] if getattr(chosen, f.name)
    }


def _build(chosen: argparse.Namespace) -> None:
    image = build(chosen.base, chosen.deb, chosen.out, chosen.fleet)
    what = f"{image.system} with the agent {image.package}"
    print(f"{chosen.out}: {what}; next: personalize, or fleet")
    if chosen.list:
        listing.write(chosen.list, {"Stillhouse": (chosen.out, image)}, chosen.url)
        print(f"{chosen.list}: rpi-imager --repo {chosen.list}")


def _personalize(chosen: argparse.Namespace) -> None:
    table = {"device": chosen.device} | _defaults(chosen)
    identity = records.build(Identity, table, where=chosen.device, error=ImageError)
    if chosen.out:
        _copy(chosen.target, identity, chosen.kit, chosen.out)
    else:
        personalize(chosen.target, identity, chosen.kit)
    print(f"{chosen.out or chosen.target}: {identity.device}; host name {identity.hostname}")


def _copy(image: Path, identity: Identity, kit: Path, out: Path) -> None:
    """Write a copy of an image with a device's kit on it, all of it or nothing."""
    if not image.is_file():
        raise ImageError(f"{image}: no such image")
    if out.exists():
        raise ImageError(f"{out} is there already; nothing was written")
    if not out.parent.is_dir():
        raise ImageError(f"{out.parent}: no such folder")
    read_kit(identity, kit, about(boot_of(image), image).fleet)
    partial = out.with_name(out.name + ".partial")
    try:
        run(["cp", "--reflink=auto", "--sparse=always", str(image), str(partial)], str(out))
        partial.chmod(0o600)  # it will hold a password
        personalize(partial, identity, kit)
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)


def _fleet(chosen: argparse.Namespace) -> None:
    image = about(boot_of(chosen.image), chosen.image)
    devices = read_devices(chosen.devices, _defaults(chosen))
    for identity in devices:
        read_kit(identity, chosen.kit, image.fleet)
    taken = [each.device for each in devices if _place(chosen, each).exists()]
    if taken:
        raise ImageError(f"{chosen.out}: has {', '.join(taken)} already; nothing was written")
    try:
        chosen.out.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ImageError(f"{chosen.out}: {fault.strerror}") from fault
    if not chosen.folders:
        _check_space(chosen.image, chosen.out, len(devices))
    images = {}
    for identity in devices:
        place = _place(chosen, identity)
        if chosen.folders:
            write_kit(place / DEVICE, identity, chosen.kit, image.fleet)
        else:
            _copy(chosen.image, identity, chosen.kit, place)
            images[identity.device] = (place, image)
    print(f"{chosen.out}: {len(devices)} devices")
    if chosen.list and images:
        listing.write(chosen.list, images, chosen.url)
        print(f"{chosen.list}: rpi-imager --repo {chosen.list}")


def _place(chosen: argparse.Namespace, identity: Identity) -> Path:
    out: Path = chosen.out
    return out / (identity.device if chosen.folders else f"{identity.device}.img")


def _check_space(image: Path, out: Path, number: int) -> None:
    """Raise ImageError unless so many copies fit, even if their blocks are not shared."""
    needed, free = number * image.stat().st_blocks * 512, shutil.disk_usage(out).free
    if needed > free:
        raise ImageError(
            f"{out}: {number} images take {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free; "
            "--folders writes only what differs, for cards that all hold the same image"
        )


if __name__ == "__main__":
    sys.exit(main())
