"""`edge-agent doctor`: finds what keeps this device from taking part, and says what to do."""

import json
import os
import platform
import re
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ondevice import config, meter
from ondevice.config import AgentConfig
from wire.errors import LinkError, StillhouseError

WHEELS = ("numpy", "onnxruntime", "google.protobuf", "zstandard", "safetensors", "msgpack",
          "paho.mqtt.client", "PIL", "threadpoolctl", "cryptography")  # fmt: skip
LEAST_DISK, GOOD_DISK = 100 << 20, 1 << 30
LEAST_MEMORY = 150 << 20  # ResNet-8 trains within 130 MB
SOON_S = 30 * 24 * 3600
REACH_S = 10.0


class Finding(NamedTuple):
    """What one check found, and what to do about it."""

    level: Literal["ok", "warn", "bad"]
    what: str
    remedy: str = ""


def examine(path: Path, root: Path = Path("/")) -> Iterator[Finding]:
    """Check this device with the settings of a file; one finding after the other.

    Args:
        path: agent.toml.
        root: the folder that holds /proc and /run.
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
        remedy = "mend that; whatever depends on it was not checked"
        if isinstance(fault.__cause__ or fault, PermissionError):
            remedy = "run this as the agent's user: sudo -u stillhouse edge-agent doctor"
        yield Finding("bad", str(fault), remedy)
        return
    if os.geteuid() == 0:
        yield Finding(
            "warn", "root may do everything, and the agent's user may not",
            "run this as the agent's user: sudo -u stillhouse edge-agent doctor",
        )  # fmt: skip
    yield _settings(path, chosen)
    yield _disk(chosen.state)
    yield from _images(chosen)
    if chosen.kit.claim and chosen.broker.cert_file and not chosen.broker.cert_file.exists():
        yield Finding(
            "warn", "this device has no certificate yet",
            "start the agent while the orchestrator is at work; its kit holds for some days only",
        )  # fmt: skip
        return
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
    with suppress(OSError):
        text = (root / "proc/cpuinfo").read_text()
        for line in re.findall(r"^(?:flags|Features)\s*:(.*)", text, re.MULTILINE):
            flags.update(line.split())
    known = {"asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "avx", "avx2", "fma",
             "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"}  # fmt: skip
    instructions = ", ".join(sorted(flags & known))
    if flags and not flags & {"asimd", "avx"}:
        yield Finding(
            "warn", "the processor lacks the vector instructions that make ONNX Runtime fast",
            "training will work, but slowly; a Raspberry Pi 3 or later has them",
        )  # fmt: skip
    elif instructions:
        yield Finding("ok", f"processor has {instructions}")
    else:
        yield Finding("warn", "the system does not say what the processor can do", "")


def _wheels() -> Iterator[Finding]:
    """Import each package in a separate process: one built for other processors would end ours."""
    isolated = ["-I"] if sys.flags.isolated else []
    for name in WHEELS:
        code = f"import {name} as m; print(getattr(m, '__version__', ''))"
        done = subprocess.run(
            [sys.executable, *isolated, "-c", code], capture_output=True, text=True, check=False
        )
        package = name.removeprefix("google.").partition(".")[0]
        if done.returncode == 0:
            yield Finding("ok", f"{package} {done.stdout.strip()}".strip())
        elif done.returncode == -signal.SIGILL:
            yield Finding(
                "bad", f"{package} was built for another processor",
                "install the package for this architecture, or an older version of that wheel",
            )  # fmt: skip
        else:
            last = (done.stderr.strip().splitlines() or ["it ends without a message"])[-1]
            yield Finding(
                "bad", f"{package} cannot be imported: {last}",
                "install the package stillhouse-edge-agent again, or: pip install stillhouse",
            )  # fmt: skip


def _clock(root: Path) -> Finding:
    """Check the clock, by which certificates are judged; a Raspberry Pi needs a network for it."""
    now, built = time.time(), Path(__file__).stat().st_mtime
    if now < built - 24 * 3600:
        return Finding(
            "bad", f"the clock says {_date(now)}, before this program was made ({_date(built)})",
            "connect a network, and sudo timedatectl set-ntp true; TLS fails until then",
        )  # fmt: skip
    if (root / "run/systemd/system").is_dir() and not any(
        (root / path).exists()
        for path in ("run/systemd/timesync/synchronized", "run/chrony", "run/ntpd.pid")
    ):
        return Finding(
            "warn", f"the clock says {_date(now)}, and no service seems to keep it right",
            "sudo timedatectl set-ntp true",
        )  # fmt: skip
    return Finding("ok", f"the clock says {_date(now)}")


def _memory(root: Path) -> Finding:
    free = meter.available_bytes(root)
    if not free:
        return Finding("warn", "the system does not say how much memory is free", "")
    what = f"{free / 1e6:,.0f} MB of memory are available"
    if free < LEAST_MEMORY:
        return Finding("warn", what, "end other programs, or train a sub-model (submodel.tiers)")
    return Finding("ok", what)


def _limits(root: Path) -> Iterator[Finding]:
    """Check the memory controller of control groups, which is off by default on a Raspberry Pi."""
    path = root / "sys/fs/cgroup/cgroup.controllers"
    if path.exists() and "memory" not in path.read_text().split():
        yield Finding(
            "warn", "the kernel cannot limit a service's memory: the unit's MemoryMax does nothing",
            "add cgroup_enable=memory to the line in /boot/firmware/cmdline.txt, and reboot",
        )  # fmt: skip


def _settings(path: Path, chosen: AgentConfig) -> Finding:
    what = f"{path}: device {chosen.device} of fleet {chosen.fleet}"
    if (chosen.broker.password or chosen.kit.claim) and path.stat().st_mode & stat.S_IROTH:
        return Finding("warn", f"{what}; anyone here can read its secret", f"chmod o= {path}")
    return Finding("ok", what)


def _disk(state: Path) -> Finding:
    try:
        folder = next(each for each in (state, *state.parents) if each.exists())
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
            # The only reader of certificates in the standard library; Python's tests use it too.
            fields: dict[str, Any] = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined] # noqa: SLF001
            begin, end = (ssl.cert_time_to_seconds(fields[k]) for k in ("notBefore", "notAfter"))
        except (OSError, ValueError, KeyError) as fault:
            yield Finding("bad", f"{path} is not a certificate: {fault}", "copy the file again")
            continue
        now = time.time()
        what = f"{path} is good from {_date(begin)} to {_date(end)}"
        if not begin <= now <= end:
            yield Finding("bad", f"{what}, not on {_date(now)}", "renew it, or set the clock")
        elif end - now < SOON_S:
            yield Finding("warn", what, "get a new one before that")
        else:
            yield Finding("ok", what)


def _broker(chosen: AgentConfig) -> Finding:
    from wire.link import Link, LinkEvent, Lost

    address, reasons = chosen.broker, [""]

    def note(event: LinkEvent) -> None:
        if isinstance(event, Lost):
            reasons.append(event.reason)

    name = f"{chosen.client_id}-doctor-{os.getpid()}"
    try:
        link = Link(address, name, subscriptions=[], emit=note)
    except LinkError as fault:  # a certificate or key, which are read at once
        return Finding("bad", str(fault), "copy the files again")
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
        "bad", reasons[-1] or f"broker {address.url} does not answer in {REACH_S:.0f} s",
        f"is it running, and port {address.port} open? try: nc -vz {address.host} {address.port}",
    )  # fmt: skip


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def report(path: Path, say: Callable[[str], None] = print, *, as_json: bool = False) -> int:
    """Print each finding as it comes; return the exit code, 1 if one is bad, else 0.

    `as_json` prints one list of them in the end instead.
    """
    findings = []
    if not as_json:
        say(f"edge-agent on {meter.model()}")
    for finding in examine(path):
        findings.append(finding)
        if not as_json:
            say(f"{finding.level.upper():4} {finding.what}")
            if finding.level != "ok" and finding.remedy:
                say(f"     -> {finding.remedy}")
    if as_json:
        say(json.dumps([finding._asdict() for finding in findings]))
    return int(any(finding.level == "bad" for finding in findings))
