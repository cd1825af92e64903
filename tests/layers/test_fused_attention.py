"""Fused attention on a CPU: the numbers of PyTorch's function, with products by MKL."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor

from vix.layers.fused_attention import OPERATOR, fused_attention, products_by_mkl


def queries_keys_values(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries of 130 tokens, keys and values of 200, (2, 3, N, 8), as split from one projection."""
    return tuple(torch.randn(2, n, 3, 8, dtype=dtype).transpose(1, 2).requires_grad_() for n in (130, 200, 200))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_pytorchs_function(dtype: torch.dtype) -> None:
    tensors = queries_keys_values(dtype)
    ours, theirs = fused_attention(*tensors), F.scaled_dot_product_attention(*tensors)
    torch.testing.assert_close(ours, theirs)
    gradient = torch.randn_like(ours)
    for mine, exact in zip(*(torch.autograd.grad(out, tensors, gradient) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, exact)


def test_as_an_operator_of_pytorch() -> None:
    """Strides, shapes without values, gradients and tracing, by PyTorch's own check."""
    torch.library.opcheck(OPERATOR, queries_keys_values(torch.float32))


def test_any_layout_in_memory() -> None:
    """Channels that are no neighbours in memory, and a gradient that is one number."""
    q, k, v = (t.detach().mT.contiguous().mT.requires_grad_() for t in queries_keys_values(torch.float32))
    ours, theirs = fused_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours, theirs)
    for mine, exact in zip(*(torch.autograd.grad(out.sum(), (q, k, v)) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, exact)


def test_the_precision_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor: forward and backward compute with the precision with which oneDNN has no part."""
    precisions = []

    class Recorded:
        def __getattr__(self, name: str) -> Callable[..., object]:
            precisions.append(torch.get_float32_matmul_precision())
            return getattr(torch.ops.aten, name)

    tensors = queries_keys_values(torch.float32)
    monkeypatch.setattr("vix.layers.fused_attention.aten", Recorded())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        fused_attention(*tensors).sum().backward()
    finally:
        torch.set_float32_matmul_precision(before)
    assert precisions == ["highest", "highest"]


def test_the_precision_is_restored() -> None:
    before = torch.get_float32_matmul_precision()
    with products_by_mkl():
        assert torch.get_float32_matmul_precision() == "highest"

    def fail() -> None:
        with products_by_mkl():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_float32_matmul_precision() == before


def test_its_products_are_not_onednns() -> None:
    """oneDNN reports its operations: forward and backward have none, although other products are its own."""
    program = """
import torch
from vix.layers.fused_attention import fused_attention
torch.set_float32_matmul_precision("medium")
x = torch.randn(2, 2, 256, 16, requires_grad=True)
print("other product", flush=True)
torch.ones(128, 128) @ torch.ones(128, 128)
print("attention", flush=True)
fused_attention(x, x, x).sum().backward()
assert torch.get_float32_matmul_precision() == "medium"
"""
    environment = os.environ | {"ONEDNN_VERBOSE": "1"}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    other, ours = run.stdout.split("other product\n")[1].split("attention\n")
    if ",exec," not in other:
        pytest.skip("this processor's products are not oneDNN's")
    assert ",exec," not in ours
