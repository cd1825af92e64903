"""Vision transformer: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; with any mixer, the paper's ViX."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from vix.layers.blocks import MLP, PreNormBlock, drop_rates
from vix.layers.embedding import Embedding
from vix.layers.posenc import PositionEncoding
from vix.layers.tokens import TokenGrid, join, to_tokens
from vix.types import Fraction, Positive, PositiveFloat


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2021).

    Embedding, position encoding, ``depth`` pre-norm blocks, LayerNorm, pooling, linear head.

    dim: width D of the tokens.
    depth: number of blocks.
    mlp_ratio: hidden width of the MLPs divided by ``dim``.
    pool: ``class_token`` prepends a learned token and classifies from it (ViT); ``mean`` averages all tokens (MLP-Mixer).
    dropout: dropout probability of the mixers' and MLPs' outputs and the MLPs' hidden layer.
    stochastic_depth: probability of dropping a branch in the last block; it increases linearly from 0 in the first block.
    layer_scale: initial value of a learned gain per channel of the branches' outputs; None: none.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        classes: int,
        embedding: Callable[..., Embedding],
        posenc: Callable[..., PositionEncoding],
        attention: Callable[..., nn.Module],
        *,
        dim: Positive = 128,
        depth: Positive = 4,
        mlp_ratio: PositiveFloat = 2.0,
        pool: Literal["class_token", "mean"] = "class_token",
        dropout: Fraction = 0.0,
        stochastic_depth: Fraction = 0.0,
        layer_scale: PositiveFloat | None = None,
    ) -> None:
        super().__init__()
        self.embedding = embedding(image_size=image_size, channels=channels, dim=dim)
        self.class_token = nn.Parameter(torch.randn(dim)) if pool == "class_token" else None
        tokens = TokenGrid(*self.embedding.grid, prefix=int(pool == "class_token"))
        self.posenc = posenc(dim=dim, tokens=tokens)
        self.blocks = nn.Sequential(
            *(
                PreNormBlock(
                    dim,
                    attention(dim=dim, tokens=tokens, posenc=self.posenc, layer=i),
                    MLP(dim, mlp_ratio, dropout),
                    dropout,
                    stochastic_depth=rate,
                    layer_scale=layer_scale,
                )
                for i, rate in enumerate(drop_rates(stochastic_depth, depth))
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        map_BDYX = self.embedding(images_BCYX)
        if self.class_token is None:
            x_BND = to_tokens(map_BDYX)
        else:
            x_BND = join(self.class_token.expand(map_BDYX.shape[0], 1, -1), map_BDYX)
        x_BND = self.blocks(self.posenc(x_BND))
        # LayerNorm acts on each token separately, so only the class token needs it.
        pooled_BD = self.norm(x_BND).mean(dim=1) if self.class_token is None else self.norm(x_BND[:, 0])
        return self.head(pooled_BD)
