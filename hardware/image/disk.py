"""The two file systems of a Raspberry Pi OS image or card: FAT to boot from, ext4 for the rest.

sfdisk reads the partition table; mtools and debugfs work on FAT and ext4 at their offsets in the
file or block device. Nothing is mounted.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from wire.errors import StillhouseError

TOOLS = {"sfdisk": "fdisk", "mcopy": "mtools", "mdir": "mtools", "debugfs": "e2fsprogs"}
# Debian keeps some of them here, outside many users' path.
SYSTEM = "/usr/sbin:/sbin"
FAT, LINUX = ("b", "c", "e"), ("83",)  # partition types of a DOS label


class ImageError(StillhouseError):
    """An image, a card or a kit that cannot be used."""


class Boot(Protocol):
    """A boot partition, wherever it is; names are relative to it, with `/` between folders."""

    def read(self, name: str) -> bytes | None:
        """A file's content; None if it does not exist, ImageError if it cannot be read."""

    def put(self, folder: Path) -> None:
        """Copy the content of a folder, with its sub-folders, over what is there."""

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content; it need not exist."""

    def rename(self, name: str, new: str) -> None:
        """Rename a file or a folder; nothing may have the new name yet."""

    def free(self) -> int:
        """How many bytes are free."""


@dataclass(frozen=True)
class FatBoot:
    """A FAT file system in an image or on a card, through mtools.

    Attributes:
        path: the image or block device.
        offset: where the file system begins in it, in bytes.
    """

    path: Path
    offset: int

    @property
    def _at(self) -> list[str]:
        return ["-i", f"{self.path}@@{self.offset}"]

    def read(self, name: str) -> bytes | None:
        """See `Boot`."""
        with tempfile.TemporaryDirectory(prefix="stillhouse-boot-") as folder:
            copy = Path(folder) / "file"
            done = _tried(["mcopy", *self._at, f"::/{name}", str(copy)])
            if done.returncode == 0:
                return copy.read_bytes()
            if done.stderr.strip().endswith("not found"):
                return None
            raise ImageError(f"{self.path}: its boot partition cannot be read: "
                             f"{done.stderr.strip()[-300:]}")  # fmt: skip

    def put(self, folder: Path) -> None:
        """See `Boot`."""
        for each in sorted(folder.iterdir()):
            command = ["mcopy", *self._at, "-s", "-Q", "-D", "o", str(each), "::/"]
            run(command, f"{self.path}: its boot partition")

    def remove(self, name: str) -> None:
        """See `Boot`."""
        if _tried(["mdir", *self._at, "-b", f"::/{name}"]).returncode == 0:
            run(["mdeltree", *self._at, f"::/{name}"], f"{self.path}: its boot partition")

    def rename(self, name: str, new: str) -> None:
        """See `Boot`."""
        run(["mmove", *self._at, f"::/{name}", f"::/{new}"], f"{self.path}: its boot partition")

    def free(self) -> int:
        """See `Boot`."""
        listing = run(["mdir", *self._at, "::/"], f"{self.path}: its boot partition")
        match = re.search(r"([\d ]+) bytes free", listing)
        return int(match[1].replace(" ", "")) if match else 0


@dataclass(frozen=True)
class MountedBoot:
    """A mounted boot partition; desktops mount a card when it is inserted."""

    path: Path

    def read(self, name: str) -> bytes | None:
        """See `Boot`."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as fault:
            raise ImageError(f"{self.path}: cannot be read: {fault}") from fault

    def put(self, folder: Path) -> None:
        """See `Boot`."""
        try:
            shutil.copytree(folder, self.path, dirs_exist_ok=True, copy_function=shutil.copyfile)
            os.sync()
        except OSError as fault:  # shutil.Error is one
            raise ImageError(f"{self.path}: cannot be written: {fault}") from fault

    def remove(self, name: str) -> None:
        """See `Boot`; contents are overwritten first, as far as the card allows."""
        doomed = self.path / name
        try:
            for path in [doomed, *doomed.rglob("*")]:
                if path.is_file():
                    with path.open("r+b") as file:
                        file.write(b"\0" * path.stat().st_size)
            os.sync()
            if doomed.is_dir():
                shutil.rmtree(doomed)
            doomed.unlink(missing_ok=True)
        except OSError as fault:
            raise ImageError(f"{self.path}: cannot be written: {fault}") from fault

    def rename(self, name: str, new: str) -> None:
        """See `Boot`."""
        try:
            (self.path / name).rename(self.path / new)
            os.sync()
        except OSError as fault:
            raise ImageError(f"{self.path}: cannot be written: {fault}") from fault

    def free(self) -> int:
        """See `Boot`."""
        return shutil.disk_usage(self.path).free


@dataclass(frozen=True)
class Root:
    """The ext4 file system of an image, through debugfs.

    Attributes:
        path: the image or block device.
        offset: where the file system begins in it, in bytes.
    """

    path: Path
    offset: int

    def read(self, name: str) -> bytes | None:
        """A file's content; None if it does not exist."""
        with tempfile.TemporaryDirectory(prefix="stillhouse-root-") as folder:
            copy = Path(folder) / "file"
            self._debugfs([f"dump {name} {copy}"])
            return copy.read_bytes() if copy.exists() else None

    def exists(self, name: str) -> bool:
        """Whether there is such a file, folder or link."""
        return "Inode:" in self._debugfs([f"stat {name}"])

    def write(self, name: str, content: bytes, mode: int) -> None:
        """Write a file that belongs to root, over an older one if there is one.

        Raises:
            ImageError: the file system is full, damaged, or was not cleanly unmounted.
        """
        folder, _, _ = name.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="stillhouse-root-") as scratch:
            source = Path(scratch) / "file"
            source.write_bytes(content)
            output = self._debugfs(
                [
                    *(f"mkdir {parent}" for parent in _parents(folder) if not self.exists(parent)),
                    *([f"rm {name}"] if self.exists(name) else []),
                    f"write {source} {name}",
                    f"sif {name} mode 0{0o100000 | mode:o}",
                    f"sif {name} uid 0",
                    f"sif {name} gid 0",
                ],
                write=True,
            )
        if self.read(name) != content:
            raise ImageError(
                f"{self.path}: {name} cannot be written to its root file system, which is full or "
                f"damaged; debugfs said: {output.strip()[-300:]}"
            )

    def link(self, name: str, target: str) -> None:
        """Make a symbolic link, unless something has its name already."""
        if not self.exists(name):
            self._debugfs([f"symlink {name} {target}"], write=True)
        if not self.exists(name):
            raise ImageError(f"{self.path}: {name} cannot be linked in its root file system")

    def _debugfs(self, commands: Sequence[str], *, write: bool = False) -> str:
        at = f"{self.path}?offset={self.offset}"
        done = _tried(["debugfs", *(["-w"] if write else []), "-f", "-", at], commands)
        if "Could not open" in done.stderr:
            raise ImageError(
                f"{self.path}: its second partition is not an ext4 file system that can be read: "
                f"{done.stderr.strip()[-300:]}"
            )
        return done.stdout + done.stderr


def _parents(folder: str) -> list[str]:
    """A folder's parents and itself: `/a/b` gives /a, /a/b."""
    parts = folder.strip("/").split("/")
    return ["/" + "/".join(parts[: n + 1]) for n in range(len(parts))]


def open_disk(path: Path) -> tuple[FatBoot, Root]:
    """The boot partition and the root file system of an image or a card.

    Raises:
        ImageError: a tool or the file is missing, a partition is mounted, or its partitions are
            not those of a Raspberry Pi OS image (FAT, then Linux).
    """
    require_tools()
    if not path.exists():
        raise ImageError(f"{path}: no such image or card")
    if not os.access(path, os.R_OK):
        raise ImageError(f"{path}: this user may not read it; write a card as root: "
                         "sudo .venv/bin/python -m hardware.image ...")  # fmt: skip
    _refuse_mounted(path)
    done = _tried(["sfdisk", "--json", str(path)])
    expected = "expected an image of Raspberry Pi OS: a DOS partition table, a FAT partition to "
    expected += "boot from, then one of Linux"
    if done.returncode:
        raise ImageError(f"{path}: {expected}; sfdisk: {done.stderr.strip()[-200:]}")
    table = json.loads(done.stdout)["partitiontable"]
    sector, partitions = int(table.get("sectorsize", 512)), table.get("partitions", [])
    kinds = [str(each["type"]).lower() for each in partitions]
    if len(kinds) < 2 or kinds[0] not in FAT or kinds[1] not in LINUX:
        shown = ", ".join(kinds) or "none"
        raise ImageError(f"{path}: {expected}; it has partitions of types {shown}. For a card name "
                         "the whole device, /dev/sdX or /dev/mmcblk0")  # fmt: skip
    size = path.stat().st_size
    end = (partitions[1]["start"] + partitions[1]["size"]) * sector
    if path.is_file() and end > size:
        raise ImageError(
            f"{path}: cut short: {size:,} bytes, its partitions end at {end:,}; download it again"
        )
    boot, root = (int(each["start"]) * sector for each in partitions[:2])
    return FatBoot(path, boot), Root(path, root)


def _refuse_mounted(path: Path) -> None:
    if not path.is_block_device():
        return
    for line in Path("/proc/mounts").read_text().splitlines():
        device, where = line.split()[:2]
        if device.startswith(str(path.resolve())):
            raise ImageError(
                f"{path}: {device} is mounted at {where}; unmount it, or name {where} if that is "
                "its boot partition"
            )


def require_tools() -> None:
    """Raise ImageError if tools are missing; the message says how to install them."""
    path = f"{os.environ.get('PATH', '/usr/bin:/bin')}:{SYSTEM}"
    missing = sorted({of for tool, of in TOOLS.items() if shutil.which(tool, path=path) is None})
    if missing:
        raise ImageError(f"tools are missing: sudo apt install {' '.join(missing)}")


def run(command: Sequence[str], what: str) -> str:
    """Standard output of a command; if it fails, ImageError with the last it printed."""
    done = _tried(command)
    if done.returncode:
        printed = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise ImageError(f"{what}: {command[0]} failed: {printed[-300:]}")
    return done.stdout


def _tried(command: Sequence[str], lines: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
    environment = {
        "PATH": f"{os.environ.get('PATH', '/usr/bin:/bin')}:{SYSTEM}",
        "LC_ALL": "C.UTF-8",
        # mtools expects a FAT's size to fit its track layout, but a card's FAT may not.
        "MTOOLS_SKIP_CHECK": "1",
    }
    return subprocess.run(
        command,
        input="".join(f"{line}\n" for line in lines),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
