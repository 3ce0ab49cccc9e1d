"""What both sides of the broker agree on, and the tools that every other folder builds on.

    on the wire     `frames`, `messages/`, `topics`, `link`, `address`
    payloads        `tensors`, `codecs/`, `blobs`
    artifacts       `artifact`, `manifest/`, `costs`, `names`, `classes`
    signed          `signing`, `release`, `measurement`
    on disk         `storage`, `locks`
    in a process    `records`, `checks`, `logs`, `early`, `stopping`, `extras`, `seeds`, `errors`

It needs the standard library, numpy and msgpack. Three more packages are imported in one file each:
zstandard (`wire.codecs.entropy`), paho-mqtt (`wire.link`) and cryptography (`wire.signing`).
Nothing else of Stillhouse is imported here.
"""

import os

__version__ = "0.1.0"

# Since 1.29 ONNX Runtime's wheels for Linux report to their maker what is run, unless this is set
# before they are imported. Each of our programs imports this package first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
