"""Sign packages for updates over the air: `python -m hardware.release DEB ... --key KEY.pem`.

DEB.release.json is written beside each package; without it devices do not accept the package
(`wire/release.py`). The key is created if there is none; keep it off the orchestrator's computer.
Give the public key that is printed to the devices (`orchestrator enroll --release-key`, or
`[release] key` in run.toml).
"""

import argparse
import hashlib
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from edge_agent.update import install
from wire import records, release, signing
from wire.errors import ReleaseError, StillhouseError
from wire.release import Package


def describe(deb: Path) -> Package:
    """The description of a package file that is to be signed.

    Raises:
        ReleaseError: the file is not a package of the agent.
    """
    fields = {}
    try:
        for name in ("Package", "Version", "Architecture", "Depends"):
            fields[name] = subprocess.run(
                ["dpkg-deb", "--field", str(deb), name], capture_output=True, text=True, check=True
            ).stdout.strip()
        with deb.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = deb.stat().st_size
    except subprocess.CalledProcessError as fault:
        raise ReleaseError(f"{deb}: not a Debian package: {fault.stderr.strip()}") from fault
    except OSError as fault:
        raise ReleaseError(f"{fault.filename}: {fault.strerror}; nothing was signed") from fault
    python = re.search(r"\bpython(3\.[0-9]+)\b", fields["Depends"])
    if fields["Package"] != release.NAME or not python:
        raise ReleaseError(
            f"{deb}: expected a package {release.NAME} of make deb, got {fields['Package']!r}"
        )
    table = {
        "name": release.NAME,
        "version": fields["Version"],
        "architecture": fields["Architecture"],
        "python": python[1],
        "size": size,
        "sha256": digest,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return records.build(Package, table, where=str(deb), error=ReleaseError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Sign; return 0, or 2 after one line on what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m hardware.release", description=__doc__)
    parser.add_argument("debs", type=Path, nargs="+", metavar="DEB")
    parser.add_argument("--key", type=Path, required=True, help="PEM; created if missing")
    chosen = parser.parse_args(arguments)
    try:
        packages = [describe(deb) for deb in chosen.debs]
        key = signing.own_key(chosen.key)
        for deb, package in zip(chosen.debs, packages, strict=True):
            path = release.beside(deb)
            install.write(path, release.dump(release.sign(key, package)))
            print(f"{path}: {package.version}, {package.architecture}, Python {package.python}")
    except (StillhouseError, OSError) as fault:
        print(f"release: {fault}", file=sys.stderr)
        return 2
    print(f'release_key = "{signing.public(key)}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
