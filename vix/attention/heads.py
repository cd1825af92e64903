"""Splitting the width into heads, and the arithmetic that must not follow autocast."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vix.checks import nearest_divisors

# Queries or keys up to which a CPU attends 2 to 3 times faster with their matrix than with PyTorch's fused kernel.
FEW = 128


def head_width(dim: int, heads: int, dim_head: int | None) -> int:
    """Width E of one head: ``dim_head``, or an equal share of ``dim`` where that is None.

    Raises ValueError where ``heads`` does not divide ``dim`` and no ``dim_head`` is given.
    """
    if dim_head is not None:
        return dim_head
    if dim % heads:
        raise ValueError(f"heads={heads} does not divide the width {dim}; nearest that do: {nearest_divisors(dim, heads)}")
    return dim // heads


def split_heads(x_BNF: Tensor, heads: int) -> Tensor:
    """(B, N, H·E) → (B, H, N, E)."""
    return rearrange(x_BNF, "b n (h e) -> b h n e", h=heads)


def merge_heads(x_BHNE: Tensor) -> Tensor:
    """(B, H, N, E) → (B, N, H·E)."""
    return rearrange(x_BHNE, "b h n e -> b n (h e)")


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32, or as they are where they are wider (float64 in gradient checks)."""
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Context in which matrix products keep the dtype of their inputs, whatever autocast surrounds it."""
    # The meta device, which knows shapes alone, has no autocast to switch off.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def softmax_attention(
    q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, bias_1HNM: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q·kᵀ/√E + bias)·v in the fastest way, which seldom stores the N×M matrix: → (B, H, N, E)."""
    if not q_BHNE.is_cpu:
        return F.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME, attn_mask=bias_1HNM, dropout_p=dropout)
    with no_autocast(q_BHNE):
        dtype = v_BHME.dtype
        q_BHNE, k_BHME = at_least_float32(q_BHNE, k_BHME)
        if bias_1HNM is not None:
            (bias_1HNM,) = at_least_float32(bias_1HNM)
        if min(q_BHNE.shape[2], k_BHME.shape[2]) <= FEW:
            return explicit_attention(q_BHNE, k_BHME, v_BHME, bias_1HNM, dropout)
        # The fused backward is no faster there in bfloat16, and less exact.
        (v_BHME,) = at_least_float32(v_BHME)
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
        weights = at_least_float32(logits)[0].softmax(dim=-1).to(dtype)
        ctx.save_for_backward(weights)
        ctx.dtype = logits.dtype
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weights, gradient = at_least_float32(*ctx.saved_tensors, gradient)
        weighted = weights * gradient
        return (weighted - weights * weighted.sum(dim=-1, keepdim=True)).to(ctx.dtype), None


def kernel_average(q_BHNM: Tensor, k_BHNM: Tensor, v_BHNE: Tensor, floor: float = 0.0) -> Tensor:
    """q(kᵀv) / qΣk with ``floor`` added to all features: attention of positive weights and no N×N matrix: → (B, H, N, E)."""
    # A last column of ones becomes the sum of the weights.
    v_BHNE = F.pad(v_BHNE, (0, 1), value=1.0)
    context_BHME = k_BHNM.mT @ v_BHNE
    if floor:  # worked out of the products: added to features it would be a pass over the largest tensors
        context_BHME = context_BHME + floor * v_BHNE.sum(dim=-2, keepdim=True)
    out_BHNE = q_BHNM @ context_BHME
    if floor:
        out_BHNE = out_BHNE + floor * context_BHME.sum(dim=-2, keepdim=True)
    return out_BHNE[..., :-1] / out_BHNE[..., -1:]
