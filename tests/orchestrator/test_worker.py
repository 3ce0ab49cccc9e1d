"""The worker blames a device for faults of its payload, but not for ours."""

import errno
import queue
from types import SimpleNamespace

import pytest

from orchestrator.loop.worker import Failed, ResultChecked, Worker
from wire.errors import AdmissionError, CodecError, RunError, StorageError
from wire.messages import BlobRef, Order, Result
from wire.storage import Patience

ORDER = Order("run", 3, 1, BlobRef("ab" * 32, 9, 1024), 1, 0.1, 7, {})
RESULT = Result("pi", "run", 3, 1, 10)


def checked(fault: Exception):
    """The outcome of a result for which the strategy raises this fault."""

    def admit(*_):
        raise fault

    outcomes = queue.SimpleQueue()
    worker = Worker(SimpleNamespace(admit=admit), Patience(), outcomes.put)
    worker.check(SimpleNamespace(), ORDER, RESULT)
    worker.end(wait=True)
    return outcomes.get(timeout=60)


@pytest.mark.parametrize(
    "fault", [AdmissionError("diverged"), CodecError("unknown"), ValueError("shape"), KeyError("w")]
)
def test_whatever_a_payload_provokes_ends_that_result_alone(fault):
    outcome = checked(fault)
    assert isinstance(outcome, ResultChecked)
    assert outcome.result == RESULT
    assert outcome.fault


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.EIO, "I/O error"),
        FileNotFoundError("blob"),
        MemoryError(),
        StorageError("ro"),
        RunError("strategy fails"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_a_failing_disk_and_a_full_memory_are_not_noted_against_a_device(fault):
    assert checked(fault) == Failed(fault)
