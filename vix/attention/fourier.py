"""Fourier mixing: Lee-Thorp et al., "FNet: Mixing Tokens with Fourier Transforms", 2021."""

import torch
from torch import Tensor, nn

from vix.layers.precision import upcast_fp32
from vix.layers.tokens import TokenGrid


class Fourier(nn.Module):
    """Real part of the unnormalized 2-D discrete Fourier transform over tokens and channels: (B, N, D) → (B, N, D).

    It has no parameters and no options.
    """

    def __init__(self, dim: int, tokens: TokenGrid) -> None:
        super().__init__()

    def forward(self, x_BND: Tensor) -> Tensor:
        # PyTorch has no bfloat16 FFT, and its float16 FFT supports powers of two only.
        (x_BND,) = upcast_fp32(x_BND)
        return torch.fft.fft2(x_BND, dim=(-2, -1)).real
