"""Random mixing: Yu et al., "MetaFormer Baselines for Vision" (RandFormer), 2022."""

import torch
from torch import Tensor, nn

from vix.layers.tokens import TokenGrid


class Random(nn.Module):
    """Mixes all tokens with one frozen random matrix; the number of tokens is fixed. No parameters.

    The N×N matrix, the softmax of uniform numbers over each row, is a buffer: it is saved with the model and not trained.
    """

    needs_norm = True  # read by LeViT: without one, the mean of the tokens doubles in each block

    def __init__(self, dim: int, tokens: TokenGrid) -> None:
        super().__init__()
        self.weights_NN: Tensor
        self.register_buffer("weights_NN", torch.rand(tokens.count, tokens.count).softmax(dim=-1))

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.weights_NN @ x_BND
