"""LeViT's attention: Graham et al., "LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference", 2021."""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vix.layers.attend import ScaledDotProduct
from vix.layers.heads import MultiHeadMixer, merge_heads
from vix.layers.tokens import TokenGrid
from vix.types import Fraction, Positive


class LeViTAttention(MultiHeadMixer):
    """Softmax attention with BatchNorm after every projection and a GELU before the last one (Graham et al., 2021).

    The last BatchNorm's weight is initialized to zero, so that a residual block starts as the identity. LeViT's 1×1
    convolutions are implemented as linear layers on tokens, which also apply to a class token.

    heads: number H of heads.
    dim_head: width E of one head; None: dim / heads.
    implementation, dropout: as in :class:`vix.attention.softmax.Softmax`.

    Raises ValueError where ``heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        tokens: TokenGrid,
        rotary: Callable[[int], nn.Module] | None = None,
        position_bias: Callable[[int], nn.Module] | None = None,
        *,
        heads: Positive = 4,
        dim_head: Positive | None = None,
        implementation: Literal["fused", "explicit"] = "fused",
        dropout: Fraction = 0.0,
    ) -> None:
        super().__init__(dim, rotary, heads, dim_head)
        self.norm_qkv = TokenBatchNorm(3 * heads * self.dim_head)
        self.norm_out = TokenBatchNorm(dim)
        nn.init.zeros_(self.norm_out.weight)
        self.attend = ScaledDotProduct(implementation, dropout, position_bias(heads) if position_bias else None)

    def qkv(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.rotated(self.norm_qkv(self.to_qkv(x_BND)))

    def forward(self, x_BND: Tensor) -> Tensor:
        out_BHNE = self.attend(*self.qkv(x_BND))
        return self.norm_out(self.to_out(F.gelu(merge_heads(out_BHNE))))


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm of each channel over all tokens of all images: (B, N, D) → (B, N, D)."""

    def forward(self, x_BND: Tensor) -> Tensor:
        return super().forward(x_BND.flatten(0, 1)).view(x_BND.shape)
