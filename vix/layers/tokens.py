"""The grid that a sequence of tokens comes from, which mixers and position encodings know at construction."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGrid:
    """Tokens of a feature map in raster order, after ``prefix`` tokens without a position in it (the class token).

    height, width: rows and columns of the grid, in tokens.
    prefix: number P of tokens before those of the grid (1 with a class token, else 0).
    """

    height: int
    width: int
    prefix: int = 0

    @property
    def count(self) -> int:
        """Length N of the token sequence."""
        return self.prefix + self.height * self.width

    def strided(self, stride: int) -> "TokenGrid":
        """The grid of every ``stride``-th row and column.

        Raises ValueError where ``stride`` exceeds the number of rows or columns.
        """
        side = min(self.height, self.width)
        if stride > side:
            raise ValueError(f"stride={stride} exceeds the {self.height}×{self.width} tokens; at most {side}")
        return replace(self, height=-(-self.height // stride), width=-(-self.width // stride))

    def split(self, x_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Split tokens (B, N, D) into the prefix (B, P, D) and the map (B, D, Y, X)."""
        return x_BND[:, : self.prefix], x_BND[:, self.prefix :].mT.unflatten(2, (self.height, self.width))


def to_tokens(map_BDYX: Tensor) -> Tensor:
    """The map's tokens in raster order: (B, D, Y, X) → (B, N, D).

    They are copied, so that the channels of a token are next to each other in memory: sums and residual connections keep the
    order of their inputs, and norms over channels that lie far apart take several times as long.
    """
    return map_BDYX.flatten(2).mT.contiguous()


def join(prefix_BPD: Tensor, map_BDYX: Tensor) -> Tensor:
    """Inverse of :meth:`TokenGrid.split`, for a map of any size: (B, P, D) and (B, D, Y, X) → (B, N, D).

    The channels of a token are next to each other in the result, as in :func:`to_tokens`.
    """
    return torch.cat([prefix_BPD, map_BDYX.flatten(2).mT], dim=1) if prefix_BPD.shape[1] else to_tokens(map_BDYX)
