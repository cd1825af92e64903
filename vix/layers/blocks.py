"""Building blocks that the model families share: MLP, pre-norm block, norms, layer scale and stochastic depth."""

from collections.abc import Callable
from typing import Annotated, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from vix.layers.checkpointing import Block
from vix.layers.precision import upcast_fp32
from vix.types import Positive

Number = TypeVar("Number", int, float, int | None)
Depths = Annotated[tuple[Positive, ...], Field(min_length=1)]  # number of blocks per stage


def per_stage(name: str, value: Number | tuple[Number, ...] | list[Number], stages: int) -> list[Number]:
    """Expand an option to a list with one value per stage.

    name: the option's name, for the error message.
    value: one number for all stages, or a list with one number per stage.
    stages: number of stages.

    Raises ValueError where the list's length is not the number of stages.
    """
    if not isinstance(value, list | tuple):
        return [value] * stages
    if len(value) != stages:
        shown = ",".join(map(str, value))
        raise ValueError(
            f"{name}=[{shown}] has {len(value)} values, but {stages} are needed; give one value for all stages, or {stages}"
        )
    return list(value)


class MLP(nn.Sequential):
    """Two linear layers with biases and an exact (erf) GELU between them, on the last axis.

    dim: input and output width D.
    ratio: hidden width divided by ``dim``.
    dropout: dropout probability after the GELU.
    """

    def __init__(self, dim: int, ratio: float, dropout: float = 0.0) -> None:
        hidden = max(1, round(ratio * dim))
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim))


def drop_rates(stochastic_depth: float, blocks: int) -> list[float]:
    """The probability of dropping a branch, for each block: it increases linearly from 0 in the first to the last one's."""
    return [stochastic_depth * i / max(1, blocks - 1) for i in range(blocks)]


class PreNormBlock(Block):
    """Pre-norm transformer block, x += mixer(norm(x)); x += mlp(norm(x)): (B, N, D) → (B, N, D).

    dim: width D of the tokens.
    mixer, mlp: modules (B, N, D) → (B, N, D).
    dropout: dropout probability of both branches' outputs.
    norm: constructor of the norms, called with ``dim``.
    stochastic_depth: probability of dropping each branch for an image in training.
    layer_scale: initial value of the gains of :class:`LayerScale` on both branches' outputs; None: no gains.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        dropout: float = 0.0,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        stochastic_depth: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.mixer = norm(dim), mixer
        self.norm2, self.mlp = norm(dim), mlp
        self.scale1, self.scale2 = (nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2))
        self.dropout, self.drop_path = nn.Dropout(dropout), StochasticDepth(stochastic_depth)

    def forward_once(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.drop_path(self.scale1(self.dropout(self.mixer(self.norm1(x_BND)))))
        return x_BND + self.drop_path(self.scale2(self.dropout(self.mlp(self.norm2(x_BND)))))


class ChannelNorm(nn.Module):
    """(x − mean) / (std + 1e-5) over the channels of each token, with gain and offset: CvT's norm in the published runs.

    It differs from LayerNorm in the position of the 1e-5, and in the parameters' names: the paper counts only parameters
    named weight or bias, so not these.

    dim: width D of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain_D, self.offset_D = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x_BND: Tensor) -> Tensor:
        (x_BND,) = upcast_fp32(x_BND)
        centered_BND = x_BND - x_BND.mean(dim=-1, keepdim=True)
        # vector_norm has a finite gradient where all channels are equal; the square root of the variance does not.
        std_BN1 = torch.linalg.vector_norm(centered_BND, dim=-1, keepdim=True) / x_BND.shape[-1] ** 0.5
        return centered_BND / (std_BN1 + 1e-5) * self.gain_D + self.offset_D


class LayerScale(nn.Module):
    """A learned gain per channel (Touvron et al., "Going deeper with Image Transformers", 2021): (B, N, D) → (B, N, D).

    dim: width D of the tokens.   initial: initial value of the gains.
    """

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gain_D = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND * self.gain_D


class StochasticDepth(nn.Module):
    """Drop a residual branch of each image with this probability in training (Huang et al., "Stochastic Depth", 2016)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x_BND: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return x_BND
        keep = 1 - self.probability
        kept_B11 = torch.rand(len(x_BND), 1, 1, device=x_BND.device) < keep
        return x_BND * (kept_B11 / keep).to(x_BND.dtype)
