"""Softmax attention: Vaswani et al., "Attention is all you need", 2017; the mixer of ViT (Dosovitskiy et al., 2021)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from vix.layers.attend import ScaledDotProduct
from vix.layers.heads import MultiHeadMixer
from vix.layers.precision import upcast_fp32
from vix.layers.tokens import TokenGrid
from vix.types import Fraction, Positive


class Softmax(MultiHeadMixer):
    """Multi-head attention softmax(q·kᵀ/√E)·v; time grows with N², memory with N (``fused``) or N² (``explicit``).

    heads: number H of heads.
    dim_head: width E of one head; None: dim / heads.
    implementation: ``fused`` is PyTorch's scaled_dot_product_attention, which does not store the N×N matrix (except for
        short sequences on a CPU, where that is faster); ``explicit`` stores it, as in the paper's measurements.
    dropout: probability of dropping an attention weight in training.
    qk_norm: RMSNorm of each query and key, with learned gains (Dehghani et al., "Scaling Vision Transformers to 22 Billion
        Parameters", 2023, with LayerNorm); before the rotation of rotary positions.
    locality: locality self-attention (Lee et al., "Vision Transformer for Small-Size Datasets", 2021): a learned temperature
        per head, and no token attends to itself.

    Raises ValueError where ``heads`` does not divide ``dim``, and for ``locality`` of a single token.
    """

    no_weight_decay = ("scale_H11",)

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
        qk_norm: bool = False,
        locality: bool = False,
    ) -> None:
        super().__init__(dim, rotary, heads, dim_head)
        bias = position_bias(heads) if position_bias else None
        self.norm_q, self.norm_k = (nn.RMSNorm(self.dim_head) if qk_norm else None for _ in range(2))
        # A bare parameter, called neither weight nor bias. It multiplies 1/√E.
        self.scale_H11 = nn.Parameter(torch.ones(heads, 1, 1)) if locality else None
        self.attend = ScaledDotProduct(implementation, dropout, NoSelf(tokens.count, bias) if locality else bias)

    def normalized(self, q_BHNE: Tensor, k_BHNE: Tensor) -> tuple[Tensor, Tensor]:
        if self.norm_q is not None and self.norm_k is not None:
            dtype = q_BHNE.dtype
            q_BHNE, k_BHNE = upcast_fp32(q_BHNE, k_BHNE)
            q_BHNE, k_BHNE = self.norm_q(q_BHNE).to(dtype), self.norm_k(k_BHNE).to(dtype)
        if self.scale_H11 is not None:
            q_BHNE = q_BHNE * self.scale_H11.to(q_BHNE.dtype)
        return q_BHNE, k_BHNE


class NoSelf(nn.Module):
    """Bias of attention logits, (1, N, N) or (H, N, N), with −∞ on the diagonal.

    count: number N of tokens.
    bias: module that returns a bias (H, N, N), to which the diagonal is added; None: no other bias.
    """

    def __init__(self, count: int, bias: nn.Module | None) -> None:
        super().__init__()
        if count < 2:
            raise ValueError("locality=true: needs at least 2 tokens, because none attends to itself; use locality=false")
        self.bias = bias
        self.diagonal_1NN: Tensor
        diagonal_1NN = torch.zeros(1, count, count).masked_fill(torch.eye(count, dtype=torch.bool), float("-inf"))
        self.register_buffer("diagonal_1NN", diagonal_1NN, persistent=False)

    def forward(self) -> Tensor:
        return self.diagonal_1NN if self.bias is None else self.bias() + self.diagonal_1NN
