"""No mixing: the floor that shows what mixing is worth. Yu et al., "MetaFormer Baselines for Vision", 2022."""

from torch import Tensor, nn

from vix.layers.tokens import TokenGrid


class Identity(nn.Module):
    """Returns 0, so that a residual block is its MLP: no token sees another. No parameters.

    The authors' block adds the normalized tokens instead of 0; neither mixes them.
    """

    map_only = True  # read by vix.build.mixer_builder: a class token would never see the image

    def __init__(self, dim: int, tokens: TokenGrid) -> None:
        super().__init__()

    def forward(self, x_BND: Tensor) -> Tensor:
        return 0 * x_BND  # with a gradient of 0 for the norm before it: DistributedDataParallel waits for all gradients
