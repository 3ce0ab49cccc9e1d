"""Images in the layout of Raspberry Pi OS: a DOS table, FAT from 4 MiB on, then ext4."""

import json
import os
import shutil
import subprocess
from pathlib import Path

MIB = 1 << 20
START = 4 * MIB
TOOLS = ("sfdisk", "mformat", "mcopy", "mke2fs", "debugfs", "dpkg-deb")


def missing():
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [tool for tool in TOOLS if shutil.which(tool, path=path) is None]


def run(*command, **more):
    path = {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | path, **more
    )
    assert done.returncode == 0, f"{command[0]}: {done.stderr[-2000:]}"
    return done.stdout


def json_of(path):
    return json.loads(path.read_text())


def make(path, root, boot, *, boot_mib=48, root_mib=64, kinds=("c", "83"), root_type="ext4"):
    """Make an image of a root tree and a folder of boot files; all files belong to root."""
    sizes = (boot_mib * MIB, root_mib * MIB)
    ext4 = path.with_suffix(".root")
    with ext4.open("wb") as file:
        file.truncate(sizes[1])
    if root_type:
        run("mke2fs", "-q", "-t", root_type, "-E", "root_owner=0:0", "-d", str(root), str(ext4))
    with path.open("wb") as file:
        file.truncate(START + sum(sizes))
    starts = (START // 512, (START + sizes[0]) // 512)
    lines = [f"start={start}, size={size // 512}, type={kind}"
             for start, size, kind in zip(starts, sizes, kinds, strict=True)]  # fmt: skip
    run("sfdisk", "-q", str(path), input="label: dos\n" + "\n".join(lines) + "\n")
    at = f"{path}@@{START}"
    # A few dozen megabytes get a FAT16; a card's boot partition, over 256 MB, has a FAT32.
    fat = ["-F"] if boot_mib > 64 else []
    run("mformat", "-i", at, *fat, "-T", str(sizes[0] // 512), "-v", "bootfs", "::")
    for each in sorted(Path(boot).iterdir()):
        run("mcopy", "-i", at, "-s", str(each), "::/")
    with path.open("r+b") as file:
        file.seek(START + sizes[0])
        with ext4.open("rb") as source:
            shutil.copyfileobj(source, file, MIB)
    ext4.unlink()
    return path


def system(folder, *, python="3.11", architecture="arm64", units=True):
    """The parts of a Debian system that `build` reads, as in Raspberry Pi OS Bookworm."""
    status = "\n".join(
        f"Package: {name}\nStatus: install ok installed\nArchitecture: {architecture}\n"
        for name in (f"python{python}", "adduser", "libc6")
    )
    files = {
        "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n',
        "var/lib/dpkg/status": status,
        "usr/lib/raspberrypi-sys-mods/firstboot": "#!/bin/bash\n",
    }
    if units:
        files["etc/systemd/system/multi-user.target.wants/ssh.service"] = ""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def package(folder, *, architecture="arm64", name="stillhouse-edge-agent"):
    """A small package with the fields of the agent's."""
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    fields = {
        "Package": name,
        "Version": "0.1.0+py311",
        "Architecture": architecture,
        "Maintainer": "Stillhouse <maintainers@stillhouse.example>",
        "Depends": "python3.11, adduser, libc6 (>= 2.28)",
        "Description": "a test",
    }
    (tree / "DEBIAN/control").write_text("".join(f"{k}: {v}\n" for k, v in fields.items()))
    path = folder / f"{name}_0.1.0+py311_{architecture}.deb"
    run("dpkg-deb", "--root-owner-group", "--build", str(tree), str(path))
    return path
