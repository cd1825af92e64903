"""Pooling: Yu et al., "MetaFormer Is Actually What You Need for Vision" (PoolFormer), 2022."""

import torch.nn.functional as F
from torch import Tensor

from vix.layers.maps import MapMixer, channels_first, channels_last
from vix.layers.tokens import TokenGrid
from vix.types import Positive


class Pooling(MapMixer):
    """Mean over each token's neighbors on the map, minus the token: the residual stream then adds it again. No parameters.

    size: side of the neighborhood in tokens; odd. Tokens outside the map do not count.

    Raises ValueError where ``size`` is even.
    """

    def __init__(self, dim: int, tokens: TokenGrid, *, size: Positive = 3) -> None:
        super().__init__(tokens)
        if size % 2 == 0:
            raise ValueError(f"size={size} is even; nearest odd: {size - 1}, {size + 1}")
        self.size = size

    def forward_map(self, x_BYXD: Tensor) -> Tensor:
        mean_BDYX = F.avg_pool2d(channels_first(x_BYXD), self.size, 1, self.size // 2, count_include_pad=False)
        return channels_last(mean_BDYX) - x_BYXD
