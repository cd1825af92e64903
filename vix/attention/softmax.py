"""Softmax attention: Vaswani et al., "Attention is all you need", 2017; the mixer of ViT (Dosovitskiy et al., 2021)."""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vix.attention.heads import head_width, merge_heads, split_heads
from vix.checks import Fraction, Positive
from vix.tokens import TokenGrid


class Softmax(nn.Module):
    """softmax(q·kᵀ/√E)·v over all tokens; time grows with N², memory with N (``fused``) or N² (``explicit``).

    heads, dim_head: number of heads H and width E of one; ``dim_head`` None means dim / heads.
    implementation: ``fused`` is PyTorch's scaled_dot_product_attention, which never stores the N×N matrix; ``explicit``
        writes that matrix out, as the paper's measurements did.
    dropout: probability with which an attention weight is dropped in training.

    Raises ValueError where ``heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        tokens: TokenGrid,
        rotary: Callable[[int], nn.Module] | None = None,
        *,
        heads: Positive = 4,
        dim_head: Positive | None = None,
        implementation: Literal["fused", "explicit"] = "fused",
        dropout: Fraction = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.implementation, self.dropout = heads, implementation, dropout
        width = head_width(dim, heads, dim_head)
        self.to_qkv = nn.Linear(dim, 3 * heads * width, bias=False)
        self.to_out = nn.Linear(heads * width, dim)
        self.rotate = rotary(width) if rotary else nn.Identity()

    def forward(self, x_BND: Tensor) -> Tensor:
        q_BHNE, k_BHNE, v_BHNE = (split_heads(t, self.heads) for t in self.to_qkv(x_BND).chunk(3, dim=-1))
        q_BHNE, k_BHNE = self.rotate(q_BHNE), self.rotate(k_BHNE)
        dropout = self.dropout if self.training else 0.0
        if self.implementation == "fused":
            out_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE, dropout_p=dropout)
        else:
            weights_BHNN = (q_BHNE @ k_BHNE.mT * q_BHNE.shape[-1] ** -0.5).softmax(dim=-1)
            out_BHNE = F.dropout(weights_BHNN, dropout).to(v_BHNE.dtype) @ v_BHNE
        return self.to_out(merge_heads(out_BHNE))
