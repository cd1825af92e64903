"""Exceptions from autocast: operations that run in at least float32."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def upcast_fp32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert the tensors to at least float32; wider dtypes (float64 in gradient checks) stay."""
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def round_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)`` of what the forward pass of an ``autograd.Function`` returns.

    PyTorch 2.11 compiles gradients of zero for a function whose last operation returns its input (PyTorch's issue 180642), so
    there is no operation where there is nothing to convert.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Context that disables autocast on the device of ``x``: operations keep the dtype of their inputs."""
    # The meta device has no autocast.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def cast_to_autocast(x: Tensor) -> Tensor:
    """Convert ``x`` to the dtype of the surrounding autocast, if there is one.

    For an input of several layers: each would convert it and keep a copy of its own for the backward pass.
    """
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
