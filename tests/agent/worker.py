"""A device that does one order without a broker: FOLDER. Prints the peak memory of training.

It holds what a real agent holds: its libraries, images, blob store and journal.
"""

import sys
import threading
from pathlib import Path

from edge_agent import main as _main  # noqa: F401 - the command's imports take memory too
from edge_agent.agent import Agent
from ondevice.config import AgentConfig
from ondevice.kept import KeptFile
from ondevice.work import Desk, perform
from wire.address import BrokerAddress
from wire.artifact import open_artifact
from wire.messages import BlobRef, Order

folder = Path(sys.argv[1])
artifact = open_artifact(folder / "artifact")
address = BrokerAddress("mqtt://localhost")  # never connected to: `run` is not called
config = AgentConfig("device", "fleet", folder / "images.npz", folder / "state", address, threads=1)
device = Agent(config)
order = Order("run", 1, 1, BlobRef(artifact.digest, 0, 1024), 1, 0.01, 0, {"state": "float32"})
desk = Desk(device.images, device.blobs, config.threads, lambda *_: None, threading.Event())
print(perform(order, artifact, KeptFile(), desk).metrics["train_peak_bytes"])
