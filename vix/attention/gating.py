"""Spatial gating: Liu et al., "Pay Attention to MLPs" (gMLP), 2021."""

import torch.nn.functional as F
from torch import Tensor, nn

from vix.layers.precision import upcast_fp32
from vix.layers.tokens import TokenGrid
from vix.types import PositiveFloat


class SpatialGating(nn.Module):
    """u ⊙ (W·LN(v) + 1) with u, v the halves of GELU(W_in x) and W an N×N matrix: the number of tokens is fixed.

    W starts near 0 and its bias at 1, so that a block starts as an MLP of each token.

    ratio: width of u and v together over ``dim``.
    """

    def __init__(self, dim: int, tokens: TokenGrid, *, ratio: PositiveFloat = 2.0) -> None:
        super().__init__()
        half = max(1, round(ratio * dim / 2))
        self.expand = nn.Linear(dim, 2 * half)
        self.norm = nn.LayerNorm(half)
        self.mix = TokenMix(tokens.count, tokens.count)
        self.proj = nn.Linear(half, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        u_BNF, v_BNF = F.gelu(self.expand(x_BND)).chunk(2, dim=-1)
        (v_BNF,) = upcast_fp32(v_BNF)  # for the norm's gradients, as in Block
        return self.proj(u_BNF * self.mix(self.norm(v_BNF).mT).mT)


class TokenMix(nn.Linear):
    """W and its bias, with their initialization, which no family replaces by its own."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1e-6)
        nn.init.ones_(self.bias)
