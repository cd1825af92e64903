"""LeViT: Graham et al., "LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference", 2021; the paper's LeViX."""

from collections.abc import Callable

from torch import Tensor, nn

from vix.layers.blocks import MLP, Depths, LayerScale, PreNormBlock, StochasticDepth, drop_rates, per_stage
from vix.layers.checkpointing import Block
from vix.layers.embedding import Embedding
from vix.layers.posenc import PositionEncoding
from vix.layers.precision import upcast_fp32
from vix.layers.tokens import TokenGrid, join, to_tokens
from vix.types import Fraction, Positive, PositiveFloat


class LeViT(nn.Module):
    """LeViT (Graham et al., 2021), without a class token.

    Embedding, position encoding, stages of residual blocks, average over the tokens, linear head. The blocks have no norms, but
    some mixers do, such as ``attention=levit``. The published models have one stage. A transition between stages has the index
    of the block that follows it (``layer`` of its mixer).

    dim: width D of the tokens, per stage.
    depth: number of blocks, per stage.
    heads: number H of heads, per stage; None: ``attention.heads``.
    mlp_ratio: hidden width of the MLPs divided by ``dim``, per stage.
    stride: subsampling of rows and columns between stages, one value per transition.
    dropout: dropout probability of the mixers' and MLPs' outputs and the MLPs' hidden layer.
    stochastic_depth: probability of dropping a branch in the last block; it increases linearly from 0 in the first block.
    layer_scale: initial value of a learned gain per channel of the branches' outputs; None: none.

    Raises ValueError where a list's length does not match the number of stages, a stride exceeds the rows of tokens, or the
    mixer needs a norm.
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
        depth: Depths = (4,),
        heads: Positive | tuple[Positive, ...] | None = None,
        mlp_ratio: PositiveFloat | tuple[PositiveFloat, ...] = 2.0,
        stride: Positive | tuple[Positive, ...] = 2,
        dropout: Fraction = 0.0,
        stochastic_depth: Fraction = 0.0,
        layer_scale: PositiveFloat | None = None,
    ) -> None:
        super().__init__()
        stages = len(depth)
        dims, ratios = per_stage("dim", dim, stages), per_stage("mlp_ratio", mlp_ratio, stages)
        all_heads, strides = per_stage("heads", heads, stages), per_stage("stride", stride, stages - 1)
        self.embedding = embedding(image_size=image_size, channels=channels, dim=dims[0])
        tokens = TokenGrid(*self.embedding.grid)
        self.posenc = posenc(dim=dims[0], tokens=tokens)
        rates = drop_rates(stochastic_depth, sum(depth))
        self.blocks = nn.Sequential()
        for stage in range(stages):
            if stage:
                mixer = attention(
                    dim=dims[stage - 1], tokens=tokens, posenc=self.posenc, layer=sum(depth[:stage]), heads=all_heads[stage - 1]
                )
                options = dropout, rates[sum(depth[:stage])], layer_scale
                downsample = Downsample(
                    dims[stage - 1], dims[stage], tokens, strides[stage - 1], mixer, ratios[stage], *options
                )
                self.blocks.append(downsample)
                tokens = downsample.out_tokens
            for i in range(sum(depth[:stage]), sum(depth[: stage + 1])):
                mixer = attention(dim=dims[stage], tokens=tokens, posenc=self.posenc, layer=i, heads=all_heads[stage])
                if getattr(mixer, "needs_norm", False):
                    raise ValueError(
                        f"LeViT's blocks have no norms, without which the values of {type(mixer).__name__} grow from block to "
                        "block; use another model, such as model=vit"
                    )
                mlp = MLP(dims[stage], ratios[stage], dropout)
                self.blocks.append(PreNormBlock(dims[stage], mixer, mlp, dropout, nn.Identity, rates[i], layer_scale))
        self.head = nn.Linear(dims[-1], classes)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        x_BND = to_tokens(self.embedding(images_BCYX))
        return self.head(self.blocks(self.posenc(x_BND)).mean(dim=1))


class Downsample(Block):
    """Transition between stages: (B, N, D) → (B, N′, D′).

    x + mixer(x), subsampled to every ``stride``-th row and column, followed by a linear layer to the new width and an MLP.

    LeViT's shrinking attention computes queries for the subsampled tokens only. Subsampling the mixer's output instead works
    with any mixer and computes the same function, except that in training the BatchNorms of queries and output use the
    statistics of all tokens. The residual connection, which LeViT omits here, passes the input on where the mixer's output is
    initialized to zero.

    dim, dim_after: widths D and D′ of the tokens before and after.
    tokens: grid of the input tokens.
    stride: distance of the rows and columns that remain.
    mixer: mixer of the input tokens.
    mlp_ratio: hidden width of the MLP divided by ``dim_after``.
    dropout, stochastic_depth, layer_scale: of both branches' outputs, as in :class:`vix.layers.blocks.PreNormBlock`.
    """

    def __init__(
        self,
        dim: int,
        dim_after: int,
        tokens: TokenGrid,
        stride: int,
        mixer: nn.Module,
        mlp_ratio: float,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.tokens, self.out_tokens, self.stride = tokens, tokens.strided(stride), stride
        self.mixer, self.proj = mixer, nn.Linear(dim, dim_after)
        self.mlp, self.dropout = MLP(dim_after, mlp_ratio, dropout), nn.Dropout(dropout)
        self.scale1, self.scale2 = (
            nn.Identity() if layer_scale is None else LayerScale(width, layer_scale) for width in (dim, dim_after)
        )
        self.drop_path = StochasticDepth(stochastic_depth)

    def forward_once(self, x_BND: Tensor) -> Tensor:
        prefix_BPD, map_BDYX = self.tokens.split(x_BND + self.drop_path(self.scale1(self.dropout(self.mixer(x_BND)))))
        (x_BND,) = upcast_fp32(self.proj(join(prefix_BPD, map_BDYX[:, :, :: self.stride, :: self.stride])))
        return x_BND + self.drop_path(self.scale2(self.dropout(self.mlp(x_BND))))
