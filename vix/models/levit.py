"""LeViT: Graham et al., "LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference", 2021; the paper's LeViX."""

from collections.abc import Callable

from torch import Tensor, nn

from vix.layers.blocks import MLP, Depths, PreNormBlock, per_stage
from vix.layers.embedding import Embedding
from vix.layers.posenc import PositionEncoding
from vix.layers.precision import upcast_fp32
from vix.layers.tokens import TokenGrid, join
from vix.types import Fraction, Positive, PositiveFloat


class LeViT(nn.Module):
    """Convolutional stem, stages of residual blocks without any norm of their own, average over the tokens, linear head.

    The only norms are the BatchNorms within LeViT's own attention. The published models have one stage.

    dim, depth, heads, mlp_ratio: of each stage; ``heads`` None leaves them to ``attention.heads``.
    stride: rows and columns between tokens that go on to the next stage, for each step from stage to stage.
    dropout: probability at which outputs of mixers and MLPs are dropped in training.

    Raises ValueError where a list does not fit the number of stages, or a stride exceeds the rows of tokens.
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
    ) -> None:
        super().__init__()
        stages = len(depth)
        dims, ratios = per_stage("dim", dim, stages), per_stage("mlp_ratio", mlp_ratio, stages)
        all_heads, strides = per_stage("heads", heads, stages), per_stage("stride", stride, stages - 1)
        self.embedding = embedding(image_size=image_size, channels=channels, dim=dims[0])
        tokens = TokenGrid(*self.embedding.grid)
        self.posenc = posenc(dim=dims[0], tokens=tokens)
        self.blocks = nn.Sequential()
        for stage in range(stages):
            if stage:
                mixer = attention(dim=dims[stage - 1], tokens=tokens, posenc=self.posenc, heads=all_heads[stage - 1])
                shrink = Downsample(dims[stage - 1], dims[stage], tokens, strides[stage - 1], mixer, ratios[stage], dropout)
                self.blocks.append(shrink)
                tokens = shrink.out_tokens
            for _ in range(depth[stage]):
                mixer = attention(dim=dims[stage], tokens=tokens, posenc=self.posenc, heads=all_heads[stage])
                mlp = MLP(dims[stage], ratios[stage], dropout)
                self.blocks.append(PreNormBlock(dims[stage], mixer, mlp, dropout, norm=nn.Identity))
        self.head = nn.Linear(dims[-1], classes)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        x_BND = self.embedding(images_BCYX).flatten(2).mT
        return self.head(self.blocks(self.posenc(x_BND)).mean(dim=1))


class Downsample(nn.Module):
    """From stage to stage: x + mixer(x) at every ``stride``-th row and column, a linear layer to the new width, an MLP.

    LeViT's shrinking attention asks with those tokens alone; to drop the others' answers computes the same and works with
    any mixer. The residual, which LeViT leaves out here, lets a mixer that starts at zero pass the image on.
    """

    def __init__(
        self, dim: int, dim_after: int, tokens: TokenGrid, stride: int, mixer: nn.Module, mlp_ratio: float, dropout: float
    ) -> None:
        super().__init__()
        self.tokens, self.out_tokens, self.stride = tokens, tokens.strided(stride), stride
        self.mixer, self.proj = mixer, nn.Linear(dim, dim_after)
        self.mlp, self.dropout = MLP(dim_after, mlp_ratio, dropout), nn.Dropout(dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        prefix_BPD, map_BDYX = self.tokens.split(x_BND + self.dropout(self.mixer(x_BND)))
        (x_BND,) = upcast_fp32(self.proj(join(prefix_BPD, map_BDYX[:, :, :: self.stride, :: self.stride])))
        return x_BND + self.dropout(self.mlp(x_BND))
