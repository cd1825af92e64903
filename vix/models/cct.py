"""CCT: Hassani et al., "Escaping the Big Data Paradigm with Compact Transformers", 2021; with any mixer, the paper's CCX."""

from collections.abc import Callable

from torch import Tensor, nn

from vix.layers.blocks import MLP, LayerScale, StochasticDepth, drop_rates
from vix.layers.checkpointing import Block
from vix.layers.embedding import Embedding
from vix.layers.posenc import PositionEncoding
from vix.layers.tokens import TokenGrid, to_tokens
from vix.types import Fraction, Positive, PositiveFloat


class CCT(nn.Module):
    """Compact convolutional transformer (Hassani et al., 2021), without a class token.

    Embedding, position encoding, ``depth`` blocks, LayerNorm, sequence pooling, linear head. All linear layers, including the
    mixers', are initialized with weights from a normal distribution of std 0.02, truncated at ±2, and zero biases, except for
    subclasses of ``nn.Linear``, which have their own initialization.

    dim: width D of the tokens.
    depth: number of blocks.
    mlp_ratio: hidden width of the MLPs divided by ``dim``.
    stochastic_depth: probability of dropping a branch in the last block; it increases linearly from 0 in the first block.
    layer_scale: initial value of a learned gain per channel of the branches' outputs; None: none.
    dropout: dropout probability of the mixers' and MLPs' outputs and the MLPs' hidden layer.
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
        mlp_ratio: PositiveFloat = 4.0,
        stochastic_depth: Fraction = 0.1,
        layer_scale: PositiveFloat | None = None,
        dropout: Fraction = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = embedding(image_size=image_size, channels=channels, dim=dim)
        tokens = TokenGrid(*self.embedding.grid)
        self.posenc = posenc(dim=dim, tokens=tokens)
        self.blocks = nn.Sequential(
            *(
                CCTBlock(
                    dim,
                    attention(dim=dim, tokens=tokens, posenc=self.posenc, layer=i),
                    MLP(dim, mlp_ratio, dropout),
                    rate,
                    dropout,
                    layer_scale,
                )
                for i, rate in enumerate(drop_rates(stochastic_depth, depth))
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.attention_pool = nn.Linear(dim, 1)
        self.head = nn.Linear(dim, classes)
        self.apply(init_weights)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        x_BND = to_tokens(self.embedding(images_BCYX))
        x_BND = self.norm(self.blocks(self.posenc(x_BND)))
        # Sequence pooling: a weighted mean over the tokens with learned weights.
        share_BN1 = self.attention_pool(x_BND).softmax(dim=1)
        return self.head((share_BN1.mT @ x_BND.to(share_BN1.dtype)).squeeze(1))


class CCTBlock(Block):
    """CCT's block, x += mixer(LN(x)); x = LN(x); x += mlp(x): the second norm is applied to the residual stream itself."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        stochastic_depth: float,
        dropout: float,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(dim), mixer
        self.norm2, self.mlp = nn.LayerNorm(dim), mlp
        self.scale1, self.scale2 = (nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2))
        self.drop = nn.Sequential(nn.Dropout(dropout), StochasticDepth(stochastic_depth))

    def forward_once(self, x_BND: Tensor) -> Tensor:
        x_BND = self.norm2(x_BND + self.drop(self.scale1(self.mixer(self.norm1(x_BND)))))
        return x_BND + self.drop(self.scale2(self.mlp(x_BND)))


def init_weights(module: nn.Module) -> None:
    """CCT's initialization of linear layers: weights from N(0, 0.02²) truncated at ±2, biases zero."""
    if type(module) is nn.Linear:
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
