"""`edge-agent measure`: measures what a training artifact costs on this device.

    machine     peak GFLOP/s of numpy's float32 matrix product, and memory bandwidth of a copy
    step        milliseconds of a training step, images a second
    layers      FLOPs and bytes that the exporter counted, joined by node with the times in ONNX
                Runtime's profile: GFLOP/s and GB/s, and their share of what the machine can do
    memory      resident bytes before and after loading, and peaks (VmHWM) of training, extraction
                and evaluation, beside what the exporter foretold
    energy      joules a sample, if the board measures them; and whether heat or power slowed it
    pytorch     if asked for: PyTorch at the same step, in turns with ours, in a separate process

Inputs are random numbers, since no cost depends on them; nothing here learns. FLOPs are 2 x MAC of
convolutions and matrix products. Nodes are timed in separate runs, because profiling takes time.
"""

import json
import os
import re
import statistics
import sys
import tempfile
import time
import timeit
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from edge_agent.field import sensors
from ondevice import meter, peer, roofline
from wire import __version__, records
from wire.artifact import Artifact
from wire.errors import ArtifactError
from wire.manifest import Graph, Manifest
from wire.measurement import FORMAT, Measurement

# The package installs it there; in a checkout, tools.export writes it there.
INSTALLED = Path(sys.prefix) / "share/stillhouse/resnet8"
WARM, PROFILED = 3, 5  # steps
GEMM, COPIED = 768, 1 << 26  # rows of the matrices; bytes of the array


def measure(
    artifact: Artifact,
    *,
    threads: int,
    steps: int,
    budget: int = 0,
    name: str = "",
    with_pytorch: bool = False,
    model: str = "",
) -> dict[str, Any]:
    """Measure an artifact; see the module's docstring.

    Args:
        artifact: opened and verified.
        threads: for ONNX Runtime and numpy; 0 takes all cores.
        steps: how many steps to time, after a few that are not timed.
        budget: bytes that the process may take, to find the largest batch; 0: what is available
            now.
        name: the device's name.
        with_pytorch: measure PyTorch too.
        model: the name of a user's own network for PyTorch, `nets.py:make`; "": the artifact's.

    Returns:
        What `wire.measurement` signs: all keys but `device` and `signature`. "valid" is False if
        something slowed the processor down before, after or, as far as the board knows, meanwhile.

    Raises:
        SettingsError: PyTorch cannot be measured.
    """
    if with_pytorch:
        peer.check()
    before, ever, sensor = sensors.throttling(), sensors.throttling(ever=True), sensors.power()
    cool = sensors.celsius()
    manifest = artifact.manifest
    train = manifest.graphs["train"]
    report: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "agent": __version__,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "platform": records.plain(meter.this_platform()),
        "threads": threads,
        "artifact": {
            "digest": artifact.digest,
            "model": records.plain(manifest.model),
            "task": manifest.task,
            "batch": manifest.batch,
            "micro_batches": manifest.micro_batches,
            "parameters": sum(spec.size for spec in manifest.state_of("parameter")),
            "step_flops": train.flops * manifest.micro_batches,
            "activation_bytes": sum(layer.activation_bytes for layer in train.layers),
        },
    }
    memory = {"idle_bytes": meter.resident_bytes()}
    state = load_file(artifact.weights)
    step = _step(artifact, state, threads)
    memory["loaded_bytes"] = meter.resident_bytes()
    counts = meter.Meter()
    with counts.phase("train"):
        for _ in range(WARM):
            step()
        with sensors.Watch(sensor) as watch:
            times = timeit.repeat(step, number=1, repeat=steps)
        memory["pss_bytes"] = meter.proportional_bytes()
    if with_pytorch:
        report["pytorch"] = _beside(artifact, state, threads, model)
    del step
    meter.give_back()
    for kind in ("extract", "eval"):
        if kind in manifest.graphs:
            with counts.phase(kind):
                _passes(artifact, kind, state, threads)
            meter.give_back()
    memory |= {k: int(v) for k, v in counts.metrics.items() if k.endswith("_peak_bytes")}
    memory["group_peak_bytes"] = meter.group_peak_bytes()
    memory["foretold_bytes"] = manifest.memory.process
    memory["budget_bytes"] = budget or meter.available_bytes() + meter.resident_bytes()
    memory["largest_batch"] = _largest_batch(manifest, memory["budget_bytes"])
    quartiles = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
    median = quartiles[1]
    report["memory"] = memory
    report["step"] = {
        "timed": steps,
        "median_s": median,
        "quartiles_s": quartiles,
        "images_per_s": manifest.batch / median,
        "gflops": train.flops * manifest.micro_batches / median / 1e9,
    }
    # Twice, because other work on the machine may disturb one of them.
    first = (_gemm(), _copy(threads))
    report["layers"] = _layers(train, _node_times(artifact, state, threads), manifest.micro_batches)
    report["machine"] = {
        "gemm_gflops": max(first[0], _gemm()),
        "copy_gbytes": max(first[1], _copy(threads)),
    }
    joules = None if watch.joules is None else watch.joules / (steps * manifest.batch)
    after = sensors.throttling()
    meanwhile = tuple(w for w in sensors.throttling(ever=True) if w not in ever)
    report["energy"] = {
        "sensor": sensor.name if sensor else None,
        "joules_per_sample": joules,
        "watts": None if watch.joules is None else watch.joules / watch.seconds,
    }
    report["heat"] = {
        "celsius_before": cool,
        "celsius_after": sensors.celsius(),
        "held_back_before": before,
        "held_back_after": after,
        "held_back_meanwhile": meanwhile,
    }
    report["valid"] = not (before or after or meanwhile)
    return report


def default_artifact(state: Path | None) -> Path:
    """The folder of the artifact to measure if none is named.

    That is the installed one, or else the newest that this device got from an orchestrator.

    Args:
        state: the agent's state folder, if its settings are known.

    Raises:
        ArtifactError: there is none; the message says how to get one.
    """
    if INSTALLED.is_dir():
        return INSTALLED
    manifests = list(state.glob("artifacts/*/manifest.json")) if state else []
    if manifests:
        return max(manifests, key=lambda path: path.stat().st_mtime).parent
    where = f", nor in {state}/artifacts" if state else ""
    raise ArtifactError(
        f"no training artifact is here: none in {INSTALLED}{where}. One comes with a device's "
        "first round: run the agent, then measure with --config agent.toml. Or make one where the "
        "orchestrator is installed (python -m tools.export --model resnet8 --classes 10 --batch 32 "
        "--out resnet8), copy the folder here, and name it: --artifact resnet8"
    )


def _largest_batch(manifest: Manifest, budget: int) -> int:
    """The largest batch that fits into a budget, beside the rest of the process."""
    rest, each = manifest.memory.process - manifest.memory.tensors, manifest.memory.tensors
    return max(0, (budget - rest) * manifest.micro_batch // max(each, 1))


def _step(
    artifact: Artifact, state: Mapping[str, NDArray[Any]], threads: int, profile: Path | None = None
) -> Any:
    from ondevice.trainer import TrainStep

    step = TrainStep(artifact, state, threads=threads, profile=profile)
    for name, value in {**peer.batch(artifact.manifest), **peer.SETTINGS}.items():
        if name in step.inputs:
            step.inputs[name][...] = value
    return step


def _beside(
    artifact: Artifact, state: Mapping[str, NDArray[Any]], threads: int, model: str
) -> dict[str, Any]:
    """PyTorch and our engine in turns, both from the artifact's initial weights."""
    step = _step(artifact, state, threads)

    def once() -> float:
        step()
        return float(step.loss)

    return peer.race(artifact, once, threads=threads, model=model)


def _passes(artifact: Artifact, kind: str, state: Mapping[str, NDArray[Any]], threads: int) -> None:
    from ondevice.trainer import Inference

    run = Inference(artifact, kind, state, threads=threads)
    run.x[...] = np.random.default_rng(0).standard_normal(run.x.shape, np.float32)
    for _ in range(WARM):
        run()


def _node_times(
    artifact: Artifact, state: Mapping[str, NDArray[Any]], threads: int
) -> dict[int, float]:
    """Median seconds of each node of the training graph, by its number."""
    with tempfile.TemporaryDirectory(prefix="stillhouse-profile-") as folder:
        step = _step(artifact, state, threads, Path(folder) / "profile")
        for _ in range(WARM + PROFILED):
            step()
        events = json.loads(step.end_profile().read_text())
    times = defaultdict(list)
    for event in events:
        node = re.fullmatch(r"n(\d+)_kernel_time", event.get("name", ""))
        if node and event.get("cat") == "Node":
            times[int(node[1])].append(event["dur"] / 1e6)
    skipped = WARM * artifact.manifest.micro_batches
    return {number: statistics.median(each[skipped:] or each) for number, each in times.items()}


def _layers(graph: Graph, times: Mapping[int, float], runs: int) -> list[dict[str, Any]]:
    """The exporter's table of layers, one row a layer and phase, with the seconds of their nodes.

    The rows are for a whole step, which takes `runs` runs of the graph; activations live for one.
    """
    seconds = [0.0] * len(graph.layers)
    for number, row in enumerate(graph.nodes.row):
        seconds[row] += times.get(number, 0.0)
    return [
        {
            "name": layer.name,
            "phase": layer.phase,
            "flops": runs * layer.flops,
            "bytes": runs * layer.bytes,
            "activation_bytes": layer.activation_bytes,
            "seconds": runs * layer_seconds,
        }
        for layer, layer_seconds in zip(graph.layers, seconds, strict=True)
    ]


def _gemm() -> float:
    """GFLOP/s of numpy's float32 matrix product, the best of several."""
    a, b = np.ones((GEMM, GEMM), np.float32), np.ones((GEMM, GEMM), np.float32)
    out = np.empty_like(a)
    return 2e-9 * GEMM**3 / _best(lambda: np.matmul(a, b, out=out))


def _copy(threads: int) -> float:
    """GB/s read and written by a copy too large for caches, in threads; the best of several."""
    number = threads or os.cpu_count() or 1
    sources = np.ones((number, COPIED // 4), np.float32)
    targets = np.empty_like(sources)
    with ThreadPoolExecutor(number) as pool:  # numpy copies without holding the interpreter
        seconds = _best(lambda: list(pool.map(np.copyto, targets, sources)))
    return 2e-9 * number * COPIED / seconds


def _best(work: Callable[[], object]) -> float:
    return min(timeit.repeat(work, number=1, repeat=7))


def text(report: Measurement) -> str:
    """The report for people: artifact and machine, the slowest layers, memory, energy."""
    artifact, step, machine = report.artifact, report.step, report.machine
    memory, energy, heat, platform = report.memory, report.energy, report.heat, report.platform
    lines = [
        (
            f"{artifact.model.name}, batch {artifact.batch}, on {platform.model} "
            f"({platform.machine}, "
            f"{platform.cores} cores, onnxruntime {platform.onnxruntime}, "
            f"{report.threads or 'all'} threads)"
        ),
        (
            f"machine   {machine.gemm_gflops:.1f} GFLOP/s of a matrix product, "
            f"{machine.copy_gbytes:.1f} GB/s of a copy"
        ),
        (
            f"step      {1e3 * step.median_s:.1f} ms, {step.images_per_s:.0f} images/s, "
            f"{artifact.step_flops / 1e9:.2f} GFLOP, {step.gflops:.1f} GFLOP/s, "
            f"{100 * step.gflops / machine.gemm_gflops:.0f} % of the peak"
        ),
        *(
            f"  {row.phase:9} {1e3 * row.seconds:7.1f} ms  {row.flops / 1e9:6.2f} GFLOP  "
            f"{row.bytes / 1e6:7.1f} MB moved"
            for row in roofline.sums(report.layers)
        ),
    ]
    if pytorch := report.pytorch:
        lines.append(
            f"pytorch   {pytorch.images_per_s:.0f} images/s (eager, {pytorch.version}), in turns "
            f"with our {pytorch.ours_images_per_s:.0f}: {pytorch.ratio:.2f} times; its process "
            f"peaks at {pytorch.peak_bytes / 1e6:.0f} MB"
        )
    lines += ["", *roofline.table(report)]
    peaks = [
        f"{phase} {peak / 1e6:.0f}"
        for phase in ("train", "extract", "eval")
        if (peak := getattr(memory, f"{phase}_peak_bytes")) is not None
    ]
    lines += [
        "",
        (
            f"memory    {memory.idle_bytes / 1e6:.0f} MB idle, "
            f"{memory.loaded_bytes / 1e6:.0f} loaded; peaks: {', '.join(peaks)}; "
            f"{memory.foretold_bytes / 1e6:.0f} foretold"
        ),
        f"{'':10}a batch of {memory.largest_batch} fits {memory.budget_bytes / 1e6:,.0f} MB",
    ]
    if energy.joules_per_sample is None or energy.watts is None:
        lines.append("energy    no sensor on this machine, or not for this user")
    else:
        lines.append(
            f"energy    {1e3 * energy.joules_per_sample:.2f} mJ a sample, "
            f"{energy.watts:.2f} W by {energy.sensor}"
        )
    if not report.valid:
        was, while_, now = (
            ", ".join(causes) or "nothing"
            for causes in (heat.held_back_before, heat.held_back_meanwhile, heat.held_back_after)
        )
        lines.append(
            f"NOT VALID: held back by {was} before, by {while_} meanwhile, by {now} after; see to "
            "its power and cooling, and repeat"
        )
    lines.append(f"signed    by {report.device}")
    return "\n".join(lines)
