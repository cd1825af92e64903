"""What the families share."""

from collections.abc import Callable
from typing import Annotated, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from vix.layers.checkpointing import Block
from vix.layers.precision import upcast_fp32
from vix.types import Positive

Number = TypeVar("Number", int, float, int | None)
Depths = Annotated[tuple[Positive, ...], Field(min_length=1)]  # blocks of each stage


def per_stage(name: str, value: Number | tuple[Number, ...] | list[Number], stages: int) -> list[Number]:
    """The option's value for each stage, from one number for all of them or a list.

    Raises ValueError where the list has another length.
    """
    if not isinstance(value, list | tuple):
        return [value] * stages
    if len(value) != stages:
        shown = ",".join(map(str, value))
        raise ValueError(f"{name}=[{shown}] is {len(value)} numbers where {stages} are needed; give one for all, or {stages}")
    return list(value)


class MLP(nn.Sequential):
    """Two linear layers with biases around an exact GELU, on the last axis; ``ratio`` is hidden width over ``dim``."""

    def __init__(self, dim: int, ratio: float, dropout: float = 0.0) -> None:
        hidden = max(1, round(ratio * dim))
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim))


class PreNormBlock(Block):
    """x += mixer(norm(x)); x += mlp(norm(x)), on (B, N, D); ``norm`` is made with the width."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        dropout: float = 0.0,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.norm1, self.mixer = norm(dim), mixer
        self.norm2, self.mlp = norm(dim), mlp
        self.dropout = nn.Dropout(dropout)

    def forward_once(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.dropout(self.mixer(self.norm1(x_BND)))
        return x_BND + self.dropout(self.mlp(self.norm2(x_BND)))


class ChannelNorm(nn.Module):
    """(x − mean) / (std + 1e-5) over the channels of each token, with gain and offset: CvT's norm in the published runs.

    It is LayerNorm but for where the 1e-5 stands, and for the names: the paper's parameter count leaves these out.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain_D, self.offset_D = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x_BND: Tensor) -> Tensor:
        (x_BND,) = upcast_fp32(x_BND)
        centred_BND = x_BND - x_BND.mean(dim=-1, keepdim=True)
        # The norm of a vector has a gradient where all channels are equal; the square root of their variance has none.
        std_BN1 = torch.linalg.vector_norm(centred_BND, dim=-1, keepdim=True) / x_BND.shape[-1] ** 0.5
        return centred_BND / (std_BN1 + 1e-5) * self.gain_D + self.offset_D


class StochasticDepth(nn.Module):
    """Drops a residual branch for whole images, with this probability, in training (Huang et al., 2016)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x_BND: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return x_BND
        keep = 1 - self.probability
        kept_B11 = torch.rand(len(x_BND), 1, 1, device=x_BND.device) < keep
        return x_BND * (kept_B11 / keep).to(x_BND.dtype)
