"""`edge-agent doctor`: what keeps this device from taking part, each finding with its remedy."""

import json
import os
import platform
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ondevice import config, meter
from ondevice.config import AgentConfig
from wire.errors import LinkError, StillhouseError

WHEELS = ("numpy", "onnxruntime", "zstandard", "safetensors", "msgpack", "paho.mqtt.client", "PIL",
          "threadpoolctl", "cryptography")  # fmt: skip
LEAST_DISK, GOOD_DISK = 100 << 20, 1 << 30
LEAST_MEMORY = 150 << 20  # ResNet-8 trains within 130 MB
SOON_S = 30 * 24 * 3600
REACH_S = 10.0


class Finding(NamedTuple):
    """One thing that was looked at."""

    level: Literal["ok", "warn", "bad"]
    what: str
    remedy: str = ""


def examine(path: Path, root: Path = Path("/")) -> Iterator[Finding]:
    """Look at this device with the settings of a file, one thing after the other.

    Args:
        path: of agent.toml.
        root: where /proc and /run are looked for.
    """
    yield _python()
    yield from _processor(root)
    yield from _wheels()
    yield _clock(root)
    yield _memory(root)
    yield from _limits(root)
    try:
        chosen = config.load(path)
    except (StillhouseError, OSError) as fault:
        remedy = "mend that; what depends on it was not looked at"
        if isinstance(fault.__cause__ or fault, PermissionError):
            remedy = "look as the agent's user does: sudo -u stillhouse edge-agent doctor"
        yield Finding("bad", str(fault), remedy)
        return
    if os.geteuid() == 0:
        yield Finding(
            "warn", "this user may do everything, and the agent's may not",
            "look as the agent's user does: sudo -u stillhouse edge-agent doctor",
        )  # fmt: skip
    yield _settings(path, chosen)
    yield _disk(chosen.state)
    yield from _images(chosen)
    yield from _certificates(chosen)
    yield _broker(chosen)


def _python() -> Finding:
    bits = 64 if sys.maxsize > 1 << 32 else 32
    what = f"Python {platform.python_version()}, {bits} bit, {platform.machine()}"
    if bits == 32:
        return Finding("bad", what, "install a 64-bit system: ONNX Runtime has no wheels for 32")
    return Finding("ok", what)


def _processor(root: Path) -> Iterator[Finding]:
    flags: set[str] = set()
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags |= set(value.split())
    known = {"asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "avx", "avx2", "fma",
             "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"}  # fmt: skip
    found = ", ".join(sorted(flags & known))
    if flags and not flags & {"asimd", "avx"}:
        yield Finding(
            "warn", "processor without vector instructions that ONNX Runtime is fast with",
            "training will work, and be slow; a Raspberry Pi 3 or later has them",
        )  # fmt: skip
    elif found:
        yield Finding("ok", f"processor has {found}")
    else:
        yield Finding("warn", "what the processor can do is not told here", "")


def _wheels() -> Iterator[Finding]:
    """In a process of their own: one that needs other instructions ends its process."""
    isolated = ["-I"] if sys.flags.isolated else []
    for name in WHEELS:
        code = f"import {name} as m; print(getattr(m, '__version__', ''))"
        done = subprocess.run(
            [sys.executable, *isolated, "-c", code], capture_output=True, text=True, check=False
        )
        package = name.partition(".")[0]
        if done.returncode == 0:
            yield Finding("ok", f"{package} {done.stdout.strip()}".strip())
        elif done.returncode == -signal.SIGILL:
            yield Finding(
                "bad", f"{package} was built for another processor",
                "install the package for this architecture, or an older version of that wheel",
            )  # fmt: skip
        else:
            last = (done.stderr.strip().splitlines() or ["it ends without a word"])[-1]
            yield Finding(
                "bad", f"{package} cannot be imported: {last}",
                "install the package stillhouse-edge-agent anew, or: pip install stillhouse",
            )  # fmt: skip


def _clock(root: Path) -> Finding:
    """Certificates are judged by it; a Raspberry Pi without a network has none that goes on."""
    now, built = time.time(), Path(__file__).stat().st_mtime
    if now < built - 24 * 3600:
        return Finding(
            "bad", f"the clock says {_date(now)}, before this program was made ({_date(built)})",
            "sudo timedatectl set-ntp true, and a network; TLS fails until then",
        )  # fmt: skip
    if (root / "run/systemd/system").is_dir() and not any(
        (root / path).exists()
        for path in ("run/systemd/timesync/synchronized", "run/chrony", "run/ntpd.pid")
    ):
        return Finding(
            "warn", f"the clock says {_date(now)}, and nothing is seen that keeps it right",
            "sudo timedatectl set-ntp true",
        )  # fmt: skip
    return Finding("ok", f"the clock says {_date(now)}")


def _memory(root: Path) -> Finding:
    free = meter.available_bytes(root)
    if not free:
        return Finding("warn", "free memory is not told here", "")
    what = f"{free / 1e6:,.0f} MB of memory are available"
    if free < LEAST_MEMORY:
        return Finding("warn", what, "end other programs, or train a sub-model (submodel.tiers)")
    return Finding("ok", what)


def _limits(root: Path) -> Iterator[Finding]:
    """Raspberry Pi kernels begin without the memory controller of control groups."""
    path = root / "sys/fs/cgroup/cgroup.controllers"
    if path.exists() and "memory" not in path.read_text().split():
        yield Finding(
            "warn", "the kernel limits no service's memory: MemoryMax of the unit does nothing",
            "add cgroup_enable=memory to the line in /boot/firmware/cmdline.txt, and reboot",
        )  # fmt: skip


def _settings(path: Path, chosen: AgentConfig) -> Finding:
    what = f"{path}: device {chosen.device} of fleet {chosen.fleet}"
    if chosen.broker.password and path.stat().st_mode & stat.S_IROTH:
        return Finding("warn", f"{what}; anyone here can read its password", f"chmod o= {path}")
    return Finding("ok", what)


def _disk(state: Path) -> Finding:
    folder = next(each for each in (state, *state.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as fault:
        return Finding(
            "bad", f"{state} cannot be written: {fault.strerror}",
            "run this as the agent's user (sudo -u stillhouse), or let `state` name its folder",
        )  # fmt: skip
    what = f"{free / 1e6:,.0f} MB are free for {state}"
    if free < LEAST_DISK:
        return Finding("bad", what, "make room: artifacts, weights and feature maps go there")
    return Finding("warn" if free < GOOD_DISK else "ok", what, "make room before long runs")


def _images(chosen: AgentConfig) -> Iterator[Finding]:
    from ondevice.images import load

    try:
        images = load(chosen.data, input_shape=chosen.image, bad_share=chosen.bad_share)
    except (StillhouseError, OSError) as fault:
        yield Finding("bad", str(fault), "`data` and `image` in agent.toml say what to train on")
        return
    yield Finding("ok", f"{chosen.data}: {images.summary}")
    for what, remedy in images.remarks:
        yield Finding("warn" if remedy else "ok", what, remedy)


def _certificates(chosen: AgentConfig) -> Iterator[Finding]:
    for path in (chosen.broker.ca_file, chosen.broker.cert_file):
        if path is None:
            continue
        try:
            # The one reader of certificates in Python's own library; also used by its tests.
            fields: dict[str, Any] = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined] # noqa: SLF001
            begin, end = (ssl.cert_time_to_seconds(fields[k]) for k in ("notBefore", "notAfter"))
        except (OSError, ValueError, KeyError) as fault:
            yield Finding("bad", f"{path} is no certificate: {fault}", "copy the PEM file anew")
            continue
        now = time.time()
        what = f"{path} is good from {_date(begin)} to {_date(end)}"
        if not begin <= now <= end:
            yield Finding("bad", f"{what}, not on {_date(now)}", "a new certificate, or the clock")
        elif end - now < SOON_S:
            yield Finding("warn", what, "have a new one made before that")
        else:
            yield Finding("ok", what)


def _broker(chosen: AgentConfig) -> Finding:
    from wire.link import Link, LinkEvent, Lost

    address, said = chosen.broker, [""]

    def heard(event: LinkEvent) -> None:
        if isinstance(event, Lost):
            said[0] = event.reason

    try:
        link = Link(address, f"doctor-{chosen.device}-{os.getpid()}", subscriptions=[], emit=heard)
    except LinkError as fault:  # certificates, which are read at once
        return Finding("bad", str(fault), "copy the files anew")
    link.start()
    began = time.monotonic()
    try:
        if link.wait_connected(REACH_S):
            took = 1e3 * (time.monotonic() - began)
            return Finding("ok", f"broker {address.url} takes this device, in {took:.0f} ms")
    except StillhouseError as fault:
        return Finding("bad", str(fault), "enroll the device again, and copy its kit here")
    finally:
        link.close()
    return Finding(
        "bad", said[0] or f"broker {address.url} does not answer in {REACH_S:.0f} s",
        f"is it running, and port {address.port} open? try: nc -vz {address.host} {address.port}",
    )  # fmt: skip


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def report(path: Path, say: Callable[[str], None] = print, *, as_json: bool = False) -> int:
    """Print each finding as it is found; the exit code is 1 where something is bad, else 0.

    `as_json` prints one list of them in the end.
    """
    if as_json:
        found = list(examine(path))
        say(json.dumps([finding._asdict() for finding in found]))
        return int(any(finding.level == "bad" for finding in found))
    worst = 0
    say(f"edge-agent on {meter.model()}")
    for finding in examine(path):
        say(f"{finding.level.upper():4} {finding.what}")
        if finding.level != "ok" and finding.remedy:
            say(f"     -> {finding.remedy}")
        worst |= finding.level == "bad"
    return worst
