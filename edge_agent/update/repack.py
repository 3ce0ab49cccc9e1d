"""Turns the installed package into a package file again, for a way back without a network."""

import os
import shutil
import subprocess
from pathlib import Path

from edge_agent.update.install import ENVIRONMENT

_INFO = Path("/var/lib/dpkg/info")


def run(*command: str) -> str:
    """What a command prints.

    Raises:
        OSError: it fails.
    """
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command[0]} failed: {done.stderr.strip()[-400:]}")
    return done.stdout


def repack(name: str, out: Path) -> None:
    """Write a package file with the files, control fields and scripts that dpkg knows.

    File contents are taken as they are now. Files that dpkg does not list (bytecode) are left out.

    Args:
        name: the package's name.
        out: the file to write. The tree is built beside it, from hard links where possible.

    Raises:
        OSError: there is no room, a file is missing, or a tool fails; the message says which.
    """
    tree = out.with_name(out.name + ".tree")
    partial = out.with_name(out.name + ".new")
    shutil.rmtree(tree, ignore_errors=True)
    try:
        listed = [p for p in run("dpkg-query", "--listfiles", name).splitlines() if p[:1] == "/"]
        folders = {parent for path in listed for parent in Path(path).parents}
        for path in map(Path, listed):
            _place(path, tree / path.relative_to("/"), folder=path in folders)
        _control(name, tree / "DEBIAN")
        run("dpkg-deb", "--root-owner-group", "--uniform-compression", "-Zgzip", "-z1",
             "--build", str(tree), str(partial))  # fmt: skip
        partial.replace(out)
    except OSError as fault:
        raise OSError(
            f"{name} cannot be kept for a way back: {fault}; make room, or install it again"
        ) from fault
    finally:
        shutil.rmtree(tree, ignore_errors=True)
        partial.unlink(missing_ok=True)


def _place(source: Path, target: Path, *, folder: bool) -> None:
    # A folder of the package may be a link on this system: /opt on another disk, say.
    if folder or (source.is_dir() and not source.is_symlink()):
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        return
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _control(name: str, folder: Path) -> None:
    folder.mkdir(mode=0o755)
    fields, skipped = [], False
    for line in run("dpkg-query", "--status", name).splitlines():
        if not line.startswith(" "):
            skipped = line.partition(":")[0] in ("Status", "Conffiles")
        if line and not skipped:
            fields.append(line)
    (folder / "control").write_text("\n".join(fields) + "\n")
    for path in _INFO.glob(f"{name}.*"):
        if path.suffix != ".list":
            shutil.copy2(path, folder / path.suffix[1:])
