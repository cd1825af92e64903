"""What a mixer may know about its tokens when it is built: how many, in which order, from which grid."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGrid:
    """Tokens of a feature map in raster order, behind ``prefix`` tokens that belong to no place (the class token).

    height, width: rows and columns of the grid, in tokens.
    prefix: how many tokens come before those of the grid (1 with a class token, else 0).
    """

    height: int
    width: int
    prefix: int = 0

    @property
    def count(self) -> int:
        """Length N of the token sequence."""
        return self.prefix + self.height * self.width

    def strided(self, stride: int) -> "TokenGrid":
        """The grid that is left of every ``stride``-th row and column. Raises ValueError where that is more than there are."""
        side = min(self.height, self.width)
        if stride > side:
            raise ValueError(f"stride={stride} exceeds the {self.height}×{self.width} tokens it steps over; at most {side}")
        return replace(self, height=-(-self.height // stride), width=-(-self.width // stride))

    def split(self, x_BND: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, D) → the prefix (B, P, D) and the map (B, D, Y, X)."""
        return x_BND[:, : self.prefix], x_BND[:, self.prefix :].mT.unflatten(2, (self.height, self.width))


def join(prefix_BPD: Tensor, map_BDYX: Tensor) -> Tensor:
    """The reverse of :meth:`TokenGrid.split`, for a map of any size: → (B, N, D)."""
    x_BND = map_BDYX.flatten(2).mT
    return torch.cat([prefix_BPD, x_BND], dim=1) if prefix_BPD.shape[1] else x_BND
