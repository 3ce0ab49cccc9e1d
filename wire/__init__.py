"""What both sides of the broker agree on: frames, messages, topics, codecs, blobs, errors.

The ground floor: standard library, numpy, msgpack and (in `wire.link` alone) paho-mqtt. It imports
nothing else of Stillhouse.
"""
