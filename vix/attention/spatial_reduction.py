"""Spatial-reduction attention: Wang et al., "Pyramid Vision Transformer", 2021, and "PVT v2", 2022."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vix.layers.attend import softmax_attention
from vix.layers.heads import head_width, merge_heads, split_heads
from vix.layers.precision import cast_to_autocast, upcast_fp32
from vix.layers.tokens import TokenGrid
from vix.types import Positive


class SpatialReduction(nn.Module):
    """Softmax attention of all tokens to the keys and values of a smaller map.

    heads, dim_head: number of heads H and width E of one; ``dim_head`` None means dim / heads.
    reduction: ``conv``: a strided convolution and LayerNorm (PVT); ``pool``: the mean over a grid of ``size`` × ``size``, a
        1×1 convolution, LayerNorm and GELU, linear in the number of tokens (PVT v2).
    stride: rows and columns that the convolution reduces to one. A map that it does not divide is padded with zeros.
    size: side of the pooled map in tokens.

    A class token is among the queries, but not among the keys.

    Raises ValueError where ``heads`` does not divide ``dim``, ``stride`` exceeds the rows of tokens, or ``size`` does.
    """

    def __init__(
        self,
        dim: int,
        tokens: TokenGrid,
        *,
        heads: Positive = 4,
        dim_head: Positive | None = None,
        reduction: Literal["conv", "pool"] = "conv",
        stride: Positive = 4,
        size: Positive = 7,
    ) -> None:
        super().__init__()
        side = min(tokens.height, tokens.width)
        if reduction == "conv" and stride > side:
            raise ValueError(f"stride={stride} is more than the {tokens.height}×{tokens.width} tokens; at most {side}")
        if reduction == "pool" and size > side:
            raise ValueError(f"size={size} is more than the {tokens.height}×{tokens.width} tokens; at most {side}")
        self.heads, self.tokens, self.size = heads, tokens, size if reduction == "pool" else None
        inner = heads * head_width(dim, heads, dim_head)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim)
        kernel = 1 if reduction == "pool" else stride
        self.reduce = nn.Conv2d(dim, dim, kernel, stride=kernel)
        self.norm = nn.LayerNorm(dim)
        # Otherwise the convolution would leave out the last rows and columns.
        self.padding = (0, -tokens.width % kernel, 0, -tokens.height % kernel)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = cast_to_autocast(x_BND)
        _, map_BDYX = self.tokens.split(x_BND)
        if self.size is not None:
            map_BDYX = F.adaptive_avg_pool2d(map_BDYX, self.size)
        elif any(self.padding):  # F.pad copies also where there is nothing to pad
            map_BDYX = F.pad(map_BDYX, self.padding)
        (reduced_BMD,) = upcast_fp32(self.reduce(map_BDYX).flatten(2).mT)  # for the norm's gradients, as in Block
        reduced_BMD = self.norm(reduced_BMD)
        if self.size is not None:
            reduced_BMD = F.gelu(reduced_BMD)
        q_BHNE = split_heads(self.to_q(x_BND), self.heads)
        k_BHME, v_BHME = (split_heads(t, self.heads) for t in self.to_kv(reduced_BMD).chunk(2, dim=-1))
        return self.to_out(merge_heads(softmax_attention(q_BHNE, k_BHME, v_BHME)))
