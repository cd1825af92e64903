"""Embeddings of images as tokens: a linear map per patch, the Hybrid models' convolutional stem, and CCT's tokenizer.

Interface: the constructor takes

    image_size: side of the square images, in pixels,
    channels: number C of image channels,
    dim: width D of the tokens,

then keyword-only options. ``grid`` holds the numbers of rows and columns of tokens. ``forward`` maps ``images_BCYX`` to the map
of tokens (B, D, Y, X). Its first layer must be a convolution, which Muon leaves to AdamW as the layer of the input.
"""

from itertools import pairwise

from torch import Tensor, nn

from vix.errors import nearest_divisors
from vix.types import Positive


class Embedding(nn.Module):
    """Base class of the embeddings: the grid of tokens, one per ``patch_size`` × ``patch_size`` pixels.

    image_size, patch_size: side of an image and of a patch, in pixels.

    Raises ValueError where ``patch_size`` does not divide ``image_size``.
    """

    def __init__(self, image_size: int, patch_size: int) -> None:
        super().__init__()
        if image_size % patch_size:
            near = nearest_divisors(image_size, patch_size)
            raise ValueError(f"patch_size={patch_size} does not divide the image size {image_size}; nearest that do: {near}")
        self.grid = (image_size // patch_size, image_size // patch_size)


class PatchEmbed(Embedding):
    """A linear map with bias of every patch, as in ViT (Dosovitskiy et al., 2021).

    patch_size: side of a patch in pixels; 1: every pixel is a token.

    Raises ValueError where ``patch_size`` does not divide ``image_size``.
    """

    def __init__(self, image_size: int, channels: int, dim: int, *, patch_size: Positive = 1) -> None:
        super().__init__(image_size, patch_size)
        self.project = nn.Conv2d(channels, dim, patch_size, stride=patch_size)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        return self.project(images_BCYX)


class ConvStem(Embedding):
    """A stack of 3×3 convolutions with bias and without activations, as in the published Hybrid models.

    patch_size: stride of the last convolution, in pixels. Its kernel has side patch_size + 2, so that every pixel counts and
        adjacent patches overlap. The published models have 1.
    hidden: output channels of all convolutions but the last, whose output width is ``dim``.

    Raises ValueError where ``patch_size`` does not divide ``image_size``.
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
    """CCT's tokenizer, a stack of [3×3 convolution without bias, ReLU, 3×3 max-pooling] (Hassani et al., 2021).

    Convolutions are initialized from Kaiming's normal distribution.

    patch_size: stride of the last pooling, in pixels. Its kernel has side max(3, patch_size), so that every pixel counts. The
        published models have 1.
    hidden: output channels of all convolutions but the last, whose output width is ``dim``.

    Raises ValueError where ``patch_size`` does not divide ``image_size``.
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
        self.layers[-1] = nn.MaxPool2d(max(3, patch_size), stride=patch_size, padding=1 if patch_size < 3 else 0)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        return self.layers(images_BCYX)
