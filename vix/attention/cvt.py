"""CvT's attention: Wu et al., "CvT: Introducing Convolutions to Vision Transformers", 2021."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from vix.layers.attend import ScaledDotProduct
from vix.layers.heads import head_width, merge_heads, split_heads
from vix.layers.maps import MapBatchNorm
from vix.layers.precision import upcast_fp32
from vix.layers.tokens import TokenGrid, join
from vix.types import Fraction, Positive


class CvTAttention(nn.Module):
    """Softmax attention with queries, keys and values from depthwise convolutions of the token map (Wu et al., 2021).

    heads: number H of heads.
    dim_head: width E of one head; None: dim / heads.
    conv_kernel: kernel size of the depthwise convolutions; odd.
    kv_stride: stride of the convolution for keys and values. 2 reduces their number to a quarter, as in CvT at 224 pixels.
    implementation, dropout: as in :class:`vix.attention.softmax.Softmax`.

    Raises ValueError where ``heads`` does not divide ``dim``, ``conv_kernel`` is even, ``kv_stride`` exceeds the side of the
    grid, or ``kv_stride`` is more than 1 together with rotary positions or a position bias.
    """

    def __init__(
        self,
        dim: int,
        tokens: TokenGrid,
        rotary: Callable[[int], nn.Module] | None = None,
        position_bias: Callable[[int], nn.Module] | None = None,
        *,
        heads: Positive = 4,
        dim_head: Positive | None = 64,
        conv_kernel: Positive = 3,
        kv_stride: Positive = 1,
        implementation: Literal["fused", "explicit"] = "fused",
        dropout: Fraction = 0.0,
    ) -> None:
        super().__init__()
        if conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel={conv_kernel} is even; nearest odd: {conv_kernel - 1}, {conv_kernel + 1}")
        side = min(tokens.height, tokens.width)
        if kv_stride > side:
            raise ValueError(f"kv_stride={kv_stride} is more than the {tokens.height}×{tokens.width} tokens; at most {side}")
        if kv_stride > 1 and (rotary or position_bias):
            raise ValueError(f"kv_stride={kv_stride} subsamples the keys, which this posenc does not support; use 1")
        self.heads = heads
        width = head_width(dim, heads, dim_head)
        self.to_q = ConvProjection(dim, heads * width, tokens, conv_kernel, 1)
        self.to_kv = ConvProjection(dim, 2 * heads * width, tokens, conv_kernel, kv_stride)
        self.to_out = nn.Linear(heads * width, dim)
        self.rotate = rotary(width) if rotary else nn.Identity()
        self.attend = ScaledDotProduct(implementation, dropout, position_bias(heads) if position_bias else None)

    def qkv(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BHNE = split_heads(self.to_q(x_BND), self.heads)
        k_BHME, v_BHME = (split_heads(t, self.heads) for t in self.to_kv(x_BND).chunk(2, dim=-1))
        return self.rotate(q_BHNE), self.rotate(k_BHME), v_BHME

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.to_out(merge_heads(self.attend(*self.qkv(x_BND))))


class ConvProjection(nn.Module):
    """Depthwise convolution of the token map, BatchNorm, linear layer without bias: (B, N, D) → (B, M, F).

    A class token, which is not part of the map, passes through the linear layer only, as in CvT.
    """

    def __init__(self, dim: int, width: int, tokens: TokenGrid, kernel: int, stride: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.conv = nn.Conv2d(dim, dim, kernel, stride, padding=kernel // 2, groups=dim, bias=False)
        self.norm = MapBatchNorm(dim)
        self.project = nn.Linear(dim, width, bias=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        prefix_BPD, map_BDYX = self.tokens.split(x_BND)
        conv_BDYX = self.conv(map_BDYX)
        if conv_BDYX.is_cpu:  # its BatchNorm accumulates bfloat16 gradients inaccurately; a GPU's does not
            (conv_BDYX,) = upcast_fp32(conv_BDYX)
        return self.project(join(prefix_BPD, self.norm(conv_BDYX)))
