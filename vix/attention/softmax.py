"""Softmax attention: Vaswani et al., "Attention is all you need", 2017; the mixer of ViT (Dosovitskiy et al., 2021)."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from vix.attention.heads import explicit_attention, head_width, merge_heads, softmax_attention, split_heads
from vix.checks import Fraction, Positive
from vix.tokens import TokenGrid


class Softmax(nn.Module):
    """softmax(q·kᵀ/√E)·v over all tokens; time grows with N², memory with N (``fused``) or N² (``explicit``).

    heads, dim_head: number of heads H and width E of one; ``dim_head`` None means dim / heads.
    implementation: ``fused`` is PyTorch's scaled_dot_product_attention, which never stores the N×N matrix (a CPU does store
        one of few tokens: it is faster); ``explicit`` writes that matrix out, as the paper's measurements did.
    dropout: probability with which an attention weight is dropped in training.

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
        super().__init__()
        self.heads = heads
        width = head_width(dim, heads, dim_head)
        self.to_qkv = nn.Linear(dim, 3 * heads * width, bias=False)
        self.to_out = nn.Linear(heads * width, dim)
        self.rotate = rotary(width) if rotary else nn.Identity()
        self.attend = Attend(implementation, dropout, position_bias(heads) if position_bias else None)

    def qkv(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BHNE, k_BHNE, v_BHNE = (split_heads(t, self.heads) for t in self.to_qkv(x_BND).chunk(3, dim=-1))
        return self.rotate(q_BHNE), self.rotate(k_BHNE), v_BHNE

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.to_out(merge_heads(self.attend(*self.qkv(x_BND))))


class Attend(nn.Module):
    """softmax(q·kᵀ/√E + bias)·v, which every softmax mixer ends in: (B, H, N, E), twice (B, H, M, E) → (B, H, N, E).

    implementation, dropout: as in :class:`Softmax`.
    position_bias: None, or a module that returns the bias (H, N, M) when called with nothing.
    """

    def __init__(self, implementation: str, dropout: float, position_bias: nn.Module | None) -> None:
        super().__init__()
        self.implementation, self.dropout, self.position_bias = implementation, dropout, position_bias

    def forward(self, q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        bias_1HNM = self.position_bias().to(q_BHNE.dtype).unsqueeze(0) if self.position_bias is not None else None
        attend = softmax_attention if self.implementation == "fused" else explicit_attention
        return attend(q_BHNE, k_BHME, v_BHME, bias_1HNM, dropout)
