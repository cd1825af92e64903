"""Fourier mixing: Lee-Thorp et al., "FNet: Mixing Tokens with Fourier Transforms", 2021."""

from typing import Any

import torch
from torch import Tensor, nn

from vix.layers.precision import upcast_fp32
from vix.layers.tokens import TokenGrid


class Fourier(nn.Module):
    """Real part of the unnormalized 2-D discrete Fourier transform over tokens and channels: (B, N, D) → (B, N, D).

    It has no parameters and no options.
    """

    needs_norm = True  # read by LeViT: without one, values grow by about √(N·D) in each block

    def __init__(self, dim: int, tokens: TokenGrid) -> None:
        super().__init__()

    def forward(self, x_BND: Tensor) -> Tensor:
        # PyTorch has no bfloat16 FFT, and its float16 FFT supports powers of two only.
        (x_BND,) = upcast_fp32(x_BND)
        mixed_BND: Tensor = RealFourier.apply(x_BND)
        return mixed_BND


class RealFourier(torch.autograd.Function):
    """Real part of the transform of real tokens: a symmetric linear map, so that its gradient is the same transform."""

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor) -> Tensor:
        return real_fourier(x_BND)

    @staticmethod
    def backward(ctx: Any, gradient_BND: Tensor) -> Tensor:
        return real_fourier(gradient_BND)


def real_fourier(x_BND: Tensor) -> Tensor:
    """Re fft2(x), by transforms of half the size: tokens are real, so Y[n, d] and Y[-n, -d] have the same real part."""
    half_BND = torch.fft.fft(torch.fft.rfft(x_BND, dim=-1), dim=-2).real
    rest_BND = half_BND[..., 1 : (x_BND.shape[-1] + 1) // 2].flip(-2, -1).roll(1, dims=-2)
    return torch.cat((half_BND, rest_BND), dim=-1)
