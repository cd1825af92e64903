"""External attention: Guo et al., "Beyond Self-attention: External Attention using Two Linear Layers", 2021."""

import torch.nn.functional as F
from torch import Tensor, nn

from vix.layers.precision import no_autocast, upcast_fp32
from vix.layers.tokens import TokenGrid
from vix.types import Positive


class ExternalAttention(nn.Module):
    """Attention to ``memory_size`` learned keys and values that all images share, linear in the number of tokens.

    Weights are normalized twice: a softmax over the tokens, then over the S memory entries to a sum of 1.

    memory_size: number S of keys and values.
    """

    def __init__(self, dim: int, tokens: TokenGrid, *, memory_size: Positive = 64) -> None:
        super().__init__()
        self.keys = nn.Linear(dim, memory_size, bias=False)
        self.values = nn.Linear(memory_size, dim, bias=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        logits_BNS = self.keys(x_BND)
        dtype = logits_BNS.dtype
        with no_autocast(logits_BNS):
            # Both normalizations in one softmax: the first one alone may be 0 for all entries of a token.
            (logits_BNS,) = upcast_fp32(logits_BNS)
            weights_BNS = (logits_BNS - logits_BNS.logsumexp(dim=1, keepdim=True)).softmax(dim=2)
        return F.linear(weights_BNS.to(dtype), self.values.weight)
