"""Position encodings: a table added to the tokens, a rotation of queries and keys, a bias on attention logits, or none.

Interface: the constructor takes

    dim: width D of the tokens,
    tokens: :class:`vix.layers.tokens.TokenGrid` of the first layer,

then keyword-only options. ``forward`` is applied once, to the first layer's tokens (B, N, D).
:meth:`PositionEncoding.attention_kwargs` is what every mixer receives.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vix.layers.precision import upcast_fp32
from vix.layers.tokens import TokenGrid
from vix.types import NotNegativeFloat, PositiveFloat

AttentionKwargs = dict[str, Callable[[int], nn.Module]]


class PositionEncoding(nn.Module):
    """Base class of the position encodings. It changes neither the tokens nor the attention."""

    # For the error message where a mixer does not support it: "posenc: {requirement}, which Fourier does not support".
    requirement = ""

    def __init__(self, dim: int, tokens: TokenGrid) -> None:
        super().__init__()

    def attention_kwargs(self, tokens: TokenGrid) -> AttentionKwargs:
        """Keyword arguments for the constructor of a mixer of these tokens.

        rotary: function from the head width E to a module that rotates (B, H, N, E) by position.
        position_bias: function from the number of heads H to a module that returns the bias (H, N, N) when called without
            arguments.
        """
        return {}

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND


class NoPositionEncoding(PositionEncoding):
    """No position encoding. Softmax attention, for example, is then equivariant to permutations of the tokens."""


class Learned(PositionEncoding):
    """A learned table (N, D), added to the tokens once, as in ViT (Dosovitskiy et al., 2021).

    std: standard deviation of the normal distribution that the table is initialized from.
    """

    def __init__(self, dim: int, tokens: TokenGrid, *, std: PositiveFloat = 1.0) -> None:
        super().__init__(dim, tokens)
        self.table_ND = nn.Parameter(torch.randn(tokens.count, dim) * std)

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND + self.table_ND


class SinCos(PositionEncoding):
    """A fixed table (N, D) of sines (even channels) and cosines (odd channels), added once (Vaswani et al., 2017).

    base: base of the frequencies base^(−2i/D) of channel pairs i, with an odd D rounded up.
    """

    def __init__(self, dim: int, tokens: TokenGrid, *, base: PositiveFloat = 10000.0) -> None:
        super().__init__(dim, tokens)
        angles = position_angles(torch.arange(tokens.count), dim + dim % 2, base)
        self.table_ND: Tensor
        table_ND = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim]
        self.register_buffer("table_ND", table_ND.float(), persistent=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND + self.table_ND


class Rotary(PositionEncoding):
    """1-D rotary position embedding (Su et al., "RoFormer", 2021): queries and keys are rotated by their position 0…N−1.

    base: base of the frequencies base^(−2i/E) of pairs i within a head.
    """

    requirement = "rotary position embeddings rotate queries and keys"

    def __init__(self, dim: int, tokens: TokenGrid, *, base: PositiveFloat = 10000.0) -> None:
        super().__init__(dim, tokens)
        self.base = base
        self.rotations = nn.ModuleDict()

    def attention_kwargs(self, tokens: TokenGrid) -> AttentionKwargs:
        return {"rotary": partial(self.rotation, tokens)}

    def rotation(self, tokens: TokenGrid, width: int) -> nn.Module:
        """The rotation of these tokens for heads of width E; all layers share one module."""
        key = f"{tokens.height}x{tokens.width}+{tokens.prefix},{width}"
        if key not in self.rotations:
            self.rotations[key] = Rotation(self.angles(tokens, width))
        return self.rotations[key]

    def angles(self, tokens: TokenGrid, width: int) -> Tensor:
        """Rotation angles (N, E/2) of the pairs of each token.

        tokens: grid of the tokens.
        width: head width E.

        Raises ValueError where the head width does not divide into pairs.
        """
        if width % 2:
            near = ", ".join(str(w) for w in (width - 1, width + 1) if w)
            raise ValueError(f"dim_head={width} is odd, but posenc=rotary rotates pairs; nearest even: {near}")
        return position_angles(torch.arange(tokens.count), width, self.base)


class Rotary2d(Rotary):
    """Axial 2-D rotary position embedding (Heo et al., "Rotary Position Embedding for Vision Transformer", 2024).

    The first half of each head is rotated by the token's row and the second half by its column. A class token has row and
    column 0; the rows and columns of the grid then start at 1.

    base: base of the frequencies base^(−4i/E). The default is below 1-D's 10,000, because images have fewer rows than texts
        have words.
    """

    def __init__(self, dim: int, tokens: TokenGrid, *, base: PositiveFloat = 100.0) -> None:
        super().__init__(dim, tokens, base=base)

    def angles(self, tokens: TokenGrid, width: int) -> Tensor:
        if width % 4:
            near = ", ".join(str(w) for w in (width - width % 4, width - width % 4 + 4) if w)
            raise ValueError(f"dim_head={width} is not a multiple of 4, which posenc=rotary2d needs; nearest: {near}")
        rows, columns = torch.meshgrid(torch.arange(tokens.height), torch.arange(tokens.width), indexing="ij")
        before = torch.zeros(tokens.prefix, dtype=torch.long)
        row_N, column_N = (torch.cat([before, axis.flatten() + tokens.prefix]) for axis in (rows, columns))
        return torch.cat([position_angles(axis, width // 2, self.base) for axis in (row_N, column_N)], dim=1)


class Relative2d(PositionEncoding):
    """A learned bias per layer and head on the attention logit of each pair of tokens, by their |Δrow| and |Δcolumn|.

    As in LeViT (Graham et al., 2021). Pairs with a class token have three biases of their own: to it, from it, and of the
    class token with itself.

    std: standard deviation of the normal distribution that the biases are initialized from.
    """

    requirement = "the relative bias is added to the attention logits of pairs of tokens"

    def __init__(self, dim: int, tokens: TokenGrid, *, std: NotNegativeFloat = 0.0) -> None:
        super().__init__(dim, tokens)
        self.std = std

    def attention_kwargs(self, tokens: TokenGrid) -> AttentionKwargs:
        return {"position_bias": partial(RelativeBias, tokens, self.std)}


class Rotation(nn.Module):
    """Rotate adjacent pairs of channels in each head: (B, H, N, E) → (B, H, N, E).

    angles: rotation angles (N, E/2), in radians.
    """

    def __init__(self, angles: Tensor) -> None:
        super().__init__()
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, t_BHNE: Tensor) -> Tensor:
        (wide_BHNE,) = upcast_fp32(t_BHNE)
        even, odd = wide_BHNE.unflatten(-1, (-1, 2)).unbind(dim=-1)
        rotated = torch.stack([even * self.cos - odd * self.sin, odd * self.cos + even * self.sin], dim=-1)
        return rotated.flatten(-2).to(t_BHNE.dtype)


class RelativeBias(nn.Module):
    """Relative position bias (H, N, N) of one layer, looked up in a table (H, |Δrow|, |Δcolumn|).

    tokens: grid of the tokens.
    std: standard deviation of the initial biases.
    heads: number H of heads.
    """

    def __init__(self, tokens: TokenGrid, std: float, heads: int) -> None:
        super().__init__()
        # Not named weight or bias: the paper's parameter count excludes position tables.
        self.table_HYX = nn.Parameter(torch.randn(heads, tokens.height, tokens.width) * std)
        self.prefix = tokens.prefix
        self.prefix_table_H3 = nn.Parameter(torch.randn(heads, 3) * std) if tokens.prefix else None
        self.row_distance: Tensor
        self.column_distance: Tensor
        self.register_buffer("row_distance", distances(tokens.height), persistent=False)
        self.register_buffer("column_distance", distances(tokens.width), persistent=False)

    def forward(self) -> Tensor:
        # One axis after the other, so that no N×N table of indices is needed.
        bias_HYYX = self.table_HYX[:, self.row_distance]
        bias_HYYXX = bias_HYYX[..., self.column_distance]
        bias_HNN = bias_HYYXX.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if self.prefix_table_H3 is None:
            return bias_HNN
        heads, count = bias_HNN.shape[:2]
        to_prefix, from_prefix, self_bias = self.prefix_table_H3[:, :, None, None].unbind(dim=1)
        prefix = self.prefix
        above = torch.cat([self_bias.expand(heads, prefix, prefix), from_prefix.expand(heads, prefix, count)], dim=2)
        below = torch.cat([to_prefix.expand(heads, count, prefix), bias_HNN], dim=2)
        return torch.cat([above, below], dim=1)


def distances(size: int) -> Tensor:
    """Table (size, size) of the distances |i − j|."""
    position = torch.arange(size)
    return (position[:, None] - position).abs()


def position_angles(position_N: Tensor, width: int, base: float) -> Tensor:
    """Angles position · base^(−2i/width) for i < width / 2, in radians: (N,) → (N, width / 2).

    Computed in float64, so that the angle of position 1,024 is correct to float32 precision.
    """
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return position_N[:, None].double() * frequencies
