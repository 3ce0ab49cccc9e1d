"""What both sides of the broker agree on: frames, messages, topics, codecs, blobs, errors.

The ground floor: standard library, numpy, msgpack, and each in one file alone zstandard
(`wire.codecs.entropy`) and paho-mqtt (`wire.link`). It imports nothing else of Stillhouse.
"""
