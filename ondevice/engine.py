"""The interface of engines, which train and evaluate models for an order.

An engine trains between `order.begin` and `outcome.finish`. `finish` lets it extract feature maps
and logits. There are two engines: ONNX Runtime for a real device (`ondevice.work`), and PyTorch for
a stack of simulated devices (`orchestrator.simulation.stack`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ondevice.kept import Tensors
from ondevice.order import Start


@dataclass(frozen=True)
class Trained:
    """The result of training.

    Attributes:
        state: every state tensor; optimizer tensors have the names that an artifact gives them.
        loss: each batch's mean loss, summed over the last epoch's batches.
        correct: number of samples in the last epoch's batches that were classified correctly.
        flops: FLOPs of one optimizer's step: 2 x the multiply-adds of the convolutions and matrix
            products that this engine computes. ONNX Runtime's compiled step has 6 to 7 % more than
            PyTorch's for resnet8 and caldas_cnn: it computes sums of batch norm as matrix
            products, and gradients of filters on padded maps.
    """

    state: Tensors
    loss: float
    correct: float
    flops: int


class Extracted(NamedTuple):
    """Feature maps (B, *shape), or None, and logits (B, C) of consecutive samples.

    `flops` counts a whole batch, even if the last samples of a view do not fill it.
    """

    features: NDArray[np.float32] | None
    logits: NDArray[np.float32]
    flops: int


class Engine(Protocol):
    """Trains and evaluates one model; it knows neither payloads nor kept state."""

    def train(self, starts: Sequence[Start]) -> Sequence[Trained]:
        """Train each device's weights on its images.

        Args:
            starts: one or more. All have the same model, learning rate, temperature, proximal
                weight and number of epochs (at least 1).
        """

    def extract(
        self, start: Start, state: Mapping[str, NDArray[Any]], *, maps: bool
    ) -> Iterator[Extracted]:
        """The model's outputs in evaluation mode, batch by batch.

        All samples come in order for the first of the order's views, then for the next view.

        Args:
            start: the device's order, with its images.
            state: the model's tensors.
            maps: whether feature maps are wanted besides the logits.

        Yields:
            Arrays that are valid until the next ones are requested.
        """
