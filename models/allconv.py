"""All-CNN-C, the all-convolutional network of Springenberg et al. 2014 (arXiv 1412.6806).

Model C of the paper's table 1 with each pooling layer replaced by a convolution of stride 2, as in
its section 2.1: nine convolutions, each with ReLU, the last one too, and the mean over the places
that remain, 6x6 of 32x32 images. Federated Dropout (Caldas et al. 2018) uses it for CIFAR-10.

    x (N,3,32,32) -> 96 -> 96 -> 96/2 -> 192 -> 192 -> 192/2 -> 192 unpadded -> 192 1x1
                  -> classes 1x1 -> mean -> logits (N,classes)

The paper's dropout is left out: a compiled step has no random numbers. Its table does not state
the padding; 6x6 places remain if the seventh convolution alone has none.
"""

from torch import Tensor, nn

from wire.errors import StillhouseError

_LEAST = 9  # pixels a side: two strides of 2 leave the 3 that an unpadded 3x3 filter needs


class AllCNN(nn.Module):
    """1,369,738 parameters with 3 input channels and 10 classes."""

    def __init__(self, classes: int, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, *sides = input_shape
        if min(sides) < _LEAST:
            raise StillhouseError(
                f"allconv: expected images of {_LEAST} pixels a side or more, got {input_shape}"
            )
        self.features = nn.Sequential(
            *_layer(channels, 96, 3, padding=1),
            *_layer(96, 96, 3, padding=1),
            *_layer(96, 96, 3, padding=1, stride=2),
            *_layer(96, 192, 3, padding=1),
            *_layer(192, 192, 3, padding=1),
            *_layer(192, 192, 3, padding=1, stride=2),
            *_layer(192, 192, 3),
            *_layer(192, 192, 1),
            *_layer(192, classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, channels, H, W)."""
        logits: Tensor = self.features(x).mean((2, 3))
        return logits


def _layer(
    inputs: int, outputs: int, kernel: int, *, padding: int = 0, stride: int = 1
) -> tuple[nn.Conv2d, nn.ReLU]:
    """A convolution with He's filters (2015, arXiv 1502.01852, equation 10) and its ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv, nn.ReLU()
