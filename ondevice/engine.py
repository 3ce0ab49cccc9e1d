"""What trains and evaluates models between `order.begin` and `outcome.finish`.

There are two: ONNX Runtime for the one device that it runs on (`ondevice.work`), and PyTorch for a
stack of simulated devices (`orchestrator.simulation.stack`).
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
    """What came of training.

    Attributes:
        state: every state tensor; optimizer tensors have the names that an artifact gives them.
        loss: sum over the last epoch's batches of each batch's mean loss.
        correct: samples of the last epoch's batches that were classified right.
        flops: of one optimizer's step, 2 x the multiply-adds of the convolutions and matrix
            products that this engine computes for it. The compiled step of ONNX Runtime has more of
            them than PyTorch's, 6 to 7 % of resnet8 and caldas_cnn: it computes sums of batch norm
            as matrix products, and gradients of filters on padded maps.
    """

    state: Tensors
    loss: float
    correct: float
    flops: int


class Extracted(NamedTuple):
    """Feature maps (B, *shape), or None, and logits (B, C) of samples that follow each other.

    `flops` are those of a whole batch, which the last of a view may not fill.
    """

    features: NDArray[np.float32] | None
    logits: NDArray[np.float32]
    flops: int


class Engine(Protocol):
    """Trains and evaluates one model; it knows neither payloads nor what is kept."""

    def train(self, starts: Sequence[Start]) -> Sequence[Trained]:
        """Train each device's weights on its images.

        Args:
            starts: one or more. All orders have one model, learning rate, temperature, proximal
                weight and number of epochs, which is over 0.
        """

    def extract(
        self, start: Start, state: Mapping[str, NDArray[Any]], *, maps: bool
    ) -> Iterator[Extracted]:
        """Outputs in evaluation mode, batch by batch.

        The samples come in their order, one of the order's views after the other.

        Args:
            start: of the device whose images are looked at.
            state: that the model has.
            maps: whether feature maps are wanted beside the logits.

        Yields:
            arrays that hold until the next ones are asked for.
        """
