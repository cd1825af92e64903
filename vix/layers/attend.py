"""Attention of queries to keys: softmax, fused or written out, and linear in the number of keys."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix.layers.precision import no_autocast, upcast_fp32

# Queries or keys up to which a CPU attends 2 to 3 times faster with their matrix than with PyTorch's fused kernel.
EXPLICIT_MAX_LEN = 128


def softmax_attention(
    q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, bias_1HNM: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q·kᵀ/√E + bias)·v in the fastest way, which seldom stores the N×M matrix: → (B, H, N, E)."""
    if not q_BHNE.is_cpu:
        return F.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME, attn_mask=bias_1HNM, dropout_p=dropout)
    with no_autocast(q_BHNE):
        dtype = v_BHME.dtype
        q_BHNE, k_BHME = upcast_fp32(q_BHNE, k_BHME)
        if bias_1HNM is not None:
            (bias_1HNM,) = upcast_fp32(bias_1HNM)
        if min(q_BHNE.shape[-2], k_BHME.shape[-2]) <= EXPLICIT_MAX_LEN:
            return explicit_attention(q_BHNE, k_BHME, v_BHME, bias_1HNM, dropout)
        # The fused backward is no faster there in bfloat16, and less exact.
        (v_BHME,) = upcast_fp32(v_BHME)
        out_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME, attn_mask=bias_1HNM, dropout_p=dropout)
    return out_BHNE.to(dtype)


def explicit_attention(
    q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, bias_1HNM: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """The same with the matrix written out and its softmax in float32 at least: of it, what is kept has the values' type."""
    # Scaled before the product, which in float16 could overflow otherwise.
    logits_BHNM = (q_BHNE * q_BHNE.shape[-1] ** -0.5) @ k_BHME.mT
    if bias_1HNM is not None:
        logits_BHNM = logits_BHNM + bias_1HNM
    weights_BHNM: Tensor = RoundedSoftmax.apply(logits_BHNM, v_BHME.dtype)
    return F.dropout(weights_BHNM, dropout) @ v_BHME


class RoundedSoftmax(torch.autograd.Function):
    """softmax over the last axis in float32 at least, rounded to ``dtype``, of which nothing else is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, dtype: torch.dtype) -> Tensor:
        weights = upcast_fp32(logits)[0].softmax(dim=-1).to(dtype)
        ctx.save_for_backward(weights)
        ctx.dtype = logits.dtype
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weights, gradient = upcast_fp32(*ctx.saved_tensors, gradient)
        weighted = weights * gradient
        return (weighted - weights * weighted.sum(dim=-1, keepdim=True)).to(ctx.dtype), None


def linear_attention(
    q_BHNM: Tensor, k_BHNM: Tensor, v_BHNE: Tensor, floor: float = 0.0, eps: float = 0.0
) -> Tensor:
    """q(kᵀv) / qΣk with ``floor`` added to all features: attention of positive weights and no N×N matrix: → (B, H, N, E)."""
    # A last column of ones becomes the sum of the weights.
    v_BHNE = F.pad(v_BHNE, (0, 1), value=1.0)
    context_BHME = k_BHNM.mT @ v_BHNE
    if floor:  # worked out of the products: added to features it would be a pass over the largest tensors
        context_BHME = context_BHME + floor * v_BHNE.sum(dim=-2, keepdim=True)
    out_BHNE = q_BHNM @ context_BHME
    if floor:
        out_BHNE = out_BHNE + floor * context_BHME.sum(dim=-2, keepdim=True)
    return out_BHNE[..., :-1] / (out_BHNE[..., -1:] + eps if eps else out_BHNE[..., -1:])


class ScaledDotProduct(nn.Module):
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
