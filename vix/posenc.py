"""Where a token is: learned table, rotation of queries and keys, or nothing.

Contract: the constructor takes ``dim`` and the :class:`vix.tokens.TokenGrid`, then keyword-only options; ``forward`` is applied
once to the tokens (B, N, D); ``rotary`` is None, or the function that gives each mixer its rotation.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vix.attention.heads import at_least_float32
from vix.checks import PositiveFloat
from vix.tokens import TokenGrid


class NoPosition(nn.Module):
    """Nothing is added; also the base of the others."""

    rotary: Callable[[int], nn.Module] | None = None

    def __init__(self, dim: int, tokens: TokenGrid) -> None:
        super().__init__()

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND


class Learned(NoPosition):
    """A learned table (N, D), drawn from a normal distribution, added once (ViT: Dosovitskiy et al., 2021).

    std: standard deviation of the table at the start.
    """

    def __init__(self, dim: int, tokens: TokenGrid, *, std: PositiveFloat = 1.0) -> None:
        super().__init__(dim, tokens)
        self.table_ND = nn.Parameter(torch.randn(tokens.count, dim) * std)

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND + self.table_ND


class Rotary(NoPosition):
    """Rotary position embedding, 1-D (Su et al., "RoFormer", 2021): queries and keys turn by their position 0…N−1.

    base: the frequencies are base^(−2i/E) for the pairs i of a head of width E.
    """

    def __init__(self, dim: int, tokens: TokenGrid, *, base: PositiveFloat = 10000.0) -> None:
        super().__init__(dim, tokens)
        self.count, self.base = tokens.count, base
        self.rotations = nn.ModuleDict()
        self.rotary = self.rotation

    def rotation(self, width: int) -> nn.Module:
        """The rotation for heads of this width, one module shared by all layers."""
        if str(width) not in self.rotations:
            self.rotations[str(width)] = Rotation(torch.arange(self.count), width, self.base)
        return self.rotations[str(width)]


class Rotation(nn.Module):
    """Turns adjacent pairs of the head width by position · frequency: (B, H, N, E) → the same.

    Raises ValueError where the head width is odd.
    """

    def __init__(self, positions_N: Tensor, width: int, base: float) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"dim_head={width} is odd, and posenc=rotary turns pairs; nearest even: {width - 1}, {width + 1}")
        # In float64 first: position 1,024 times a frequency must be right to float32's last bit.
        frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = positions_N[:, None].double() * frequencies
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, t_BHNE: Tensor) -> Tensor:
        (wide_BHNE,) = at_least_float32(t_BHNE)
        even, odd = wide_BHNE.unflatten(-1, (-1, 2)).unbind(dim=-1)
        turned = torch.stack([even * self.cos - odd * self.sin, odd * self.cos + even * self.sin], dim=-1)
        return turned.flatten(-2).to(t_BHNE.dtype)
