"""What a mixer may know about its tokens when it is built: how many, in which order, from which grid."""

from dataclasses import dataclass


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
