"""A list of images for Raspberry Pi Imager: its `os_list`, with sizes and checksums.

The fields of an entry follow the schema in Imager's repository (doc/json-schema).
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hardware.image.build import About
from hardware.image.disk import ImageError

BOARDS = ("pi5-64bit", "pi4-64bit", "pi3-64bit")
ICON = "https://downloads.raspberrypi.com/raspios_armhf/Raspberry_Pi_OS_(32-bit).png"


def write(path: Path, images: Mapping[str, tuple[Path, About]], base_url: str) -> None:
    """Write the list.

    Args:
        path: the JSON file to write.
        images: for each name that Imager shows, the file and its description.
        base_url: where the files can be downloaded; empty: they are read from this machine.

    Raises:
        ImageError: the list cannot be written.
    """
    entries = [_entry(name, *image, base_url) for name, image in images.items()]
    try:
        path.write_text(json.dumps({"os_list": entries}, indent=1) + "\n")
    except OSError as fault:
        raise ImageError(f"{path}: {fault.strerror}") from fault


def _entry(name: str, image: Path, about: About, base_url: str) -> dict[str, Any]:
    with image.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    stat = image.stat()
    url = f"{base_url.rstrip('/')}/{image.name}" if base_url else image.resolve().as_uri()
    return {
        "name": name,
        "description": f"{about.system} with the Stillhouse edge agent {about.package}",
        "icon": ICON,
        "url": url,
        "extract_size": stat.st_size,
        "extract_sha256": digest,
        "image_download_size": stat.st_size,
        "release_date": datetime.fromtimestamp(stat.st_mtime, UTC).date().isoformat(),
        "devices": BOARDS,
        "init_format": about.init_format,
    }
