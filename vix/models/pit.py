"""PiT: Heo et al., "Rethinking Spatial Dimensions of Vision Transformers", 2021; with any mixer, the paper's PiX."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from vix.layers.blocks import MLP, Depths, PreNormBlock, per_stage
from vix.layers.embedding import Embedding
from vix.layers.posenc import PositionEncoding
from vix.layers.tokens import TokenGrid, join
from vix.types import Fraction, Positive, PositiveFloat


class PiT(nn.Module):
    """Embedding, class token, position, stages of pre-norm blocks with pooling between them, head on the class token.

    dim: width of each stage, a multiple of the one before.
    depth, heads, mlp_ratio: of each stage; ``heads`` None leaves them to ``attention.heads``. Where ``attention.dim_head`` is
        None the heads of all stages have the width of the first stage's.
    stride: of each pooling.
    dropout: probability at which outputs of mixers and MLPs are dropped in training.

    Raises ValueError where a list does not fit the number of stages, a width is no multiple of the one before, or a stride
    exceeds the rows of tokens.
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
        dim: Positive | tuple[Positive, ...] = (128, 256),
        depth: Depths = (2, 2),
        heads: Positive | tuple[Positive, ...] | None = None,
        mlp_ratio: PositiveFloat | tuple[PositiveFloat, ...] = (2.0, 1.0),
        stride: Positive | tuple[Positive, ...] = 2,
        dropout: Fraction = 0.0,
    ) -> None:
        super().__init__()
        stages = len(depth)
        dims, ratios = per_stage("dim", dim, stages), per_stage("mlp_ratio", mlp_ratio, stages)
        all_heads, strides = per_stage("heads", heads, stages), per_stage("stride", stride, stages - 1)
        for before, after in pairwise(dims):
            if after % before:
                shown, near = ",".join(map(str, dims)), max(1, round(after / before)) * before
                raise ValueError(f"dim=[{shown}]: {after} is no multiple of {before}, the stage before's; nearest: {near}")
        self.embedding = embedding(image_size=image_size, channels=channels, dim=dims[0])
        self.class_token = nn.Parameter(torch.randn(dims[0]))
        tokens = TokenGrid(*self.embedding.grid, prefix=1)
        self.posenc = posenc(dim=dims[0], tokens=tokens)
        self.blocks = nn.Sequential()
        for stage in range(stages):
            if stage:
                pool = ConvHeadPooling(dims[stage - 1], dims[stage], tokens, strides[stage - 1])
                self.blocks.append(pool)
                tokens = pool.out_tokens
            for _ in range(depth[stage]):
                mixer = attention(
                    dim=dims[stage],
                    tokens=tokens,
                    posenc=self.posenc,
                    heads=all_heads[stage],
                    inner=dims[0] * (all_heads[stage] or 1) // (all_heads[0] or 1),
                )
                mlp = MLP(dims[stage], ratios[stage], dropout)
                self.blocks.append(PreNormBlock(dims[stage], mixer, mlp, dropout))
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], classes)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        x_BND = self.embedding(images_BCYX).flatten(2).mT
        x_BND = torch.cat([self.class_token.expand(len(x_BND), 1, -1), x_BND], dim=1)
        return self.head(self.norm(self.blocks(self.posenc(x_BND))[:, 0]))


class ConvHeadPooling(nn.Module):
    """Strided depthwise 3×3 and 1×1 convolution of the map, a linear layer for the class token; to the next stage's width."""

    def __init__(self, dim: int, dim_after: int, tokens: TokenGrid, stride: int) -> None:
        super().__init__()
        self.tokens, self.out_tokens = tokens, tokens.strided(stride)
        self.pool = nn.Sequential(
            nn.Conv2d(dim, dim_after, 3, stride, padding=1, groups=dim), nn.Conv2d(dim_after, dim_after, 1)
        )
        self.proj = nn.Linear(dim, dim_after)

    def forward(self, x_BND: Tensor) -> Tensor:
        prefix_BPD, map_BDYX = self.tokens.split(x_BND)
        return join(self.proj(prefix_BPD), self.pool(map_BDYX))
