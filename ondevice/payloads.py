"""Encodes what a device sends back for an order: feature maps, logits, weights, updates."""

import numpy as np
from numpy.typing import NDArray

from ondevice.kept import Tensors
from wire import frames, tensors
from wire.messages import Order


def cover(features: NDArray[np.float32], order: Order) -> NDArray[np.float32]:
    """Feature maps (B, *shape), clipped and with noise added if the order says so.

    Each sample's values are scaled to an L2 norm of at most `clip`. Each value gets Gaussian noise
    of deviation noise * clip: the Gaussian mechanism (Dwork and Roth 2014, appendix A), whose
    sensitivity is 2 clip, as one sample may be replaced by another. Negative values then become 0,
    as post-processing costs no privacy. The noise comes from the system's entropy, not from a seed,
    so that nobody can draw it again.
    """
    if not order.clip:
        return features
    flat = features.reshape(len(features), -1)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    clipped = flat * np.minimum(1, order.clip / np.maximum(norms, 1e-12)).astype(np.float32)
    if order.noise:
        drawn = np.random.default_rng().standard_normal(flat.shape, np.float32)
        clipped = np.maximum(clipped + np.float32(order.noise * order.clip) * drawn, 0)
    covered: NDArray[np.float32] = clipped.reshape(features.shape)
    return covered


def extract_record(
    order: Order,
    features: NDArray[np.float32] | None,
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    first: int,
) -> bytes:
    """One batch of the payload "features" or "logits", encoded.

    "features" has arrays (B, *shape), (B, C) and (B,); "logits" has only (B, C).

    Args:
        order: names the codec and the seed.
        features: feature maps of consecutive samples; None for the payload "logits".
        logits: logits of the same samples.
        labels: labels of the same samples.
        first: number of the first of these samples, counted through all views.

    Raises:
        CodecError: training diverged.
    """
    seed = order.seed + first
    if features is None:
        return tensors.pack([("logits", logits, order.returns["logits"])], seed=seed)
    record: list[tensors.Named] = [
        ("features", features, order.returns["features"]),
        ("logits", logits, "float32"),
        ("labels", labels.astype(np.uint16), "raw"),
    ]
    return tensors.pack(record, seed=seed)


def encode_state(order: Order, weights: Tensors) -> bytes:
    """Parameters and buffers, encoded in this order.

    Raises:
        CodecError: training diverged.
    """
    return tensors.pack(tensors.weights(weights, order.returns["state"]), seed=order.seed)


def encode_update(order: Order, update: Tensors, owed: Tensors) -> tuple[bytes, Tensors | None]:
    """An update, encoded, and with error feedback the part that its codec left out (else None).

    Error feedback (Seide et al. 2014; Karimireddy et al. 2019): e <- u + e - decode(encode(u + e)).

    Args:
        order: names the codec and the seed, and says whether there is feedback.
        update: u, the tensors by name; they are sent in this order.
        owed: e after the order `order.owed`, or {}.

    Raises:
        CodecError: training diverged.
    """
    if order.feedback:
        update = {name: array + owed.get(name, 0) for name, array in update.items()}
    packed = tensors.pack(tensors.weights(update, order.returns["update"]), seed=order.seed)
    if not order.feedback:
        return packed, None
    most = sum(array.size for array in update.values())
    frame = frames.decode(packed, max_bytes=len(packed))
    sent = tensors.unpack(frame, where="own update", most=most)
    return packed, {name: array - sent[name] for name, array in update.items()}
