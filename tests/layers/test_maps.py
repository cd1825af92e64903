"""Layers of token maps."""

import pytest
import torch
from torch import nn

from vix.layers.maps import MapBatchNorm
from vix.layers.tokens import join


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
