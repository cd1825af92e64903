"""From an image to tokens: a linear map per patch, the three convolutions of the Hybrid models, or CCT's tokenizer.

Contract: the constructor takes ``image_size``, ``channels`` and ``dim``, then keyword-only options; ``grid`` tells the rows
and columns of tokens; ``forward`` takes ``images_BCYX`` and returns the (B, D, Y, X) map of tokens.
"""

from itertools import pairwise

from torch import Tensor, nn

from vix.errors import nearest_divisors
from vix.types import Positive


class Embedding(nn.Module):
    """What every embedding shares: the token grid that ``patch_size`` makes of an image.

    Raises ValueError where ``patch_size`` does not divide ``image_size``.
    """

    def __init__(self, image_size: int, patch_size: int) -> None:
        super().__init__()
        if image_size % patch_size:
            near = nearest_divisors(image_size, patch_size)
            raise ValueError(f"patch_size={patch_size} does not divide the image size {image_size}; nearest that do: {near}")
        self.grid = (image_size // patch_size, image_size // patch_size)


class PatchEmbed(Embedding):
    """One linear map with bias per patch (ViT: Dosovitskiy et al., 2021).

    patch_size: side of a patch in pixels; 1 makes every pixel a token.
    """

    def __init__(self, image_size: int, channels: int, dim: int, *, patch_size: Positive = 1) -> None:
        super().__init__(image_size, patch_size)
        self.project = nn.Conv2d(channels, dim, patch_size, stride=patch_size)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        return self.project(images_BCYX)


class ConvStem(Embedding):
    """A stack of 3×3 convolutions with bias and *nothing between them*, as in the published Hybrid models.

    hidden: channels of all convolutions but the last, which has the model's width.
    patch_size: stride of the last convolution, whose kernel is then patch_size + 2 wide, so that every pixel is seen and
        neighbouring patches overlap by one pixel; 1 is the published model.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        dim: int,
        *,
        patch_size: Positive = 1,
        hidden: tuple[Positive, ...] = (32, 64),
    ) -> None:
        super().__init__(image_size, patch_size)
        widths = (channels, *hidden)
        layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], dim, patch_size + 2, stride=patch_size, padding=1))

    def forward(self, images_BCYX: Tensor) -> Tensor:
        return self.layers(images_BCYX)


class CCTTokenizer(Embedding):
    """A stack of [3×3 convolution without bias, ReLU, 3×3 max-pooling], CCT's tokenizer (Hassani et al., 2021).

    Convolutions start from Kaiming's normal distribution.

    hidden: channels of all convolutions but the last, which has the model's width.
    patch_size: stride of the last pooling, whose kernel grows with it from 4 on, so that every pixel is seen; 1 is the
        published model.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        dim: int,
        *,
        patch_size: Positive = 1,
        hidden: tuple[Positive, ...] = (64, 64),
    ) -> None:
        super().__init__(image_size, patch_size)
        self.layers = nn.Sequential()
        for before, after in pairwise((channels, *hidden, dim)):
            conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            self.layers.extend([conv, nn.ReLU(), nn.MaxPool2d(3, stride=1, padding=1)])
        self.layers[-1] = nn.MaxPool2d(max(3, patch_size), stride=patch_size, padding=1)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        return self.layers(images_BCYX)
