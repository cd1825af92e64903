"""Agent attention: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", 2023."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix.layers.attend import softmax_attention
from vix.layers.heads import MultiHeadMixer, merge_heads, split_heads
from vix.layers.tokens import TokenGrid, join
from vix.types import Positive


class AgentAttention(MultiHeadMixer):
    """softmax(q·Aᵀ/√E) · softmax(A·kᵀ/√E) · v: agent tokens A collect the values, and queries read them from the agents.

    heads, dim_head: number of heads H and width E of one; ``dim_head`` None means dim / heads.
    agents: number of agent tokens; for ``source=pooled`` a square number, at most the tokens of the map.
    source: learned agents, or the queries' means over a grid of the map, as the authors'.
    conv: add a depthwise 3×3 convolution of the values on the map, as the authors do; a class token is left out of it.

    The authors' biases of the two attentions are not part of it.

    Raises ValueError where ``heads`` does not divide ``dim``, or ``agents`` does not suit ``source=pooled``.
    """

    no_weight_decay = ("agents_HAE",)

    def __init__(
        self,
        dim: int,
        tokens: TokenGrid,
        rotary: Callable[[int], nn.Module] | None = None,
        *,
        heads: Positive = 4,
        dim_head: Positive | None = None,
        agents: Positive = 49,
        source: Literal["learned", "pooled"] = "learned",
        conv: bool = False,
    ) -> None:
        super().__init__(dim, rotary, heads, dim_head, out_bias=False)
        self.tokens, self.side = tokens, math.isqrt(agents)
        if source == "pooled":
            largest = min(tokens.height, tokens.width)
            if self.side**2 != agents or self.side > largest:
                near = sorted({min(self.side, largest) ** 2, min(self.side + 1, largest) ** 2})
                raise ValueError(f"agents={agents} form no square grid on the map; nearest: {', '.join(map(str, near))}")
        # A bare parameter, called neither weight nor bias, like a table of positions.
        self.agents_HAE = nn.Parameter(torch.randn(heads, agents, self.dim_head)) if source == "learned" else None
        inner = heads * self.dim_head
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner) if conv else None

    def attend(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
        if self.agents_HAE is not None:
            agents_BHAE = self.agents_HAE.to(q_BHNE.dtype).unsqueeze(0).expand(q_BHNE.shape[0], -1, -1, -1)
        else:
            _, map_BFYX = self.tokens.split(merge_heads(q_BHNE))
            pooled_BFYX = F.adaptive_avg_pool2d(map_BFYX, self.side)
            agents_BHAE = split_heads(pooled_BFYX.flatten(2).mT, self.heads)
        collected_BHAE = softmax_attention(agents_BHAE, k_BHNE, v_BHNE)
        return softmax_attention(q_BHNE, agents_BHAE, collected_BHAE)

    def forward(self, x_BND: Tensor) -> Tensor:
        q_BHNE, k_BHNE, v_BHNE = self.qkv(x_BND)
        out_BNF = merge_heads(self.attend(q_BHNE, k_BHNE, v_BHNE))
        if self.conv is not None:
            prefix_BPF, map_BFYX = self.tokens.split(merge_heads(v_BHNE))
            out_BNF = out_BNF + join(torch.zeros_like(prefix_BPF), self.conv(map_BFYX))
        return self.to_out(out_BNF)
