"""Softmax attention: Vaswani et al., "Attention is all you need", 2017; the mixer of ViT (Dosovitskiy et al., 2021)."""

from collections.abc import Callable
from typing import Literal

from torch import nn

from vix.layers.attend import ScaledDotProduct
from vix.layers.heads import MultiHeadMixer
from vix.layers.tokens import TokenGrid
from vix.types import Fraction, Positive


class Softmax(MultiHeadMixer):
    """Multi-head attention softmax(q·kᵀ/√E)·v; time grows with N², memory with N (``fused``) or N² (``explicit``).

    heads: number H of heads.
    dim_head: width E of one head; None: dim / heads.
    implementation: ``fused`` is PyTorch's scaled_dot_product_attention, which does not store the N×N matrix (except for
        short sequences on a CPU, where that is faster); ``explicit`` stores it, as in the paper's measurements.
    dropout: probability of dropping an attention weight in training.

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
        self.attend = ScaledDotProduct(implementation, dropout, position_bias(heads) if position_bias else None)
