"""CvT: Wu et al., "CvT: Introducing Convolutions to Vision Transformers", 2021; with any mixer, the paper's CvX."""

from collections.abc import Callable

from torch import Tensor, nn

from vix.layers.blocks import MLP, ChannelNorm, Depths, PreNormBlock, drop_rates, per_stage
from vix.layers.embedding import Embedding
from vix.layers.posenc import PositionEncoding
from vix.layers.tokens import TokenGrid, join, to_tokens
from vix.types import Fraction, Positive, PositiveFloat


class CvT(nn.Module):
    """Convolutional vision transformer (Wu et al., 2021), without a class token.

    Each stage consists of a convolution, a norm over channels, and pre-norm blocks with that norm. The last stage's tokens are
    averaged for the linear head. The first stage's convolution is the embedding; CvT's is ``embedding=conv
    embedding.hidden=[]``, one 3×3 convolution. The published models have three stages of 32×32 tokens each.

    dim: width D of the tokens, per stage.
    depth: number of blocks, per stage.
    heads: number H of heads, per stage; None: ``attention.heads``.
    mlp_ratio: hidden width of the MLPs divided by ``dim``, per stage.
    stride: stride of the 3×3 convolutions before the second and later stages, one value per convolution.
    dropout: dropout probability of the mixers' and MLPs' outputs and the MLPs' hidden layer.
    stochastic_depth: probability of dropping a branch in the last block; it increases linearly from 0 in the first block.
    layer_scale: initial value of a learned gain per channel of the branches' outputs; None: none.

    Raises ValueError where a list's length does not match the number of stages, or a stride exceeds the rows of tokens.
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
        dim: Positive | tuple[Positive, ...] = 128,
        depth: Depths = (1, 1, 2),
        heads: Positive | tuple[Positive, ...] | None = None,
        mlp_ratio: PositiveFloat | tuple[PositiveFloat, ...] = 2.0,
        stride: Positive | tuple[Positive, ...] = 1,
        dropout: Fraction = 0.0,
        stochastic_depth: Fraction = 0.0,
        layer_scale: PositiveFloat | None = None,
    ) -> None:
        super().__init__()
        stages = len(depth)
        dims, ratios = per_stage("dim", dim, stages), per_stage("mlp_ratio", mlp_ratio, stages)
        all_heads, strides = per_stage("heads", heads, stages), per_stage("stride", stride, stages - 1)
        self.embedding, self.norm = embedding(image_size=image_size, channels=channels, dim=dims[0]), ChannelNorm(dims[0])
        tokens = TokenGrid(*self.embedding.grid)
        self.posenc = posenc(dim=dims[0], tokens=tokens)
        rates = drop_rates(stochastic_depth, sum(depth))
        self.blocks = nn.Sequential()
        for stage in range(stages):
            if stage:
                downsample = ConvEmbed(dims[stage - 1], dims[stage], tokens, strides[stage - 1])
                self.blocks.append(downsample)
                tokens = downsample.out_tokens
            for i in range(sum(depth[:stage]), sum(depth[: stage + 1])):
                mixer = attention(dim=dims[stage], tokens=tokens, posenc=self.posenc, layer=i, heads=all_heads[stage])
                mlp = MLP(dims[stage], ratios[stage], dropout)
                block = PreNormBlock(dims[stage], mixer, mlp, dropout, ChannelNorm, rates[i], layer_scale)
                self.blocks.append(block)
        self.head = nn.Linear(dims[-1], classes)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        x_BND = self.norm(to_tokens(self.embedding(images_BCYX)))
        return self.head(self.blocks(self.posenc(x_BND)).mean(dim=1))


class ConvEmbed(nn.Module):
    """Strided 3×3 convolution of the token map and a norm over channels, between stages: (B, N, D) → (B, N′, D′).

    dim, dim_after: widths D and D′ of the tokens before and after.
    tokens: grid of the input tokens.
    stride: stride of the convolution.
    """

    def __init__(self, dim: int, dim_after: int, tokens: TokenGrid, stride: int) -> None:
        super().__init__()
        self.tokens, self.out_tokens = tokens, tokens.strided(stride)
        self.conv, self.norm = nn.Conv2d(dim, dim_after, 3, stride, padding=1), ChannelNorm(dim_after)

    def forward(self, x_BND: Tensor) -> Tensor:
        prefix_BPD, map_BDYX = self.tokens.split(x_BND)
        return self.norm(join(prefix_BPD, self.conv(map_BDYX)))
