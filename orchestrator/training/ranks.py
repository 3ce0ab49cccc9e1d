"""Server training on several GPUs, or by several processes on a CPU: the ranks of torchrun.

    torchrun --nproc-per-node N -m orchestrator.main start --config run.toml

Rank 0 is the orchestrator as usual. The other ranks wait for its jobs, and each does its part: a
part of every batch (DistributedDataParallel) and of every device's logits. Feature shards are files
that all ranks map, so all ranks must see the run's folder.

A run with N ranks differs from a run with one in three ways. Batch norm normalizes a rank's part of
a batch by that part's statistics, and the statistics for evaluation are the mean over all ranks. A
last batch of fewer than two samples a rank is left out. Sums are rounded in another order.

A job is one safetensors blob, in which the tensor "job" is JSON. Rank 0 writes the blob's size into
torchrun's store, where the others wait for it without limit, and then broadcasts the blob: only a
job that has begun has a time-out. A rank that fails or is killed ends the run, which can be resumed
after its last closed round. Under NCCL, if a rank is killed in the middle of a step, only torchrun
(which ends the others) or the time-out notices.
"""

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

import models
from ondevice import views
from orchestrator.config import ServerConfig
from orchestrator.training import distill, optimizers
from orchestrator.training.distill import Progress, Ranks
from orchestrator.training.optimizers import Course
from orchestrator.training.samples import Samples, Source
from orchestrator.training.shards import Shard
from wire import records
from wire.errors import RunError
from wire.tensors import strip_prefix, with_prefix

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Array = NDArray[Any]
TIMEOUT_S = 600.0
POLL_S = 0.001, 0.1  # between two looks for a job: at first, and in the long run
LEAVE_S = 10.0  # how long ranks wait for each other at the end: one may hold the store
OVER = "0"

_here: "Group | None" = None  # on rank 0, the group; one a process, as in torch.distributed


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    config: ServerConfig,
    *,
    seed: int,
    progress: Progress,
    course: Course,
) -> float:
    """`distill.train` with all ranks; called on rank 0.

    Raises:
        RunError: as in `distill.train`, or another rank failed, or `server.batch` is too small for
            the number of ranks.
    """
    if _here is None:
        return distill.train(
            model, optimizer, samples, config, seed=seed, progress=progress, course=course
        )
    if config.batch < 2 * _here.size:
        raise RunError(
            f"server.batch: expected 2 samples or more for each of {_here.size} ranks, got "
            f"{config.batch}; set a larger one, or start fewer ranks"
        )
    described = [_described(f"source/{i}", each) for i, each in enumerate(samples.sources)]
    job = {
        "what": "train",
        "config": records.plain(config),
        "seed": seed,
        "course": records.plain(course),
        "sources": [each for each, _ in described],
    }
    arrays = {name: array for _, unmapped in described for name, array in unmapped.items()}
    arrays |= with_prefix("slot", optimizers.slots(optimizer))
    with _here.together():
        _here.post(job, arrays)
        return distill.train(
            model,
            optimizer,
            samples,
            config,
            seed=seed,
            progress=progress,
            course=course,
            group=_here,
        )


def teach(
    model: nn.Module,
    samples: Samples,
    span: range,
    config: ServerConfig,
    view: int = views.PLAIN,
) -> NDArray[np.float32]:
    """`distill.teach` with all ranks, for the model and samples trained last; called on rank 0.

    Raises:
        RunError: another rank failed.
    """
    if _here is None or len(span) < _here.size:
        return distill.teach(model, samples, span, config, view)
    with _here.together():
        _here.post({"what": "teach", "span": [span.start, span.stop], "view": view}, {})
        return distill.teach(model, samples, span, config, view, group=_here)


@contextlib.contextmanager
def joined(config: ServerConfig, timeout_s: float = TIMEOUT_S) -> Iterator["Group | None"]:
    """The group of processes that torchrun started; None if it started one or none.

    When the block ends on rank 0, for whatever reason, `Group.serve` ends on the others.

    Args:
        config: says whether to use CUDA.
        timeout_s: for ranks to meet, and then for each step of a job.

    Raises:
        RunError: the ranks do not meet, or there are more of them than GPUs on this machine.
    """
    global _here  # noqa: PLW0603
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    device, patience = _device(config), timedelta(seconds=timeout_s)
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=patience)))
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=store,
            rank=rank,
            world_size=size,
            timeout=patience,
        )
    except RuntimeError as fault:
        raise RunError(f"the ranks did not meet within {timeout_s:g} s: {_line(fault)}") from fault
    group = Group(rank, size, device, store)
    _here = None if rank else group
    try:
        yield group
    except BaseException:
        group.leave(wait_s=0)  # a rank that hangs in a step is freed when this process ends
        raise
    else:
        group.leave(wait_s=LEAVE_S)
        dist.destroy_process_group()
    finally:
        _here = None


class Group(Ranks):
    """Several processes, each with a GPU or threads of its own.

    Args:
        rank: of this process.
        size: number of ranks.
        device: of this process.
        store: shared by all ranks.
    """

    def __init__(self, rank: int, size: int, device: torch.device, store: "Store") -> None:
        self.rank, self.size = rank, size
        self._device, self._store = device, store
        self._jobs = 0

    def part(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """This rank's part; parts differ in size by at most one, and the first are the larger."""
        return np.array_split(numbers, self.size)[self.rank]

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` in DistributedDataParallel, with rank 0's weights and buffers."""
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
        with warnings.catch_warnings():  # torch 2.13 deprecates the only name that torch 2.9 has
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False)

    def settle(self, model: nn.Module) -> None:
        """Give all ranks the means of all buffers except counters."""
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer.div_(self.size)

    def sum(self, value: float) -> float:
        """The sum of all ranks' values."""
        together = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(together)
        return float(together)

    def gather(self, rows: NDArray[np.float32], total: int) -> NDArray[np.float32]:
        """On rank 0 all `total` rows, in their order; on other ranks this rank's rows."""
        if self.rank:
            dist.send(torch.from_numpy(rows), 0)
            return rows
        parts = [torch.from_numpy(rows)]
        for other, numbers in enumerate(np.array_split(np.arange(total), self.size)[1:], 1):
            parts.append(torch.empty(len(numbers), rows.shape[1]))
            dist.recv(parts[-1], other)
        return torch.cat(parts).numpy()

    def post(self, job: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Give the other ranks a job."""
        # safetensors writes memory as it lies: a channels-last array would be saved scrambled.
        tensors = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        tensors["job"] = np.frombuffer(json.dumps(job).encode(), np.uint8)
        blob = np.frombuffer(save(tensors), np.uint8).copy()
        self._store.delete_key(_key(self._jobs))  # no longer needed: all ranks did that job
        self._jobs += 1
        self._store.set(_key(self._jobs), str(len(blob)))
        dist.broadcast(torch.from_numpy(blob), 0)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Context of rank 0's part of a job.

        Raises:
            RunError: in place of PyTorch's error, with the errors of the other ranks.
        """
        try:
            yield
        except RuntimeError as fault:
            said = [f"rank 0: {_line(fault)}"]
            with contextlib.suppress(RuntimeError):
                said += [
                    f"rank {other}: {self._store.get(f'fault/{other}').decode()}"
                    for other in range(1, self.size)
                    if self._store.check([f"fault/{other}"])
                ]
            raise RunError(
                f"server training by {self.size} ranks failed; {'; '.join(said)}. Start again: the "
                "run goes on after its last closed round"
            ) from fault

    def leave(self, wait_s: float) -> None:
        """End the jobs: rank 0 tells the other ranks, and they confirm it."""
        with contextlib.suppress(RuntimeError):  # ranks that have ended need not be told
            if self.rank:
                self._store.set(f"left/{self.rank}", "")
                return
            self._store.set(_key(self._jobs + 1), OVER)
            if wait_s:
                names = [f"left/{other}" for other in range(1, self.size)]
                self._store.wait(names, timedelta(seconds=wait_s))

    def serve(self) -> None:
        """Do this rank's part of each job until there are no more.

        Raises:
            RunError: rank 0 is gone, or a job failed.
        """
        model, samples, config = nn.Module(), None, ServerConfig()
        try:
            while (tensors := self._next()) is not None:
                job = json.loads(tensors.pop("job").tobytes())
                if job["what"] == "train":
                    samples = None  # makes room on the GPU for the next ones
                    config = records.build(ServerConfig, job["config"], where="job", error=RunError)
                    model, samples = self._train(config, job, tensors)
                elif samples is not None:
                    span = range(*job["span"])
                    distill.teach(model, samples, span, config, job["view"], group=self)
        except Exception as fault:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"fault/{self.rank}", _line(fault))
                if self._find(_key(self._jobs + 1), time.monotonic() + LEAVE_S):
                    return  # rank 0 gave up in the middle of the job, and says why
            if isinstance(fault, RuntimeError):
                raise RunError(f"rank {self.rank}: {_line(fault)}") from fault
            raise

    def _next(self) -> dict[str, Array] | None:
        """The next job, or None when there are no more."""
        self._jobs += 1
        self._find(_key(self._jobs))
        size = self._store.get(_key(self._jobs)).decode()
        if size == OVER:
            return None
        blob = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(blob, 0)
        return load(blob.numpy().tobytes())

    def _find(self, key: str, deadline_s: float = math.inf) -> bool:
        """Wait for a key in the store; returns whether it came."""
        pause, longest = POLL_S  # `Store.wait` would print a warning with each time-out
        while not (found := self._store.check([key])) and time.monotonic() < deadline_s:
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return found

    def _train(
        self, config: ServerConfig, job: Mapping[str, Any], tensors: Mapping[str, Array]
    ) -> tuple[nn.Module, Samples]:
        sources = [_source(f"source/{i}", each, tensors) for i, each in enumerate(job["sources"])]
        samples, first = Samples(sources, self._device), sources[0].shard
        shape, classes = first.features.shape[1:], first.logits.shape[1]
        model = models.build(config.model, classes=classes, input_shape=shape).to(self._device)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = optimizers.make_optimizer(model, config)
        optimizers.resume(optimizer, strip_prefix("slot", tensors))
        distill.train(
            model,
            optimizer,
            samples,
            config,
            seed=job["seed"],
            progress=lambda *_: None,
            course=records.build(Course, job["course"], where="job", error=RunError),
            group=self,
        )
        return model, samples


def _described(name: str, source: Source) -> tuple[dict[str, Any], dict[str, Array]]:
    """A source as JSON, with the paths of its mapped arrays, and its other arrays."""
    columns = source.shard.columns
    mapped = {n: array for n, array in columns.items() if isinstance(array, np.memmap)}
    arrays = {f"{name}/{n}": array for n, array in columns.items() if n not in mapped}
    for part in ("fill", "mirror", "left_out"):
        if getattr(source, part) is not None:
            arrays[f"{name}/{part}"] = getattr(source, part)
    files = {n: [str(array.filename), list(array.shape)] for n, array in mapped.items()}
    return {"weight": source.weight, "files": files}, arrays


def _source(name: str, described: Mapping[str, Any], arrays: Mapping[str, Array]) -> Source:
    """The source that `_described` described.

    Raises:
        RunError: a file cannot be read here, or has another shape than on rank 0.
    """
    columns = strip_prefix(name, arrays)
    more = {part: columns.pop(part, None) for part in ("fill", "mirror", "left_out")}
    for column, (path, shape) in described["files"].items():
        try:
            columns[column] = np.load(path, mmap_mode="r")
        except OSError as fault:
            raise RunError(f"{path}: every rank must see the run's folder ({fault})") from fault
        if columns[column].shape != tuple(shape):
            raise RunError(
                f"{path}: expected an array of shape {tuple(shape)}, as rank 0 has it, got "
                f"{columns[column].shape}; let every rank see the run's folder"
            )
    return Source(Shard(**columns), described["weight"], **more)


def _device(config: ServerConfig) -> torch.device:
    """The CPU, or this rank's GPU, which becomes PyTorch's current one."""
    if config.torch_device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
    if here > there:
        raise RunError(f"expected a GPU for each of {here} ranks, got {there}; start {there} ranks")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _key(job: int) -> str:
    return f"job/{job}"


def _line(fault: Exception) -> str:
    """The first line of an error's text; PyTorch appends stack traces to it."""
    return (str(fault).splitlines() or [repr(fault)])[0]
