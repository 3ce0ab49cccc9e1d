"""What both sides of the broker agree on: frames, messages, topics, codecs, blobs, errors.

The ground floor: standard library, numpy, msgpack, and each in one file alone zstandard
(`wire.codecs.entropy`), paho-mqtt (`wire.link`) and cryptography (`wire.signing`). It imports
nothing else of Stillhouse.
"""

import os

__version__ = "0.1.0"

# From 1.29 on ONNX Runtime's wheels for Linux report to their maker what is run, unless this is set
# before they are imported; whatever process of ours imports them has imported this before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
