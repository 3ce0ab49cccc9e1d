"""`build`: joins a vendor's image and the package into one image for the whole fleet."""

import json
import lzma
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from hardware import deb
from hardware.image.disk import Boot, ImageError, Root, open_disk, run
from wire import records, topics

FILES = Path(__file__).parent
FOLDER = "stillhouse"  # on the boot partition
UNIT = "stillhouse-first-boot.service"
SCRIPT = "/usr/local/lib/stillhouse/first-boot"
SPARE = 4 << 20  # bytes of the boot partition to leave free for kits, and for booting


@dataclass(frozen=True)
class About:
    """An image's description, in `stillhouse/image.json` on its boot partition.

    Attributes:
        base: the file it was built from.
        system: PRETTY_NAME in its /etc/os-release.
        package: version of the agent's package.
        fleet: its devices belong to this fleet; empty: any.
        init_format: how Raspberry Pi Imager customizes it.
    """

    base: str
    system: str
    package: str
    fleet: str = ""
    init_format: Literal["systemd", "cloudinit-rpi", "none"] = "none"


def about(boot: Boot, where: Path) -> About:
    """The description on an image or card.

    Raises:
        ImageError: it was not built by `build`.
    """
    text = boot.read(f"{FOLDER}/image.json")
    if text is None:
        raise ImageError(
            f"{where}: not an image that `python -m hardware.image build` made: no "
            f"{FOLDER}/image.json on its boot partition"
        )
    try:
        table = json.loads(text)
    except ValueError as fault:
        raise ImageError(f"{where}: {FOLDER}/image.json is damaged: {fault}") from fault
    return records.build(About, table, where=f"{where}: {FOLDER}/image.json", error=ImageError)


def build(base: Path, package: Path, out: Path, fleet: str = "") -> About:
    """Write an image for the fleet; the base is only read.

    Args:
        base: an image of Raspberry Pi OS, 64-bit, Bookworm or Trixie; .img or .img.xz.
        package: the agent's, for the same system.
        out: the image to write.
        fleet: the fleet that kits must belong to; empty: any.

    Raises:
        ImageError: the base is not such an image, or does not fit this package; its boot partition
            is too small; `out` exists already. Nothing half-written stays.
    """
    _check(base, package, out, fleet)
    fields = _fields(package)
    partial = out.with_name(out.name + ".partial")
    try:
        _copy(base, partial)
        boot, root = open_disk(partial)
        system = _suits(root, base, package, fields)
        needed, free = package.stat().st_size + SPARE, boot.free()
        if free < needed:
            raise ImageError(
                f"{base}: its boot partition is too small: {free:,} bytes are free, {needed:,} "
                "are needed; take an image whose first partition has 512 MB, as those since "
                "Bookworm"
            )
        init_format = _init_format(root)
        description = About(base.name, system, fields["Version"], fleet, init_format)
        _write(boot, root, package, description)
        partial.chmod(0o644)  # it holds no kit, so all may read it
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    return description


def _check(base: Path, package: Path, out: Path, fleet: str) -> None:
    for path, what in ((base, "image"), (package, "package")):
        if not path.is_file():
            raise ImageError(f"{path}: no such {what}")
    if out.exists():
        raise ImageError(f"{out} is there already; nothing was written")
    if not out.parent.is_dir():
        raise ImageError(f"{out.parent}: no such folder")
    if fleet:
        try:
            topics.check_name(fleet, "fleet name")
        except ValueError as fault:
            raise ImageError(str(fault)) from fault


def _fields(package: Path) -> dict[str, str]:
    """The control fields of the agent's package."""
    control = run(["dpkg-deb", "--field", str(package)], f"{package}: not a Debian package")
    fields = dict(re.findall(r"(?m)^([\w-]+): (.*)$", control))
    if fields.get("Package") != deb.NAME:
        raise ImageError(
            f"{package}: expected the package {deb.NAME}, got {fields.get('Package')}; make deb"
        )
    return fields


def _copy(base: Path, to: Path) -> None:
    """Copy an image, with holes in place of zeros; a packed one is unpacked."""
    if base.suffix != ".xz":
        run(["cp", "--reflink=auto", "--sparse=always", str(base), str(to)], f"{base}")
        return
    try:
        with lzma.open(base) as packed, to.open("wb") as file:
            for block in iter(lambda: packed.read(1 << 20), b""):
                if block.count(0) == len(block):
                    file.seek(len(block), 1)
                else:
                    file.write(block)
            file.truncate()
    except (lzma.LZMAError, EOFError) as fault:
        raise ImageError(f"{base}: cannot be unpacked: {fault}; download it again") from fault
    except OSError as fault:
        raise ImageError(f"{base} to {to}: {fault.strerror}") from fault


def _suits(root: Root, base: Path, package: Path, fields: dict[str, str]) -> str:
    """The system's name; ImageError unless the package can be installed without a network."""
    release = (root.read("/etc/os-release") or root.read("/usr/lib/os-release") or b"").decode()
    name = re.search(r'(?m)^PRETTY_NAME="?([^"\n]*)', release)
    status = (root.read("/var/lib/dpkg/status") or b"").decode(errors="replace")
    if not name or not status:
        raise ImageError(
            f"{base}: expected an image of Raspberry Pi OS; its second partition holds no Debian "
            "system"
        )
    system, installed, target = name[1], set(_installed(status)), fields["Architecture"]
    if ("libc6", target) not in installed:
        known = ", ".join(sorted(of for name, of in installed if name == "libc6"))
        raise ImageError(
            f"{base}: {system} for {known or 'an unknown machine'}, but {package.name} is for "
            f"{target}; take the 64-bit image"
        )
    needed = [re.split(r"[ (|:]", each.strip())[0] for each in fields["Depends"].split(",")]
    missing = [each for each in needed if not {(each, target), (each, "all")} & installed]
    if missing:
        pythons = [each for each, _ in installed if re.fullmatch(r"python3\.\d+", each)]
        hint = f"; it has {pythons[0]}: make deb TARGET_PYTHON={pythons[0][6:]}" if pythons else ""
        raise ImageError(
            f"{base}: {system} has no {', '.join(missing)}, which {package.name} needs{hint}"
        )
    return system


def _installed(status: str) -> Iterator[tuple[str, str]]:
    """Names and architectures of the packages that dpkg has installed."""
    for entry in status.split("\n\n"):
        fields = dict(re.findall(r"(?m)^(Package|Status|Architecture): (.*)$", entry))
        if fields.get("Status", "").endswith(" installed"):
            yield fields["Package"], fields.get("Architecture", "")


def _init_format(root: Root) -> Literal["systemd", "cloudinit-rpi", "none"]:
    if root.exists("/usr/bin/cloud-init"):
        return "cloudinit-rpi"
    return "systemd" if root.exists("/usr/lib/raspberrypi-sys-mods") else "none"


def _write(boot: Boot, root: Root, package: Path, description: About) -> None:
    root.write(SCRIPT, (FILES / "first-boot").read_bytes(), 0o755)
    root.write(f"/etc/systemd/system/{UNIT}", (FILES / UNIT).read_bytes(), 0o644)
    wants = "/etc/systemd/system/multi-user.target.wants"
    if not root.exists(wants):
        base = description.base
        raise ImageError(f"{base}: its system has no {wants}; expected one with systemd")
    root.link(f"{wants}/{UNIT}", f"/etc/systemd/system/{UNIT}")
    with TemporaryDirectory(prefix="stillhouse-image-") as scratch:
        folder = Path(scratch) / FOLDER
        folder.mkdir()
        shutil.copyfile(package, folder / package.name)
        text = json.dumps(records.plain(description), indent=1) + "\n"
        (folder / "image.json").write_text(text)
        boot.put(Path(scratch))
    _verify(boot, package)


def _verify(boot: Boot, package: Path) -> None:
    if boot.read(f"{FOLDER}/{package.name}") != package.read_bytes():
        raise ImageError(f"{package.name} cannot be read back from the boot partition")
