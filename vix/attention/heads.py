"""Splitting the width into heads, and the arithmetic that must not follow autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from einops import rearrange
from torch import Tensor

from vix.checks import nearest_divisors


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


def kernel_average(q_BHNM: Tensor, k_BHNM: Tensor, v_BHNE: Tensor) -> Tensor:
    """q(kᵀv) / qΣk, attention with the weights q·k of positive features and no N×N matrix: → (B, H, N, E)."""
    context_BHME = k_BHNM.mT @ v_BHNE
    weight_BHN1 = q_BHNM @ k_BHNM.sum(dim=-2).unsqueeze(-1)
    return q_BHNM @ context_BHME / weight_BHN1
