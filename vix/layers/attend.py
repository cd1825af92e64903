"""Attention of queries to keys: softmax attention (fused or explicit) and linear attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix.layers.fused_attention import fused_attention, same_heads
from vix.layers.precision import no_autocast, round_to, upcast_fp32

# Up to this many queries or keys, explicit attention is 2 to 3 times faster on a CPU than PyTorch's fused kernel.
EXPLICIT_MAX_LEN = 128


def softmax_attention(
    q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, bias_1HNM: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Scaled dot-product attention, softmax(q·kᵀ/√E + bias)·v, by the fastest implementation for the device.

    The N×M matrix is stored only on a CPU, for short sequences (EXPLICIT_MAX_LEN).

    q_BHNE, k_BHME, v_BHME: queries (B, H, N, E), keys and values (B, H, M, E).
    bias_1HNM: bias on the attention logits, (1, H, N, M); None adds nothing.
    dropout: probability of dropping an attention weight.
    Returns (B, H, N, E).
    """
    if not q_BHNE.is_cpu:
        return F.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME, attn_mask=bias_1HNM, dropout_p=dropout)
    with no_autocast(q_BHNE):
        dtype = v_BHME.dtype
        q_BHNE, k_BHME = upcast_fp32(q_BHNE, k_BHME)
        if bias_1HNM is not None:
            (bias_1HNM,) = upcast_fp32(bias_1HNM)
        if is_explicit(q_BHNE, k_BHME):
            return explicit_attention(q_BHNE, k_BHME, v_BHME, bias_1HNM, dropout)
        # On a CPU the fused backward pass is no faster in bfloat16, and less accurate.
        (v_BHME,) = upcast_fp32(v_BHME)
        if bias_1HNM is None and not dropout and same_heads(q_BHNE, k_BHME, v_BHME):
            out_BHNE = fused_attention(q_BHNE, k_BHME, v_BHME)
        else:
            out_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME, attn_mask=bias_1HNM, dropout_p=dropout)
    return out_BHNE.to(dtype)


def is_explicit(q_BHNE: Tensor, k_BHME: Tensor) -> bool:
    """Whether :func:`softmax_attention` stores the N×M matrix; the tensors may then have further leading axes."""
    return q_BHNE.is_cpu and min(q_BHNE.shape[-2], k_BHME.shape[-2]) <= EXPLICIT_MAX_LEN


def explicit_attention(
    q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, bias_1HNM: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """The same as :func:`softmax_attention`, but computes and stores the N×M matrix of attention weights.

    The softmax runs in at least float32; the stored weights have the dtype of the values.
    """
    # Scaled before the product, which could otherwise overflow in float16.
    logits_BHNM = (q_BHNE * q_BHNE.shape[-1] ** -0.5) @ k_BHME.mT
    if bias_1HNM is not None:
        logits_BHNM = logits_BHNM + bias_1HNM
    weights_BHNM: Tensor = RoundedSoftmax.apply(logits_BHNM, v_BHME.dtype)
    return F.dropout(weights_BHNM, dropout) @ v_BHME


class RoundedSoftmax(torch.autograd.Function):
    """Softmax over the last axis in at least float32, rounded to ``dtype``; only the rounded weights are saved for backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, dtype: torch.dtype) -> Tensor:
        weights = round_to(upcast_fp32(logits)[0].softmax(dim=-1), dtype)
        ctx.save_for_backward(weights)
        ctx.dtype = logits.dtype
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weights, gradient = upcast_fp32(*ctx.saved_tensors, gradient)
        weighted = weights * gradient
        return (weighted - weights * weighted.sum(dim=-1, keepdim=True)).to(ctx.dtype), None


def linear_attention(q_BHNM: Tensor, k_BHNM: Tensor, v_BHNE: Tensor, floor: float = 0.0, eps: float = 0.0) -> Tensor:
    """Linear attention q(kᵀv) / qΣk with non-negative features; no N×N matrix is computed (Katharopoulos et al., 2020).

    q_BHNM, k_BHNM: features of queries and keys, (B, H, N, M).
    v_BHNE: values (B, H, N, E).
    floor: constant that is added to all features.
    eps: constant that is added to the denominator.
    Returns (B, H, N, E).
    """
    # The appended column of ones accumulates the sum of the weights, the denominator.
    v_BHNE = F.pad(v_BHNE, (0, 1), value=1.0)
    context_BHME = k_BHNM.mT @ v_BHNE
    if floor:  # applied to the products, because adding it to the features is a pass over the largest tensors
        context_BHME = context_BHME + floor * v_BHNE.sum(dim=-2, keepdim=True)
    out_BHNE = q_BHNM @ context_BHME
    if floor:
        out_BHNE = out_BHNE + floor * context_BHME.sum(dim=-2, keepdim=True)
    return out_BHNE[..., :-1] / (out_BHNE[..., -1:] + eps if eps else out_BHNE[..., -1:])


class ScaledDotProduct(nn.Module):
    """Scaled dot-product attention softmax(q·kᵀ/√E + bias)·v, shared by all softmax mixers.

    Queries (B, H, N, E), keys and values (B, H, M, E) → (B, H, N, E).

    implementation, dropout: as in :class:`vix.attention.softmax.Softmax`.
    position_bias: module that returns the bias (H, N, M) when called without arguments; None adds no bias.
    """

    def __init__(self, implementation: str, dropout: float, position_bias: nn.Module | None) -> None:
        super().__init__()
        self.implementation, self.dropout, self.position_bias = implementation, dropout, position_bias

    def forward(self, q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        bias_1HNM = self.position_bias().to(q_BHNE.dtype).unsqueeze(0) if self.position_bias is not None else None
        attend = softmax_attention if self.implementation == "fused" else explicit_attention
        return attend(q_BHNE, k_BHME, v_BHME, bias_1HNM, dropout)
