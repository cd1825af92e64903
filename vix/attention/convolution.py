"""Separable convolution: Yu et al., "MetaFormer Baselines for Vision" (ConvFormer), 2022."""

import torch
from torch import Tensor, nn

from vix.layers.maps import DepthwiseConv, MapMixer, channels_first, channels_last
from vix.layers.tokens import TokenGrid
from vix.types import Positive, PositiveFloat


class Convolution(MapMixer):
    """Linear layer to ``ratio`` times the width, StarReLU, depthwise convolution of the map, linear layer back; no biases.

    kernel: side of the depthwise convolution in tokens; odd.
    ratio: width between the linear layers over ``dim``.

    Raises ValueError where ``kernel`` is even.
    """

    def __init__(self, dim: int, tokens: TokenGrid, *, kernel: Positive = 7, ratio: PositiveFloat = 2.0) -> None:
        super().__init__(tokens)
        if kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} is even; nearest odd: {kernel - 1}, {kernel + 1}")
        inner = max(1, round(ratio * dim))
        self.expand = nn.Linear(dim, inner, bias=False)
        self.activation = StarReLU()
        self.conv = DepthwiseConv(inner, kernel)
        self.proj = nn.Linear(inner, dim, bias=False)

    def forward_map(self, x_BYXD: Tensor) -> Tensor:
        x_BFYX = self.conv(channels_first(self.activation(self.expand(x_BYXD))))
        return self.proj(channels_last(x_BFYX))


class StarReLU(nn.Module):
    """scale · relu(x)² + bias with two learned numbers, which start so that normal input keeps mean 0 and variance 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(0.8944)), nn.Parameter(torch.tensor(-0.4472))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.relu().square() + self.bias
