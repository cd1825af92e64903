"""The convolution of Mamba-2 in compiled code; tests/attention/test_zoo.py compares the mixer with independent code."""

import pytest
import torch
import torch.nn.functional as F
from common import traced

from vix.attention.mamba2 import CausalConv, Mamba2, ShiftedProducts
from vix.layers.tokens import TokenGrid


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kernel", [1, 4, 12])
def test_shifted_products_are_a_convolution(kernel: int, dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    x_BNW = torch.randn(3, 9, 6, dtype=dtype, requires_grad=True)
    taps_WK, bias_W = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((6, kernel), (6,)))
    gradient_BNW = torch.randn(3, 9, 6, dtype=dtype)
    ours = ShiftedProducts.apply(x_BNW, taps_WK, bias_W)
    theirs = F.conv1d(x_BNW.mT, taps_WK.unsqueeze(1), bias_W, padding=kernel - 1, groups=6)[..., :9].mT
    pairs = zip(*(torch.autograd.grad(y, (x_BNW, taps_WK, bias_W), gradient_BNW) for y in (ours, theirs)), strict=True)
    for a, b in [(ours, theirs), *pairs]:
        assert a.dtype == dtype
        assert (a - b).norm() <= bound * b.norm()


def test_a_compiled_convolution() -> None:
    """Compiled code takes the products above, also within autocast, and uncompiled code PyTorch's convolution."""
    torch.manual_seed(0)
    layer, x_BNW = CausalConv((5, 3), 4), torch.randn(2, 16, 8).to(torch.bfloat16)
    compiled, graphs = traced(layer)
    results = []
    for forward in (layer, compiled):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            parts = forward(x_BNW)
        assert [part.shape[-1] for part in parts] == [5, 3]
        out_BNW = torch.cat(parts, dim=-1)
        out_BNW.float().square().sum().backward()
        assert out_BNW.dtype == torch.bfloat16
        assert layer.weight.grad is not None
        assert layer.bias is not None
        assert layer.bias.grad is not None
        results.append((out_BNW.detach().float(), layer.weight.grad.clone(), layer.bias.grad.clone()))
    assert len(graphs) == 2
    assert not any("convolution" in graph for graph in graphs)
    for uncompiled, of_graphs in zip(*results, strict=True):
        assert (of_graphs - uncompiled).norm() < 1e-2 * uncompiled.norm()


def test_large_activations_in_float16() -> None:
    """The products of the scan are in float32 then: in float16 these are infinite."""
    torch.manual_seed(0)
    mixer = Mamba2(32, TokenGrid(8, 12), heads=4)
    with torch.autocast("cpu", torch.float16):
        assert mixer(1000 * torch.randn(2, 96, 32)).isfinite().all()
