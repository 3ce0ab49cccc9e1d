"""The edge agent as a Debian package: `python -m hardware.deb --arch arm64 --python 3.11`.

The package installs a separate Python environment under /opt/stillhouse: a link to the system's
interpreter, the agent, the published wheels of its dependencies for the target (in the versions of
`constraints.txt`), and the artifact that `edge-agent measure` measures by default. No machine code
is compiled, here or on the device, so any machine with dpkg-deb and the environment of `make`
builds for all targets. A package is for one Python: 3.11 for Debian 12 and Raspberry Pi OS
Bookworm, 3.12 for Ubuntu 24.04, 3.13 for Debian 13 and Trixie. armhf is not supported, because
ONNX Runtime has no wheels for it.
"""

import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from email.utils import formatdate
from importlib import metadata
from pathlib import Path

from wire import __version__, records, release
from wire.errors import StillhouseError
from wire.release import Build

ROOT = Path(__file__).parent.parent
FILES = Path(__file__).parent / "package"
NAME = release.NAME
UNITS = (f"{NAME}.service", "stillhouse-update.path", "stillhouse-update.service")
MAINTAINER = "Stillhouse <maintainers@stillhouse.example>"
OURS = ("edge_agent", "ondevice", "wire")
MACHINES = {"arm64": "aarch64", "amd64": "x86_64"}
PYTHONS = ("3.11", "3.12", "3.13")
# What the agent imports, and no more: ONNX Runtime requires sympy and others only for its tools.
WHEELS = ("cffi", "cryptography", "msgpack", "numpy", "onnxruntime", "paho-mqtt", "pillow",
          "protobuf", "safetensors", "threadpoolctl", "zstandard")  # fmt: skip
DEPENDS = ("adduser", "libc6 (>= 2.28)", "libstdc++6", "libgcc-s1")
# Files that the agent does not need: tests, stubs, headers, tools to build and test other packages,
# a second copy of ONNX Runtime for C programs, and a second backend of zstandard.
PRUNED = ("**/tests", "**/*.pyi", "numpy/_core/include", "numpy/_core/lib/*.a", "numpy/f2py",
          "numpy/distutils", "numpy/testing/print_coercion_tables.py", "onnxruntime/transformers",
          "onnxruntime/quantization", "onnxruntime/tools", "onnxruntime/datasets",
          "onnxruntime/backend", "onnxruntime/capi/libonnxruntime.so.*", "zstandard/_cffi.*",
          "zstandard/backend_cffi.py", "bin")  # fmt: skip


class PackageError(StillhouseError):
    """The package cannot be built."""


def build(architecture: str, python: str, out: Path) -> Path:
    """Build the package; return its path.

    Args:
        architecture: "arm64" or "amd64".
        python: the target's version, "3.11".
        out: the folder for the .deb.

    Raises:
        PackageError: a wheel is missing for the target, or a tool fails; the message quotes it.
    """
    if shutil.which("dpkg-deb") is None:
        raise PackageError("dpkg-deb is missing: sudo apt install dpkg")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stillhouse-deb-") as scratch:
        tree = Path(scratch) / "tree"
        site = tree / f"opt/stillhouse/lib/python{python}/site-packages"
        _install_wheels(site, architecture, python)
        for package in OURS:
            shutil.copytree(
                ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__")
            )
        _environment(tree / "opt/stillhouse", Build(_version(python), architecture, python))
        measured_artifact(tree / "opt/stillhouse/share/stillhouse/resnet8")
        for unit in UNITS:
            _put(tree / "usr/lib/systemd/system" / unit, FILES / unit)
        _put(tree / f"usr/share/lintian/overrides/{NAME}", FILES / "lintian-overrides")
        _compressed(
            tree / "usr/share/man/man1/edge-agent.1.gz", (FILES / "edge-agent.1").read_bytes()
        )
        _documents(tree / f"usr/share/doc/{NAME}", _version(python))
        _link(tree / "usr/bin/edge-agent", "/opt/stillhouse/bin/edge-agent")
        (tree / "etc/stillhouse").mkdir(parents=True)
        _control(tree, architecture, python)
        return _pack(tree, out / f"{NAME}_{_version(python)}_{architecture}.deb")


def _version(python: str) -> str:
    """The package's version; it names the Python, so that a package replaces one for the same."""
    return f"{__version__}+py{python.replace('.', '')}"


def _install_wheels(site: Path, architecture: str, python: str) -> None:
    machine = MACHINES[architecture]
    pinned = _pinned(WHEELS)
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(36, 16, -1)]
    platforms += [f"manylinux2014_{machine}"]
    _run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary=:all:", "--no-compile", "--target", str(site)),
            *("--implementation", "cp", "--python-version", python),
            *("--abi", f"cp{python.replace('.', '')}", "--abi", "abi3", "--abi", "none"),
            *(argument for platform in platforms for argument in ("--platform", platform)),
            *pinned,
        ],
        f"wheels for {architecture} and Python {python}",
    )
    for pattern in PRUNED:
        for path in sorted(site.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _pinned(names: Sequence[str]) -> list[str]:
    """The names with their versions in `constraints.txt`, or else those installed here."""
    listed = dict(re.findall(r"(?m)^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text()))
    known = {_plain(name): version for name, version in listed.items()}
    return [f"{name}=={known.get(_plain(name)) or metadata.version(name)}" for name in names]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _environment(prefix: Path, target: Build) -> None:
    """Write what `python -m venv` would write on the target, and the package's description."""
    (prefix / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {target.python}\n"
    )
    (prefix / "package.json").write_text(json.dumps(records.plain(target)) + "\n")
    _link(prefix / "bin/python3", f"/usr/bin/python{target.python}")
    for command in ("edge-agent", "stillhouse-update"):
        _put(prefix / "bin" / command, FILES / command, mode=0o755)


def measured_artifact(folder: Path) -> None:
    """Export what `edge-agent measure` measures by default: ResNet-8 as FedGKT's devices train it.

    Raises:
        PackageError: PyTorch is missing here.
    """
    try:
        import torch

        import models
        from tools.export import export
    except ImportError as fault:
        raise PackageError(
            f"{fault.name} is missing: build in the environment of `make`, because the package "
            "holds an artifact that is compiled with it"
        ) from fault
    folder.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    name = "resnet8"
    shape = models.input_shape(name)
    module = models.build(name, classes=10, input_shape=shape)
    export(module, name=name, classes=10, input_shape=shape, batch=32, out=folder)


def _documents(folder: Path, version: str) -> None:
    for name in ("README.md", "copyright"):
        _put(folder / name, FILES / name)
    when = formatdate(int(_epoch()))
    entry = f"  * Version {version} of the project; its CHANGELOG.md says what is new."
    log = f"{NAME} ({version}) stable; urgency=medium\n\n{entry}\n\n -- {MAINTAINER}  {when}\n"
    _compressed(folder / "changelog.gz", log.encode())


def _control(tree: Path, architecture: str, python: str) -> None:
    folder = tree / "DEBIAN"
    folder.mkdir()
    size = sum(path.lstat().st_size for path in tree.rglob("*") if path.is_file())
    fields = {
        "Package": NAME,
        "Version": _version(python),
        "Architecture": architecture,
        "Maintainer": MAINTAINER,
        "Installed-Size": str(-(-size // 1024)),
        "Depends": ", ".join([f"python{python}", *DEPENDS]),
        "Section": "science",
        "Priority": "optional",
        "Homepage": "https://stillhouse.example",
        "Description": "federated learning on small devices, the device's side\n"
        " Trains a small network on images that stay on this device, by plain ONNX\n"
        " Runtime, and exchanges what it has learnt with an orchestrator over MQTT.",
    }
    (folder / "control").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    for script in ("postinst", "prerm", "postrm"):
        _put(folder / script, FILES / script, mode=0o755)
    listed = [path for path in sorted(tree.rglob("*")) if path.is_file() and not path.is_symlink()]
    installed = [str(path.relative_to(tree)) for path in listed if folder not in path.parents]
    sums = _run(["md5sum", *installed], "md5sum", folder=tree)
    (folder / "md5sums").write_text(sums)


def _pack(tree: Path, path: Path) -> Path:
    for each in tree.rglob("*"):
        if not each.is_symlink():
            mode = each.stat().st_mode
            each.chmod(0o755 if each.is_dir() or mode & 0o100 else 0o644)
    for library in tree.rglob("*.so*"):
        library.chmod(0o644)
    partial = path.with_name(path.name + ".new")
    _run(["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(tree), str(partial)], "dpkg-deb")
    partial.replace(path)
    return path


def _put(path: Path, source: Path, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)
    path.chmod(mode)


def _compressed(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0))


def _link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def _run(command: Sequence[str], what: str, folder: Path | None = None) -> str:
    """Standard output of a command; if it fails, PackageError with the last it printed."""
    # dpkg-deb limits times in the archive to this, so that one source gives one package.
    environment = {"SOURCE_DATE_EPOCH": _epoch()} | os.environ
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PackageError(f"{what}: {command[0]} failed: {done.stderr.strip()[-800:]}")
    return done.stdout


def _epoch() -> str:
    """The time of the last commit, or else of this file, in Unix seconds."""
    done = subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or str(int(Path(__file__).stat().st_mtime))


def main(arguments: Sequence[str] | None = None) -> int:
    """Build; return 0, or 2 after one line on what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m hardware.deb", description=__doc__)
    parser.add_argument("--arch", choices=tuple(MACHINES), default="arm64", help="of the target")
    parser.add_argument("--python", choices=PYTHONS, default="3.11", help="of the target")
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder to write")
    chosen = parser.parse_args(arguments)
    try:
        path = build(chosen.arch, chosen.python, chosen.out)
    except StillhouseError as fault:
        print(f"deb: {fault}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
