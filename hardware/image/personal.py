"""`personalize`: one device's kit, onto the boot partition of an image, a card, or a mounted one.

A kit is the settings file that `orchestrator enroll DEVICE --packaged` writes, DEVICE.toml, and the
PEM files that it names, by their names under /etc/stillhouse; all lie in one folder.
"""

import csv
import re
import shutil
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hardware.image.build import FOLDER, About, about
from hardware.image.disk import Boot, ImageError, MountedBoot, open_disk
from ondevice.config import AgentConfig
from wire import records, topics

TARGET = Path("/etc/stillhouse")
PEM = ("ca_file", "cert_file", "key_file")
DEVICE = f"{FOLDER}/device"  # on the boot partition
KIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Identity:
    """Which device, and how it comes onto the network: a line of devices.csv.

    Attributes:
        device: the name it is enrolled under; `_` and `.` become `-` in its host's name.
        wifi, wifi_password: network and its WPA password, empty for an open one.
        country: two letters, without which a Raspberry Pi's radio stays off.
    """

    device: str
    wifi: str = ""
    wifi_password: str = field(default="", repr=False)
    country: str = ""

    def __post_init__(self) -> None:
        topics.check_name(self.device, "device name")
        if bool(self.wifi) != bool(self.country):
            raise ValueError("wifi and country: one wants the other, or a Pi's radio stays off")
        if len(self.wifi.encode()) > 32 or not self.wifi.isprintable():
            raise ValueError(f"wifi {self.wifi!r}: expected a name of 1 to 32 bytes")
        secret = self.wifi_password
        if secret and not re.fullmatch(r"[ -~]{8,63}|[0-9A-Fa-f]{64}", secret):
            raise ValueError("wifi_password: expected 8 to 63 ASCII characters, or 64 hex digits")
        if self.wifi_password and not self.wifi:
            raise ValueError("wifi_password: of which network? wifi is empty")
        if self.country and not re.fullmatch(r"[A-Z]{2}", self.country):
            raise ValueError(f"country {self.country!r}: expected two capitals, DE or US, say")

    @property
    def hostname(self) -> str:
        """The device's host name, as RFC 1123 has it."""
        return re.sub(r"[^A-Za-z0-9-]+", "-", self.device)[:63].strip("-").lower()


def boot_of(target: Path) -> Boot:
    """The boot partition of an image or a card, or one that is mounted in a folder.

    Raises:
        ImageError: it is none of them.
    """
    return MountedBoot(target) if target.is_dir() else open_disk(target)[0]


def personalize(target: Path, identity: Identity, kit: Path) -> About:
    """Write a device's kit, which counts when all of it is there.

    Args:
        target: an image of `build`, a card that it was written to, or the folder that the card's
            boot partition is mounted in.
        identity: the device.
        kit: folder of DEVICE.toml and of the files it names.

    Returns:
        What the image says of itself.

    Raises:
        ImageError: the target is none of these or has no room, or holds another kit that is not
            mounted, or the kit is damaged or of another device or fleet.
    """
    boot = boot_of(target)
    made = about(boot, target)
    if not isinstance(boot, MountedBoot) and boot.read(f"{DEVICE}/hostname") is not None:
        # A FAT keeps what is deleted until it is overwritten, and that was a password.
        raise ImageError(
            f"{target}: holds a device's kit already; begin with the image that `build` made, or "
            "mount the card's boot partition and name that folder"
        )
    with TemporaryDirectory(prefix="stillhouse-kit-") as scratch:
        write_kit(Path(scratch) / f"{DEVICE}.new", identity, kit, made.fleet)
        if boot.free() < KIT_BYTES:
            raise ImageError(f"{target}: its boot partition has {boot.free():,} bytes free, "
                             f"{KIT_BYTES:,} wanted")  # fmt: skip
        boot.remove(f"{DEVICE}.new")
        boot.put(Path(scratch))
        boot.remove(DEVICE)
        boot.rename(f"{DEVICE}.new", DEVICE)
    return made


def write_kit(folder: Path, identity: Identity, kit: Path, fleet: str) -> None:
    """Write the files that first-boot expects.

    Args:
        folder: that they go to, `stillhouse/device` of a boot partition; it is made.
        identity: the device.
        kit: see `personalize`.
        fleet: that the kit must be of; empty: any.

    Raises:
        ImageError: the kit is damaged, or of another device or fleet.
    """
    files = read_kit(identity, kit, fleet)
    etc = folder / "etc"
    etc.mkdir(parents=True)
    for name, source in files.items():
        shutil.copyfile(source, etc / name)
    texts = {"hostname": identity.hostname}
    if identity.wifi:
        texts |= {"wifi.nmconnection": _connection(identity), "country": identity.country}
    for name, text in texts.items():
        (folder / name).write_text(text.rstrip("\n") + "\n")


def read_kit(identity: Identity, kit: Path, fleet: str) -> dict[str, Path]:
    """The files of a device's kit by their names in /etc/stillhouse, all of them checked.

    Raises:
        ImageError: as `write_kit`.
    """
    path = kit / f"{identity.device}.toml"
    try:
        table = tomllib.loads(path.read_text())
    except OSError as fault:
        raise ImageError(
            f"{path}: {fault.strerror}; it comes of: orchestrator enroll {identity.device} "
            f"--packaged --out {path}"
        ) from fault
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise ImageError(f"{path}: not TOML: {fault}") from fault
    files = {"agent.toml": path} | _pem_files(table, path)
    config = records.build(AgentConfig, table, where=str(path), error=ImageError)
    if config.device != identity.device:
        raise ImageError(f"{path}: a kit of {config.device}, but {identity.device} was asked for")
    if fleet and config.fleet != fleet:
        raise ImageError(f"{path}: a kit of the fleet {config.fleet}, but the image is of {fleet}")
    if not config.state.is_absolute() or not config.data.is_absolute():
        raise ImageError(
            f"{path}: data and state must be absolute on the device; enroll with --packaged"
        )
    return files


def _pem_files(table: dict[str, Any], path: Path) -> dict[str, Path]:
    """The files that a broker's table names, which is changed to name them where they are now."""
    broker = table.get("broker")
    found: dict[str, Path] = {}
    if not isinstance(broker, Mapping):
        return found
    for key in PEM:
        if not broker.get(key):
            continue
        named = Path(str(broker[key]))
        if named.parent != TARGET or not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.\w+", named.name):
            raise ImageError(
                f"{path}: broker: {key}: expected a file in {TARGET} with a plain name, got {named}"
            )
        source = path.parent / named.name
        if not source.is_file():
            raise ImageError(f"{path}: broker: {key}: no {source} to go with it")
        found[named.name] = source
        table["broker"] = table["broker"] | {key: str(source)}
    return found


def _connection(identity: Identity) -> str:
    """A NetworkManager keyfile; in the network's name it wants `;` escaped as well."""
    name = _escaped(identity.wifi.replace(";", "\\;"))
    lines = ["[connection]", "id=stillhouse", f"uuid={uuid.uuid4()}", "type=wifi", "", "[wifi]",
             "mode=infrastructure", f"ssid={name}"]  # fmt: skip
    if identity.wifi_password:
        psk = _escaped(identity.wifi_password)
        lines += ["", "[wifi-security]", "key-mgmt=wpa-psk", f"psk={psk}"]
    return "\n".join([*lines, "", "[ipv4]", "method=auto", "", "[ipv6]", "method=auto"])


def _escaped(text: str) -> str:
    r"""As GLib's key files have it: backslashes doubled, a space in front as `\s`."""
    doubled = text.replace("\\", "\\\\")
    return f"\\s{doubled[1:]}" if doubled.startswith(" ") else doubled


def read_devices(path: Path, defaults: Mapping[str, str]) -> list[Identity]:
    """The devices of a CSV file with a column `device`, and others of `Identity` at will.

    A line that names a network has its own password, or none.

    Args:
        path: the file; its first line names the columns.
        defaults: values where a column is missing or empty.

    Raises:
        ImageError: a column is unknown, a name is odd or there twice; the message has the line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or [])
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise ImageError(f"{path}: cannot be read: {fault}") from fault
    known = [column.name for column in fields(Identity)]
    if "device" not in columns or set(columns) - set(known):
        raise ImageError(f"{path}: expected columns out of {', '.join(known)}; got "
                         f"{', '.join(columns) or 'none'}")  # fmt: skip
    found: dict[str, Identity] = {}
    for number, row in rows:
        where = f"{path}, line {number}"
        if None in row or None in row.values():
            raise ImageError(f"{where}: expected {len(columns)} values")
        own = {key: value for key, value in row.items() if value}
        table = {k: v for k, v in defaults.items() if k != "wifi_password" or "wifi" not in own}
        table |= own
        identity = records.build(Identity, table, where=where, error=ImageError)
        if identity.device in found:
            raise ImageError(f"{where}: {identity.device} is there twice")
        found[identity.device] = identity
    if not found:
        raise ImageError(f"{path}: no devices in it")
    hosts = {each.hostname: each.device for each in reversed(found.values())}
    for each in found.values():
        if hosts[each.hostname] != each.device:
            raise ImageError(f"{path}: {each.device} and {hosts[each.hostname]} have one host "
                             f"name, {each.hostname}")  # fmt: skip
    return list(found.values())
