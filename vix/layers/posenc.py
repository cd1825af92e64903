"""Where a token is: a table added to the tokens, a rotation of queries and keys, a bias on attention, or nothing.

Contract: the constructor takes ``dim`` and the :class:`vix.layers.tokens.TokenGrid` of the first tokens, then keyword-only
options; ``forward`` is applied once to those tokens (B, N, D). :meth:`PositionEncoding.attention_kwargs` is for mixers.
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
    """Base of the position encodings: changes neither the tokens nor the attention."""

    # For the message to a user whose mixer cannot take it: "posenc: {requirement}, which Fourier does not support".
    requirement = ""

    def __init__(self, dim: int, tokens: TokenGrid) -> None:
        super().__init__()

    def attention_kwargs(self, tokens: TokenGrid) -> AttentionKwargs:
        """Arguments that a mixer of these tokens must accept, by name.

        ``rotary``: a function from the head width E to a module that rotates (B, H, N, E) by position.
        ``position_bias``: a function from the number of heads H to a module that returns (H, N, N) when called with nothing.
        """
        return {}

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND


class NoPositionEncoding(PositionEncoding):
    """No position encoding: a mixer without positions of its own cannot tell a permutation of the tokens."""


class Learned(PositionEncoding):
    """A learned table (N, D), drawn from a normal distribution, added once (ViT: Dosovitskiy et al., 2021).

    std: standard deviation of the table at the start.
    """

    def __init__(self, dim: int, tokens: TokenGrid, *, std: PositiveFloat = 1.0) -> None:
        super().__init__(dim, tokens)
        self.table_ND = nn.Parameter(torch.randn(tokens.count, dim) * std)

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND + self.table_ND


class SinCos(PositionEncoding):
    """A fixed table (N, D) of sines (even channels) and cosines (odd ones), added once (Vaswani et al., 2017).

    base: the frequencies are base^(−2i/D) for the pairs i of channels.
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
    """Rotary position embedding, 1-D (Su et al., "RoFormer", 2021): queries and keys turn by their position 0…N−1.

    base: the frequencies are base^(−2i/E) for the pairs i of a head of width E.
    """

    requirement = "rotary positions turn queries and keys"

    def __init__(self, dim: int, tokens: TokenGrid, *, base: PositiveFloat = 10000.0) -> None:
        super().__init__(dim, tokens)
        self.base = base
        self.rotations = nn.ModuleDict()

    def attention_kwargs(self, tokens: TokenGrid) -> AttentionKwargs:
        return {"rotary": partial(self.rotation, tokens)}

    def rotation(self, tokens: TokenGrid, width: int) -> nn.Module:
        """The rotation of these tokens for heads of this width, one module shared by all layers."""
        key = f"{tokens.height}x{tokens.width}+{tokens.prefix},{width}"
        if key not in self.rotations:
            self.rotations[key] = Rotation(self.angles(tokens, width))
        return self.rotations[key]

    def angles(self, tokens: TokenGrid, width: int) -> Tensor:
        """Angle (N, E/2) by which each pair turns. Raises ValueError where the head width does not divide into pairs."""
        if width % 2:
            raise ValueError(f"dim_head={width} is odd, and posenc=rotary turns pairs; nearest even: {width - 1}, {width + 1}")
        return position_angles(torch.arange(tokens.count), width, self.base)


class Rotary2d(Rotary):
    """Axial rotary positions (Heo et al., "Rotary Position Embedding for Vision Transformer", 2024).

    The first half of the head width turns by the token's row and the second by its column. A class token has row and
    column 0, and the grid then starts at 1.

    base: the frequencies are base^(−4i/E); images have fewer rows than texts have words, hence less than 1-D's 10,000.
    """

    def __init__(self, dim: int, tokens: TokenGrid, *, base: PositiveFloat = 100.0) -> None:
        super().__init__(dim, tokens, base=base)

    def angles(self, tokens: TokenGrid, width: int) -> Tensor:
        if width % 4:
            near = ", ".join(str(w) for w in (width - width % 4, width - width % 4 + 4) if w)
            raise ValueError(f"dim_head={width} has no two halves of pairs for posenc=rotary2d; nearest that have: {near}")
        rows, columns = torch.meshgrid(torch.arange(tokens.height), torch.arange(tokens.width), indexing="ij")
        before = torch.zeros(tokens.prefix, dtype=torch.long)
        row_N, column_N = (torch.cat([before, axis.flatten() + tokens.prefix]) for axis in (rows, columns))
        return torch.cat([position_angles(axis, width // 2, self.base) for axis in (row_N, column_N)], dim=1)


class Relative2d(PositionEncoding):
    """A learned bias per layer and head on the attention of a pair of tokens, by their |Δrow| and |Δcolumn|.

    As in LeViT (Graham et al., 2021). Pairs with a class token have three biases of their own: to it, from it, and its with
    itself.

    std: standard deviation of the biases at the start.
    """

    requirement = "the relative bias is added to the attention logits of pairs of tokens"

    def __init__(self, dim: int, tokens: TokenGrid, *, std: NotNegativeFloat = 0.0) -> None:
        super().__init__(dim, tokens)
        self.std = std

    def attention_kwargs(self, tokens: TokenGrid) -> AttentionKwargs:
        return {"position_bias": partial(RelativeBias, tokens, self.std)}


class Rotation(nn.Module):
    """Turns adjacent pairs of the head width by the angles (N, E/2): (B, H, N, E) → the same."""

    def __init__(self, angles: Tensor) -> None:
        super().__init__()
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, t_BHNE: Tensor) -> Tensor:
        (wide_BHNE,) = upcast_fp32(t_BHNE)
        even, odd = wide_BHNE.unflatten(-1, (-1, 2)).unbind(dim=-1)
        turned = torch.stack([even * self.cos - odd * self.sin, odd * self.cos + even * self.sin], dim=-1)
        return turned.flatten(-2).to(t_BHNE.dtype)


class RelativeBias(nn.Module):
    """The bias (H, N, N) of one layer, looked up in a table (H, |Δrow|, |Δcolumn|)."""

    def __init__(self, tokens: TokenGrid, std: float, heads: int) -> None:
        super().__init__()
        # Bare parameters, called neither weight nor bias: like all position tables, the paper's count leaves them out.
        self.table_HYX = nn.Parameter(torch.randn(heads, tokens.height, tokens.width) * std)
        self.prefix = tokens.prefix
        self.prefix_table_H3 = nn.Parameter(torch.randn(heads, 3) * std) if tokens.prefix else None
        self.row_distance: Tensor
        self.column_distance: Tensor
        self.register_buffer("row_distance", distances(tokens.height), persistent=False)
        self.register_buffer("column_distance", distances(tokens.width), persistent=False)

    def forward(self) -> Tensor:
        # One axis after the other: no table of N×N indices.
        bias_HYYX = self.table_HYX[:, self.row_distance]
        bias_HYYXX = bias_HYYX[..., self.column_distance]
        bias_HNN = bias_HYYXX.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if self.prefix_table_H3 is None:
            return bias_HNN
        heads, count = bias_HNN.shape[:2]
        to_it, from_it, itself = self.prefix_table_H3[:, :, None, None].unbind(dim=1)
        prefix = self.prefix
        above = torch.cat([itself.expand(heads, prefix, prefix), from_it.expand(heads, prefix, count)], dim=2)
        below = torch.cat([to_it.expand(heads, count, prefix), bias_HNN], dim=2)
        return torch.cat([above, below], dim=1)


def distances(size: int) -> Tensor:
    """|i − j| of all pairs from 0 to size − 1."""
    position = torch.arange(size)
    return (position[:, None] - position).abs()


def position_angles(position_N: Tensor, width: int, base: float) -> Tensor:
    """Angles position · base^(−2i/width) for i < width / 2: (N,) → (N, width / 2).

    In float64: position 1,024 times a frequency must be right to float32's last bit.
    """
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return position_N[:, None].double() * frequencies
