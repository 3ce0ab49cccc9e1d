"""Results on their way in: pulls their blobs, under one budget that all devices share.

The orchestrator asks for each chunk, and at most `budget` chunks are under way. So a thousand
devices that finish at once cannot flood it or the broker.
"""

from collections.abc import Iterator

from wire.blobs import BlobStore, Fetch
from wire.errors import StalledError, TransferError
from wire.messages import Chunk, Gone, Result, Want

WINDOW = 8
# A connected device that was asked again so often, for so long, and sent nothing, is refused.
MUTE, MUTE_S = 8, 60.0


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
        # By device: how often it was asked again in vain, and since when.
        self._in_vain: dict[str, tuple[int, float]] = {}
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
        needed = {ref.digest for ref in result.blobs.values()}
        for replaced in known[1] if known else ():
            if replaced.ref.digest not in needed:
                replaced.discard()
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
        self._pulls[result.device] = (result, fetches)

    def drop(self, device: str) -> None:
        """Give up a device's result."""
        self._pulls.pop(device, None)
        self._answered(device)

    def clear(self) -> frozenset[str]:
        """Give up all pulls, since the round ends; returns digests of blobs without a verdict.

        These are the blobs of all pulls in progress and of results that are being checked.
        """
        results = [*(result for result, _ in self._pulls.values()), *self._under_check.values()]
        self._pulls.clear()
        self._in_vain.clear()
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
            StorageError: the disk fails; StalledError: it is full.
        """
        for fetch in self._pulls.get(device, (None, []))[1]:
            if fetch.ref.digest == message.digest:
                if isinstance(message, Gone):
                    fetch.gone()
                    return False
                try:
                    written = fetch.chunk(message, body)
                except StalledError:  # it is not the device that is silent
                    self._answered(device)
                    raise
                if written:
                    self._answered(device)
                return written  # no other fetch has this digest
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
        so that they cannot use up the budget. A pull ends if its device is `MUTE`.

        Raises:
            StorageError: the disk fails; StalledError: it is full.
        """
        self._expire(now_s, live)
        room = self._budget - sum(f.in_flight for _, fs in self._pulls.values() for f in fs)
        for device in sorted(self._pulls, key=self._rank):
            if device not in live:
                continue
            times, since_s = self._in_vain.get(device, (0, now_s))
            if times >= MUTE and now_s - since_s >= MUTE_S:
                told = f"{device} is connected, was asked {times} times, and sent nothing"
                yield device, TransferError(told)
                continue
            # Nothing is left to pull if an earlier device's fault ended the round.
            for fetch in self._pulls.get(device, (None, []))[1]:
                try:
                    want = fetch.wants(now_s, room=room) if room > 0 else None
                except TransferError as fault:
                    yield device, fault
                    break
                if want:
                    if device in self._silent:
                        self._in_vain[device] = times + 1, since_s
                    room -= len(want.chunks)
                    yield device, want
                if not fetch.done:
                    break  # one blob of a device at a time, in the order of the result

    def _expire(self, now_s: float, live: frozenset[str]) -> None:
        """Chunks that are lost free their room."""
        for device, (_, fetches) in self._pulls.items():
            for fetch in fetches:
                if device not in live:
                    fetch.forget_asked()
                    self._in_vain.pop(device, None)
                elif fetch.expire(now_s):
                    self._silent.add(device)

    def _answered(self, device: str) -> None:
        self._silent.discard(device)
        self._in_vain.pop(device, None)

    def _rank(self, device: str) -> tuple[bool, int]:
        return device in self._silent, sum(fetch.in_flight for fetch in self._pulls[device][1])
