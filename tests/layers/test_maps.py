"""Layers of token maps."""

import pytest
import torch
import torch.nn.functional as F
from common import traced
from torch import nn

from vix.attention.neighbourhood import NeighborhoodAttention
from vix.attention.window import WindowAttention
from vix.layers import maps
from vix.layers.maps import DepthwiseConv, DepthwiseGradients, MapBatchNorm
from vix.layers.tokens import TokenGrid, join


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_of_one_image(images: int, training: bool) -> None:
    """The gradient is that of the formula, also for a single map whose gradient comes from tokens."""
    torch.manual_seed(0)
    norm = MapBatchNorm(8).double().train(training)
    for parameter in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(parameter, 0.5, 1.5)
    map_BDYX, weights_BND = torch.randn(images, 8, 4, 4).double().requires_grad_(), torch.randn(images, 16, 8).double()

    mean_D, variance_D = norm.running_mean.clone(), norm.running_var.clone()
    if training:
        mean_D, variance_D = map_BDYX.mean((0, 2, 3)), map_BDYX.var((0, 2, 3), unbiased=False)
    scale_D = norm.weight / (variance_D + norm.eps).sqrt()
    by_hand_BDYX = map_BDYX * scale_D.view(-1, 1, 1) + (norm.bias - mean_D * scale_D).view(-1, 1, 1)

    gradients = []
    for normed_BDYX in (norm(map_BDYX), by_hand_BDYX):
        x_BND = join(torch.empty(images, 0, 8).double(), normed_BDYX)
        gradients += torch.autograd.grad((x_BND * weights_BND).sum(), map_BDYX)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_gradients_of_a_depthwise_convolution(kernel: int, dtype: torch.dtype, bound: float) -> None:
    """Those of compiled code, by matrix products, against PyTorch's; the map is higher than wide."""
    torch.manual_seed(0)
    map_BDYX = torch.randn(3, 6, 9, 8, dtype=dtype, requires_grad=True)
    filters_D1KK = torch.randn(6, 1, kernel, kernel, dtype=dtype, requires_grad=True)
    gradient_BDYX = torch.randn(3, 6, 9, 8, dtype=dtype)
    ours = DepthwiseGradients.apply(map_BDYX, filters_D1KK)
    theirs = F.conv2d(map_BDYX, filters_D1KK, padding=kernel // 2, groups=6)
    assert torch.equal(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(y, (map_BDYX, filters_D1KK), gradient_BDYX) for y in (ours, theirs)), strict=True):
        assert a.dtype == dtype
        assert (a - b).norm() <= bound * b.norm()


def test_a_compiled_depthwise_convolution() -> None:
    """Compiled code takes the gradients above, also within autocast, and uncompiled code PyTorch's."""
    torch.manual_seed(0)
    layer, map_BDYX = DepthwiseConv(8, 5), torch.randn(2, 8, 8, 8).to(torch.bfloat16)
    compiled, graphs = traced(layer)
    gradients = []
    for forward in (layer, compiled):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out_BDYX = forward(map_BDYX)
        out_BDYX.float().square().sum().backward()
        assert out_BDYX.dtype == torch.bfloat16
        assert layer.weight.grad is not None
        gradients.append(layer.weight.grad.clone())
    assert len(graphs) == 2
    assert "convolution" in graphs[0]
    assert "convolution_backward" not in graphs[1]
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[0].norm()


@pytest.mark.parametrize("mixer", [WindowAttention(16, TokenGrid(16, 16), 1), NeighborhoodAttention(16, TokenGrid(16, 16))])
def test_windows_are_attended_on_four_axes(mixer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused kernels take no fifth one, and would be replaced by one that stores all attention weights.

    Explicit attention on a CPU takes it, and computes the same without copies of the bias.
    """
    shapes = []
    attend = maps.softmax_attention

    def record(*tensors: torch.Tensor) -> torch.Tensor:
        shapes.extend(t.ndim for t in tensors)
        return attend(*tensors)

    monkeypatch.setattr(maps, "softmax_attention", record)
    x = torch.randn(2, 256, 16)
    explicit = mixer(x)
    assert shapes == [5, 5, 5, 5]
    shapes.clear()
    monkeypatch.setattr(maps, "is_explicit", lambda *_: False)  # as on a GPU
    torch.testing.assert_close(mixer(x), explicit)
    assert shapes == [4, 4, 4, 4]
