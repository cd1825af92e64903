"""PiT: Heo et al., "Rethinking Spatial Dimensions of Vision Transformers", 2021; with any mixer, the paper's PiX."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from vix.layers.blocks import MLP, Depths, PreNormBlock, drop_rates, per_stage
from vix.layers.embedding import Embedding
from vix.layers.posenc import PositionEncoding
from vix.layers.tokens import TokenGrid, join, to_tokens
from vix.types import Fraction, Positive, PositiveFloat


class PiT(nn.Module):
    """Pooling-based vision transformer (Heo et al., 2021).

    Embedding, class token, position encoding, stages of pre-norm blocks with pooling between them, LayerNorm and linear head on
    the class token.

    dim: width D of the tokens, per stage; each a multiple of the previous one.
    depth: number of blocks, per stage.
    heads: number H of heads, per stage; None: ``attention.heads``. Where ``attention.dim_head`` is null, the heads of all
        stages have the width of the first stage's heads.
    mlp_ratio: hidden width of the MLPs divided by ``dim``, per stage.
    stride: stride of the poolings, one value per pooling.
    pool: what the head reads: ``class_token``, a learned token before the others, as in PiT; or the ``mean`` of all tokens.
    dropout: dropout probability of the mixers' and MLPs' outputs and the MLPs' hidden layer.
    stochastic_depth: probability of dropping a branch in the last block; it increases linearly from 0 in the first block.
    layer_scale: initial value of a learned gain per channel of the branches' outputs; None: none.

    Raises ValueError where a list's length does not match the number of stages, a width is not a multiple of the previous one,
    or a stride exceeds the rows of tokens.
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
        pool: Literal["class_token", "mean"] = "class_token",
        dropout: Fraction = 0.0,
        stochastic_depth: Fraction = 0.0,
        layer_scale: PositiveFloat | None = None,
    ) -> None:
        super().__init__()
        stages = len(depth)
        dims, ratios = per_stage("dim", dim, stages), per_stage("mlp_ratio", mlp_ratio, stages)
        all_heads, strides = per_stage("heads", heads, stages), per_stage("stride", stride, stages - 1)
        for before, after in pairwise(dims):
            if after % before:
                shown, near = ",".join(map(str, dims)), max(1, round(after / before)) * before
                raise ValueError(f"dim=[{shown}]: {after} is not a multiple of the previous stage's {before}; nearest: {near}")
        self.embedding = embedding(image_size=image_size, channels=channels, dim=dims[0])
        self.class_token = nn.Parameter(torch.randn(dims[0])) if pool == "class_token" else None
        tokens = TokenGrid(*self.embedding.grid, prefix=int(pool == "class_token"))
        self.posenc = posenc(dim=dims[0], tokens=tokens)
        rates = drop_rates(stochastic_depth, sum(depth))
        self.blocks = nn.Sequential()
        for stage in range(stages):
            if stage:
                pooling = ConvHeadPooling(dims[stage - 1], dims[stage], tokens, strides[stage - 1])
                self.blocks.append(pooling)
                tokens = pooling.out_tokens
            for i in range(sum(depth[:stage]), sum(depth[: stage + 1])):
                mixer = attention(
                    dim=dims[stage],
                    tokens=tokens,
                    posenc=self.posenc,
                    layer=i,
                    heads=all_heads[stage],
                    inner=dims[0] * (all_heads[stage] or 1) // (all_heads[0] or 1),
                )
                mlp = MLP(dims[stage], ratios[stage], dropout)
                block = PreNormBlock(dims[stage], mixer, mlp, dropout, stochastic_depth=rates[i], layer_scale=layer_scale)
                self.blocks.append(block)
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], classes)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        map_BDYX = self.embedding(images_BCYX)
        if self.class_token is None:
            x_BND = to_tokens(map_BDYX)
        else:
            x_BND = join(self.class_token.expand(map_BDYX.shape[0], 1, -1), map_BDYX)
        x_BND = self.blocks(self.posenc(x_BND))
        # LayerNorm works on each token separately, so where one token is read only that one needs it.
        pooled_BD = self.norm(x_BND).mean(dim=1) if self.class_token is None else self.norm(x_BND[:, 0])
        return self.head(pooled_BD)


class ConvHeadPooling(nn.Module):
    """PiT's pooling between stages: (B, N, D) → (B, N′, D′).

    A strided depthwise 3×3 convolution and a 1×1 convolution of the token map; a linear layer for the class token.

    dim, dim_after: widths D and D′ of the tokens before and after; ``dim_after`` is a multiple of ``dim``.
    tokens: grid of the input tokens.
    stride: stride of the depthwise convolution.
    """

    def __init__(self, dim: int, dim_after: int, tokens: TokenGrid, stride: int) -> None:
        super().__init__()
        self.tokens, self.out_tokens = tokens, tokens.strided(stride)
        self.pool = nn.Sequential(
            nn.Conv2d(dim, dim_after, 3, stride, padding=1, groups=dim), nn.Conv2d(dim_after, dim_after, 1)
        )
        self.proj = nn.Linear(dim, dim_after) if tokens.prefix else nn.Identity()

    def forward(self, x_BND: Tensor) -> Tensor:
        prefix_BPD, map_BDYX = self.tokens.split(x_BND)
        return join(self.proj(prefix_BPD), self.pool(map_BDYX))
