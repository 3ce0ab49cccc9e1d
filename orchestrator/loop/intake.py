"""Results on their way in: pulls their blobs, under one budget that all devices share.

The orchestrator asks for each chunk, and at most `budget` chunks are under way. So a thousand
devices that finish at once cannot flood it or the broker.
"""

from collections.abc import Iterator

from wire.blobs import BlobStore, Fetch
from wire.errors import TransferError
from wire.messages import Chunk, Gone, Result, Want

WINDOW = 8
MUTE = 8  # a device that is asked for so many times `retry_s` and sends nothing is refused


class Intake:
    """Pulls in progress, one a device.

    Args:
        blobs: where they go.
        budget: chunks under way at once, all devices together.
        retry_s: a chunk that has not come after this time is asked for again.
    """

    def __init__(self, blobs: BlobStore, budget: int, retry_s: float = 15.0) -> None:
        self._blobs, self._budget, self._retry_s = blobs, budget, retry_s
        self._pulls: dict[str, tuple[Result, list[Fetch]]] = {}
        self._silent: set[str] = set()
        self._asked_s: dict[str, float] = {}  # by device: since when it was asked in vain
        self._under_check: dict[str, Result] = {}  # by device: results that are being checked

    def begin(self, result: Result) -> None:
        """Pull a result's blobs; a pull of the same result continues, one of another is replaced.

        While an earlier result of the device is checked, nothing begins: the device offers again.
        """
        if result.device in self._under_check:
            return
        known = self._pulls.get(result.device)
        if known and known[0] == result:
            return
        fetches = [
            Fetch(
                self._blobs,
                ref,
                window=WINDOW,
                retry_s=self._retry_s,
                owner=result.device,
                settings=f"agent.toml of {result.device}",
            )
            for ref in {ref.digest: ref for ref in result.blobs.values()}.values()
        ]
        for replaced in known[1] if known else ():
            if replaced.ref not in result.blobs.values():
                replaced.discard()
        self._pulls[result.device] = (result, fetches)
        self._asked_s.pop(result.device, None)

    def drop(self, device: str) -> None:
        """Give up a device's result."""
        self._pulls.pop(device, None)

    def clear(self) -> frozenset[str]:
        """Give up all pulls, since the round ends; returns digests of blobs without a verdict.

        These are the blobs of all pulls in progress and of results that are being checked.
        """
        results = [*(result for result, _ in self._pulls.values()), *self._under_check.values()]
        self._pulls.clear()
        return frozenset(ref.digest for result in results for ref in result.blobs.values())

    def resume(self, device: str) -> None:
        """Note that a device has come back: what it was asked may be lost."""
        self._answered(device)
        for fetch in self._pulls.get(device, (None, []))[1]:
            fetch.forget_asked()

    def take(self, device: str, message: Chunk | Gone, body: memoryview) -> bool:
        """Take a device's answer; returns whether any of it was written.

        Raises:
            TransferError: the chunk is wrong, or the device no longer has the blob.
        """
        for fetch in self._pulls.get(device, (None, []))[1]:
            if fetch.ref.digest == message.digest:
                if isinstance(message, Gone):
                    fetch.gone()
                elif fetch.chunk(message, body):
                    self._answered(device)
                    return True  # no other fetch has this digest
        return False

    def complete(self) -> Iterator[Result]:
        """Results whose blobs are all here, to be checked; each is yielded once."""
        for device, (result, fetches) in list(self._pulls.items()):
            if all(fetch.done for fetch in fetches):
                del self._pulls[device]
                self._under_check[device] = result
                yield result

    @property
    def checking(self) -> bool:
        """Whether a result is being checked."""
        return bool(self._under_check)

    def checked(self, device: str) -> None:
        """Note that a device's result was checked: its next one may come."""
        self._under_check.pop(device, None)

    def wants(
        self, now_s: float, live: frozenset[str]
    ) -> Iterator[tuple[str, Want | TransferError]]:
        """Pairs of a device and the chunks to ask it for, or the fault that ends its pull.

        The device with the fewest chunks under way goes first. Devices that did not answer go last,
        so that they cannot use up the budget, and one that is `MUTE` ends its pull.

        Raises:
            StorageError: the disk fails; StalledError: it is full.
        """
        for device, (_, fetches) in self._pulls.items():
            for fetch in fetches:  # chunks that are lost free their room
                if device not in live:
                    fetch.forget_asked()
                    self._asked_s.pop(device, None)
                elif fetch.expire(now_s):
                    self._silent.add(device)
        room = self._budget - sum(f.in_flight for _, fs in self._pulls.values() for f in fs)
        for device in sorted(self._pulls, key=self._rank):
            if device not in live:
                continue
            if now_s - self._asked_s.get(device, now_s) > MUTE * self._retry_s:
                yield (
                    device,
                    TransferError(
                        f"{device} is connected, but sent nothing of its result in "
                        f"{MUTE * self._retry_s:g} s"
                    ),
                )
                continue
            # Nothing is left to pull if an earlier device's fault ended the round.
            for fetch in self._pulls.get(device, (None, []))[1]:
                try:
                    want = fetch.wants(now_s, room=room) if room > 0 else None
                except TransferError as fault:
                    yield device, fault
                    break
                if want:
                    self._asked_s.setdefault(device, now_s)
                    room -= len(want.chunks)
                    yield device, want
                if not fetch.done:
                    break  # one blob of a device at a time, in the order of the result

    def _answered(self, device: str) -> None:
        self._silent.discard(device)
        self._asked_s.pop(device, None)

    def _rank(self, device: str) -> tuple[bool, int]:
        return device in self._silent, sum(fetch.in_flight for fetch in self._pulls[device][1])
