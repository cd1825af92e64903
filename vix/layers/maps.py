"""Mixers that work on the 2-D map of the tokens."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vix.errors import nearest_divisors
from vix.layers.attend import is_explicit, softmax_attention
from vix.layers.precision import cast_to_autocast
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


class DepthwiseConv(nn.Conv2d):
    """Convolution of each channel of a map (B, D, Y, X) with a filter of its own, without biases; the map keeps its size.

    In code compiled for a CPU the gradients are those of :class:`DepthwiseGradients`: PyTorch 2.14 copies the operands of its
    own into another layout there, and takes several times as long for 7×7 filters.

    dim: number of channels.
    kernel: side of the filters; odd.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)

    def forward(self, map_BDYX: Tensor) -> Tensor:
        if map_BDYX.device.type == "cpu" and torch.compiler.is_compiling() and torch.is_grad_enabled():
            out_BDYX: Tensor = DepthwiseGradients.apply(cast_to_autocast(map_BDYX), cast_to_autocast(self.weight))
            return out_BDYX
        return super().forward(map_BDYX)


class DepthwiseGradients(torch.autograd.Function):
    """Depthwise convolution whose gradients are a convolution (of the map) and matrix products (of the filters)."""

    @staticmethod
    def forward(ctx: Any, map_BDYX: Tensor, filters_D1KK: Tensor) -> Tensor:
        ctx.save_for_backward(map_BDYX, filters_D1KK)
        return depthwise(map_BDYX, filters_D1KK)

    @staticmethod
    def backward(ctx: Any, gradient_BDYX: Tensor) -> tuple[Tensor, Tensor]:
        map_BDYX, filters_D1KK = ctx.saved_tensors
        of_filters_D1KK = filter_gradient(map_BDYX, gradient_BDYX, filters_D1KK.shape[-1])
        return depthwise(gradient_BDYX, filters_D1KK.flip(-2, -1)), of_filters_D1KK


def depthwise(map_BDYX: Tensor, filters_D1KK: Tensor) -> Tensor:
    """Convolution of each channel with its filter; the map keeps its size."""
    return F.conv2d(map_BDYX, filters_D1KK, padding=filters_D1KK.shape[-1] // 2, groups=len(filters_D1KK))


def filter_gradient(map_BDYX: Tensor, gradient_BDYX: Tensor, kernel: int) -> Tensor:
    """Gradient (D, 1, K, K) of :func:`depthwise`'s filters.

    map_BDYX, gradient_BDYX: its input, and the gradient of its output.

    For each row of the filters, a product over all images and rows has the correlations of all pairs of columns; those of one
    distance are on a diagonal, whose sum is the gradient of one element.
    """
    height, margin = map_BDYX.shape[2], kernel // 2
    padded_DXYB = F.pad(map_BDYX, (margin,) * 4).permute(1, 3, 2, 0).contiguous()
    gradient_DTX = gradient_BDYX.permute(1, 2, 0, 3).flatten(1, 2)  # T: rows of images
    rows = []
    for y in range(kernel):
        pairs_DXX = padded_DXYB[:, :, y : y + height].flatten(2) @ gradient_DTX
        rows.append(torch.stack([pairs_DXX.diagonal(-x, 1, 2).sum(-1) for x in range(kernel)], dim=-1))
    return torch.stack(rows, dim=1).unsqueeze(1)


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


def window_attention(q_BWHTE: Tensor, k_BWHKE: Tensor, v_BWHKE: Tensor, bias_1WHTK: Tensor) -> Tensor:
    """Softmax attention in each of W windows.

    For fused kernels, which take four axes only, the windows are heads, each with its copy of the bias.

    q_BWHTE, k_BWHKE, v_BWHKE: queries (B, W, H, T, E), keys and values (B, W, H, K, E).
    bias_1WHTK: bias on the attention logits, (1, W, H, T, K); W and H may be 1.
    Returns (B, W, H, T, E).
    """
    if is_explicit(q_BWHTE, k_BWHKE):
        return softmax_attention(q_BWHTE, k_BWHKE, v_BWHKE, bias_1WHTK.to(q_BWHTE.dtype))
    windows, heads = q_BWHTE.shape[1:3]
    bias_1FTK = bias_1WHTK.expand(1, windows, heads, -1, -1).flatten(1, 2).to(q_BWHTE.dtype)  # F = W·H
    out_BFTE = softmax_attention(q_BWHTE.flatten(1, 2), k_BWHKE.flatten(1, 2), v_BWHKE.flatten(1, 2), bias_1FTK)
    return out_BFTE.unflatten(1, (windows, heads))


def window_options(name: str, window: int, tokens: TokenGrid) -> None:
    """Raises ValueError where a window does not divide the map, naming the nearest sides that do."""
    side = math.gcd(tokens.height, tokens.width)
    if side % window:
        near = nearest_divisors(side, window)
        raise ValueError(f"{name}={window} does not divide the map of {tokens.height}×{tokens.width} tokens; nearest: {near}")
