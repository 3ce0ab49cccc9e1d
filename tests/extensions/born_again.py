"""A user's own strategy whose devices learn from a teacher: born-again networks.

Furlanello et al. 2018 (arXiv 1805.04770): each generation of a network learns from the labels and
from the logits of the generation before. Here a round is a generation, each device has networks of
its own, and their weights go on from round to round. The server returns to each device the logits
that it sent:

    loss = CE(z, y) + alpha T^2 KL(softmax(z_before / T) || softmax(z / T))

    strategy = "born_again.py:BornAgain"    # in run.toml
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from orchestrator.config import RunConfig, unused
from orchestrator.strategies import Checkpoint, Metrics, NoSettings, Task
from orchestrator.strategies.gkt.received import Logits, read_logits
from orchestrator.strategies.payloads import admit_device_weights, nbytes
from orchestrator.strategies.strategy import Array, Weights
from wire import records, tensors
from wire.messages import Birth, BlobRef, Order, Result

CODEC = "float16"  # of logits, in both directions


class Teacher(NamedTuple):
    """Logits z_before of a device's samples: their blob, and the digest of the samples."""

    logits: BlobRef
    data_digest: str


@dataclass(frozen=True)
class Generation:
    """The state: each device's network, and its teacher for the next round."""

    networks: Mapping[str, Weights]
    teachers: Mapping[str, Teacher]

    def pack(self) -> Checkpoint:
        """The state as a checkpoint; `orchestrator export` looks for networks under "device"."""
        packed: dict[str, Array] = {}
        for name, weights in self.networks.items():
            packed |= tensors.with_prefix(f"device/{name}", weights)
        teachers = {n: [records.plain(t.logits), t.data_digest] for n, t in self.teachers.items()}
        blobs = [teacher.logits.digest for teacher in self.teachers.values()]
        return Checkpoint(packed, {"teachers": teachers, "blobs": blobs})


@dataclass(frozen=True)
class Child:
    """A device's contribution: its network, and that network's logits."""

    weights: Weights
    logits: Logits

    @property
    def nbytes(self) -> int:
        """Its memory in bytes."""
        return nbytes(self.weights) + self.logits.nbytes


class BornAgain:
    """Each device is taught by itself, one round ago."""

    settings = NoSettings
    needs = frozenset({"teacher"})

    def __init__(self, task: Task) -> None:
        self.task = task

    @staticmethod
    def check(config: RunConfig) -> None:
        """Refuse settings that the strategy does not support, such as sub-models."""
        unused.refuse_holdout(config)
        unused.refuse_submodel(config)
        unused.refuse_transfer(config)
        unused.refuse_updates(config)

    def begin(self) -> Generation:
        """No device has returned a network yet."""
        return Generation({}, {})

    def restore(self, checkpoint: Checkpoint) -> Generation:
        """The state that was packed."""
        noted = checkpoint.notes["teachers"].items()
        teachers = {name: Teacher(BlobRef(**ref), digest) for name, (ref, digest) in noted}
        return Generation(checkpoint.by_device("device"), teachers)

    def orders(
        self, state: Generation, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """Orders to go on from the device's own weights, with its teacher if its images stayed."""
        orders = {}
        for name, birth in cohort.items():
            teacher = state.teachers.get(name)
            if teacher and teacher.data_digest != birth.data_digest:
                teacher = None
            orders[name] = self.task.order(
                name,
                round_,
                sequence,
                returns={"state": "float32", "logits": CODEC},
                teacher=teacher.logits if teacher else None,
                alpha=self.task.config.device.alpha if teacher else 0.0,
                data_digest=birth.data_digest,
            )
        return orders

    def admit(self, state: Generation, order: Order, result: Result) -> Child:
        """The network and its logits, checked."""
        del state
        logits = read_logits(self.task, result.blobs["logits"], result.samples, CODEC)
        return Child(admit_device_weights(self.task, order, result), logits)

    def aggregate(
        self,
        state: Generation,
        round_: int,
        results: Sequence[Result],
        contributions: Iterable[Child],
    ) -> tuple[Generation, Metrics]:
        """Nothing is averaged; each child teaches the next."""
        del round_
        networks, teachers = dict(state.networks), dict(state.teachers)
        for result, child in zip(results, contributions, strict=True):
            networks[result.device] = child.weights
            logits = self.task.blobs.put(tensors.pack([("logits", child.logits, CODEC)], seed=0))
            teachers[result.device] = Teacher(logits, result.data_digest)
        return Generation(networks, teachers), {"devices": {}}
