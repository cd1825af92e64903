"""Focal modulation: Yang et al., "Focal Modulation Networks", 2022."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vix.layers.maps import DepthwiseConv, MapMixer, channels_first, channels_last
from vix.layers.tokens import TokenGrid
from vix.types import Positive

Kernels = Annotated[tuple[Positive, ...], Field(min_length=1)]


class FocalModulation(MapMixer):
    """q ⊙ W_h(Σ g_l·c_l): contexts c_l from ever larger neighborhoods, up to the whole map, weighted by learned gates g_l.

    c_l is the GELU of a depthwise convolution of the context before it; the last one is the GELU of its mean over the map.

    kernels: sides of the depthwise convolutions in tokens; odd.

    Raises ValueError where a kernel is even.
    """

    def __init__(self, dim: int, tokens: TokenGrid, *, kernels: Kernels = (3, 5)) -> None:
        super().__init__(tokens)
        even = [kernel for kernel in kernels if kernel % 2 == 0]
        if even:
            shown = ",".join(map(str, kernels))
            raise ValueError(f"kernels=[{shown}]: {even[0]} is even; nearest odd: {even[0] - 1}, {even[0] + 1}")
        self.dim = dim
        self.to_qcg = nn.Linear(dim, 2 * dim + len(kernels) + 1)
        self.convs = nn.ModuleList(DepthwiseConv(dim, k) for k in kernels)
        self.modulator = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward_map(self, x_BYXD: Tensor) -> Tensor:
        q_BYXD, context_BYXD, gates_BYXL = self.to_qcg(x_BYXD).split([self.dim, self.dim, len(self.convs) + 1], dim=-1)
        modulated_BYXD = torch.zeros_like(q_BYXD)
        for i, conv in enumerate(self.convs):
            context_BYXD = F.gelu(channels_last(conv(channels_first(context_BYXD))))
            modulated_BYXD = modulated_BYXD + context_BYXD * gates_BYXL[..., i : i + 1]
        whole_B11D = F.gelu(context_BYXD.mean(dim=(1, 2), keepdim=True))
        modulated_BYXD = modulated_BYXD + whole_B11D * gates_BYXL[..., -1:]
        return self.proj(q_BYXD * self.modulator(modulated_BYXD))
