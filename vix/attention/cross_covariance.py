"""Cross-covariance attention: El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", 2021."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix.layers.heads import MultiHeadMixer
from vix.layers.maps import MapBatchNorm
from vix.layers.precision import no_autocast, upcast_fp32
from vix.layers.tokens import TokenGrid, join
from vix.types import Positive


class CrossCovariance(MultiHeadMixer):
    """Attention among the E channels of each head instead of the N tokens: linear in the number of tokens.

    The E×E weights are the softmax of τ·k̂q̂ᵀ, where each channel of q̂ and k̂ has length 1 over all tokens, with one learned
    temperature τ per head.

    heads, dim_head: number of heads H and width E of one; ``dim_head`` None means dim / heads.
    local_interaction: add two depthwise 3×3 convolutions of the map with BatchNorm and GELU between them to the result. The
        authors give them a residual branch of their own in every block. A class token is left as it is.

    Raises ValueError where ``heads`` does not divide ``dim``.
    """

    no_weight_decay = ("temperature_H11",)

    def __init__(
        self,
        dim: int,
        tokens: TokenGrid,
        *,
        heads: Positive = 4,
        dim_head: Positive | None = None,
        local_interaction: bool = False,
    ) -> None:
        super().__init__(dim, None, heads, dim_head)
        self.tokens = tokens
        # A bare parameter, called neither weight nor bias.
        self.temperature_H11 = nn.Parameter(torch.ones(heads, 1, 1))
        self.local = LocalInteraction(dim) if local_interaction else None

    has_attention_weights = False  # it weighs channels, not tokens

    def attend(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
        with no_autocast(q_BHNE):
            q_BHNE, k_BHNE = (F.normalize(t, dim=2) for t in upcast_fp32(q_BHNE, k_BHNE))
            logits_BHEE = k_BHNE.mT @ q_BHNE * self.temperature_H11
            # Transposed: row by row the weights of an output channel.
            weights_BHEE = logits_BHEE.softmax(dim=-2).to(v_BHNE.dtype)
        return v_BHNE @ weights_BHEE

    def forward(self, x_BND: Tensor) -> Tensor:
        out_BND = super().forward(x_BND)
        if self.local is None:
            return out_BND
        prefix_BPD, map_BDYX = self.tokens.split(x_BND)
        return out_BND + join(torch.zeros_like(prefix_BPD), self.local(map_BDYX))


class LocalInteraction(nn.Sequential):
    """Depthwise 3×3 convolution, GELU, BatchNorm, depthwise 3×3 convolution: (B, D, Y, X) → the same shape."""

    def __init__(self, dim: int) -> None:
        convolutions = [nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2)]
        super().__init__(convolutions[0], nn.GELU(), MapBatchNorm(dim), convolutions[1])
