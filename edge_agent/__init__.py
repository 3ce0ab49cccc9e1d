"""The device: trains what an order says with plain ONNX Runtime, and returns what it asks for.

Besides the standard library it needs `ondevice`, `wire` and a few packages (`pyproject.toml`,
dependencies), but never torch.

An order passes through these modules:

    agent             the loop: takes events, asks `rounds`, and does what it says
    rounds            the rules: what follows from an order, a result, a receipt, the clock
    journal           the open order, its result, and which weights file is current
    supply            pulls what the order needs: artifact, state, teacher
    worker            the thread that does the order, by `ondevice.work`
    ondevice.order    begins the work: reads, checks and merges tensors
    ondevice.work     trains and extracts
    ondevice.outcome  packs the payloads into blobs
    kept              the files that the order leaves for the next one of its run

What a restart does after a power cut:

    before the order is in the journal    the orchestrator sends the order again
    while blobs are pulled                it pulls what is missing
    while it works                        it does the work again, from the files kept before
    once the result is in the journal     it offers the result until there is a receipt
    once the receipt is in the journal    it waits for the next order

docs/how-a-round-works.md follows a result on to the server.
"""

import sys
from os.path import dirname, realpath  # `pathlib` takes milliseconds to import

# Import our own `wire`, which lies beside this package, even if the current folder or the
# environment has another package of that name.
sys.path.insert(0, dirname(dirname(realpath(__file__))))  # noqa: PTH120

from wire import early  # before onnxruntime, because importing wire turns off its reports

early.listen("edge_agent", "edge-agent")
