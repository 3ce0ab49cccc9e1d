"""A package file of an agent version that was never released."""

import shutil
import subprocess
from pathlib import Path

import pytest

from wire import release


def unreleased(folder: Path) -> Path:
    """Build version 9 for arm64 and Python 3.11, with no files in it; skip without dpkg-deb."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not here to build one")
    control = folder / "tree/DEBIAN/control"
    control.parent.mkdir(parents=True)
    control.write_text(
        f"Package: {release.NAME}\nVersion: 9\nArchitecture: arm64\nMaintainer: x <x@x>\n"
        "Depends: python3.11\nDescription: x\n"
    )
    path = folder / "x.deb"
    command = ["dpkg-deb", "--build", str(folder / "tree"), str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path
