"""Arithmetic that does not follow autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def upcast_fp32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32, or as they are where they are wider (float64 in gradient checks)."""
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Context in which matrix products keep the dtype of their inputs, whatever autocast surrounds it."""
    # The meta device, which knows shapes alone, has no autocast to switch off.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
