"""Fourier mixing: Lee-Thorp et al., "FNet: Mixing Tokens with Fourier Transforms", 2021."""

import torch
from torch import Tensor, nn

from vix.attention.heads import at_least_float32
from vix.tokens import TokenGrid


class Fourier(nn.Module):
    """Real part of the unnormalised 2-D discrete Fourier transform over tokens and channels. No parameters."""

    def __init__(self, dim: int, tokens: TokenGrid) -> None:
        super().__init__()

    def forward(self, x_BND: Tensor) -> Tensor:
        # There is no bfloat16 FFT, and a float16 one for powers of two only.
        (x_BND,) = at_least_float32(x_BND)
        return torch.fft.fft2(x_BND, dim=(-2, -1)).real
