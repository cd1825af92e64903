"""Mixers that work on the 2-D map of the tokens."""

import math
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vix.errors import nearest_divisors
from vix.layers.tokens import TokenGrid


class MapMixer(nn.Module):
    """Base of mixers of the token map alone: (B, N, D) → (B, N, D), by the subclass's ``forward_map``.

    A class token is on no place of the map, so such a mixer could not show it the image: with one it is refused
    (``map_only``, read by :func:`vix.build.mixer_builder`).

    tokens: their grid, without a class token.
    """

    map_only: ClassVar[bool] = True

    def __init__(self, tokens: TokenGrid) -> None:
        super().__init__()
        self.tokens = tokens

    def forward_map(self, x_BYXD: Tensor) -> Tensor:
        """(B, Y, X, D) → the same shape."""
        raise NotImplementedError

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BYXD = x_BND.unflatten(1, (self.tokens.height, self.tokens.width))
        return self.forward_map(x_BYXD).flatten(1, 2)


class MapBatchNorm(nn.BatchNorm2d):
    """BatchNorm of maps (B, D, Y, X), computed with the channels last in memory.

    PyTorch 2.14 on a CPU returns a wrong gradient for a single image in the usual layout if the gradient of the output comes
    from tokens (B, Y·X, D): with one image, the strides of both layouts are the same but for that of the images.
    """

    def forward(self, map_BDYX: Tensor) -> Tensor:
        return super().forward(map_BDYX.contiguous(memory_format=torch.channels_last))


def channels_first(x_BYXD: Tensor) -> Tensor:
    """(B, Y, X, D) → (B, D, Y, X), in the same memory: convolutions take it as ``channels_last``."""
    return x_BYXD.permute(0, 3, 1, 2)


def channels_last(x_BDYX: Tensor) -> Tensor:
    """(B, D, Y, X) → (B, Y, X, D), in the same memory."""
    return x_BDYX.permute(0, 2, 3, 1)


def split_windows(x_BYXD: Tensor, window: int) -> Tensor:
    """(B, Y, X, D) → windows (B, W, T, D) of window × window = T tokens, W of them in raster order."""
    return rearrange(x_BYXD, "b (y s) (x t) d -> b (y x) (s t) d", s=window, t=window)


def merge_windows(x_BWTD: Tensor, height: int, width: int) -> Tensor:
    """The reverse of :func:`split_windows`: → (B, Y, X, D)."""
    side = math.isqrt(x_BWTD.shape[2])
    return rearrange(x_BWTD, "b (y x) (s t) d -> b (y s) (x t) d", y=height // side, x=width // side, s=side)


def window_options(name: str, window: int, tokens: TokenGrid) -> None:
    """Raises ValueError where a window does not divide the map, naming the nearest sides that do."""
    side = math.gcd(tokens.height, tokens.width)
    if side % window:
        near = nearest_divisors(side, window)
        raise ValueError(f"{name}={window} does not divide the map of {tokens.height}×{tokens.width} tokens; nearest: {near}")
