"""Token-mixing MLP: Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", 2021."""

import torch.nn.functional as F
from torch import Tensor, nn

from vix.layers.tokens import TokenGrid
from vix.types import Positive


class TokenMLP(nn.Module):
    """Two linear layers with biases and a GELU along the token axis: (B, N, D) → (B, N, D).

    All channels share the weights. The number N of tokens is fixed.

    hidden: width between the two layers; None: the number of tokens.
    """

    def __init__(self, dim: int, tokens: TokenGrid, *, hidden: Positive | None = None) -> None:
        super().__init__()
        self.expand = nn.Linear(tokens.count, hidden or tokens.count)
        self.project = nn.Linear(hidden or tokens.count, tokens.count)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.project(F.gelu(self.expand(x_BND.mT))).mT
