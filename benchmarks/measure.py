"""The memory traffic of a step's operations, and the peak rates of a device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vix.analysis.measure import measure


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write: each input and output tensor once per operation; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns, arguments = func._schema.returns, func._schema.arguments
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and "empty" not in func.__name__:
            self.bytes += size(args) + size(kwargs) + size(result)
            if not returns:  # in-place operations on lists of tensors read and write them
                written = [value for value, a in zip(args, arguments, strict=False) if a.alias_info and a.alias_info.is_write]
                self.bytes += size(written)
        return result


def size(tree: Any) -> int:
    """Bytes of all tensors in a nested structure; an expanded tensor counts only its storage."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)


def traffic(step: Callable[[], object]) -> int:
    """Bytes that the operations of one step read and write, without caching between operations."""
    with Traffic() as counted:
        step()
    return counted.bytes


class Ceilings(NamedTuple):
    """Peak rates of the device: FLOP/s of a large matrix product, and bytes/s (read plus written) of a large copy."""

    matmul: float
    copy: float


def ceilings(device: torch.device, dtype: torch.dtype, quick: bool) -> Ceilings:
    """Measure the peak rates.

    dtype: of the matrix product, as in the steps.   quick: use small sizes.
    """
    gpu = device.type == "cuda"
    side, count = (8192, 2**30) if gpu else (2048, 2**28)
    if quick:
        side, count = 512, 2**20
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = 0.1 if quick else 1.0
    matmul = measure(lambda: torch.mm(a, b, out=product), device, seconds)
    copying = measure(lambda: target.copy_(source), device, seconds)
    return Ceilings(2 * side**3 / matmul.seconds, 2 * count / copying.seconds)
