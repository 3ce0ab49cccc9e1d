"""Similarity of images: PSNR and SSIM."""

import torch
from torch import Tensor
from torch.nn import functional as F

SSIM_WINDOW, SSIM_SIGMA, SSIM_C1, SSIM_C2 = 11, 1.5, 0.01**2, 0.03**2


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (N,), of images (N, C, H, W) from 0 to 1."""
    return -10 * torch.log10((a - b).square().mean((1, 2, 3)).clamp(min=1e-10))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (N,) of images (N, C, H, W) from 0 to 1, mean over channels.

    Wang, Bovik, Sheikh, Simoncelli 2004, equation 13, with their Gaussian window of 11x11 pixels
    and deviation 1.5, K1 = 0.01, K2 = 0.03, over the windows that lie inside the image.
    """
    channels, at = a.shape[1], torch.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    line = torch.exp(-at.to(a.dtype).square() / (2 * SSIM_SIGMA**2))
    window = (torch.outer(line, line) / line.sum() ** 2).expand(channels, 1, -1, -1)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=channels)

    u, v = mean(a), mean(b)
    spread_a, spread_b, joint = mean(a * a) - u * u, mean(b * b) - v * v, mean(a * b) - u * v
    top = (2 * u * v + SSIM_C1) * (2 * joint + SSIM_C2)
    return (top / ((u * u + v * v + SSIM_C1) * (spread_a + spread_b + SSIM_C2))).mean((1, 2, 3))
