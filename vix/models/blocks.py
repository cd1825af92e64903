"""What the families share."""

from torch import Tensor, nn


class MLP(nn.Sequential):
    """Two linear layers with biases around an exact GELU, on the last axis."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim))


class PreNormBlock(nn.Module):
    """x += mixer(LN(x)); x += mlp(LN(x)), on (B, N, D)."""

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(dim), mixer
        self.norm2, self.mlp = nn.LayerNorm(dim), mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.dropout(self.mixer(self.norm1(x_BND)))
        return x_BND + self.dropout(self.mlp(self.norm2(x_BND)))
