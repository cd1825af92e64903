"""TrivialAugment on the device, one batch at a time: Müller and Hutter, "TrivialAugment", 2021."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

GRAY = 127.5  # fill value outside of the image


class TrivialAugment:
    """Apply one of the 14 operations below to each image, with a magnitude drawn uniformly from 0 to ``max_magnitude``.

    An instance has the random numbers of one epoch. Magnitudes are continuous, where the paper has 31 values, and shears
    are about the center of the image, where torchvision's are about its upper left corner.

    max_magnitude: largest magnitude, in (0, 1]; 1 is the paper's "wide" space.
    count: images per epoch.
    batch_size: images per batch.
    random: the epoch's generator, on the host.
    device: device of the images.
    """

    def __init__(
        self, max_magnitude: float, count: int, batch_size: int, random: torch.Generator, device: torch.device
    ) -> None:
        operation = torch.randint(len(OPERATIONS), (count,), generator=random)
        amount = max_magnitude * (2 * torch.rand(count, generator=random) - 1)
        # Within a batch, images are grouped by operation, so that each operation is one call.
        batch = torch.arange(count) // batch_size
        group = batch * len(OPERATIONS) + operation
        order = group.argsort(stable=True)
        self.batch_size = batch_size
        self.sizes = group.bincount(minlength=int(batch[-1] + 1) * len(OPERATIONS)).view(-1, len(OPERATIONS)).tolist()
        self.order = (order - batch * batch_size).to(device)
        self.amount = amount[order].to(device)

    def __call__(self, images_BCYX: Tensor, number: int) -> Tensor:
        """Augment a batch of images: uint8 (B, C, Y, X) → the same shape, dtype and order.

        images_BCYX: images of the batch.
        number: number of the batch in the epoch, from 0.
        """
        batch = slice(number * self.batch_size, (number + 1) * self.batch_size)
        order, amounts, sizes = self.order[batch], self.amount[batch], self.sizes[number]
        groups = zip(OPERATIONS.values(), images_BCYX[order].split(sizes), amounts.split(sizes), strict=True)
        changed = torch.empty_like(images_BCYX)
        changed[order] = torch.cat([operation(images, amount) for operation, images, amount in groups if len(images)])
        return changed


def warp(images_BCYX: Tensor, entries: dict[tuple[int, int], Tensor]) -> Tensor:
    """Warp images by an affine map from output to input coordinates in [−1, 1]², with bilinear interpolation.

    images_BCYX: images (B, C, Y, X), uint8.
    entries: entries (B,) of the 2×3 matrix of the map by (row, column); all others are those of the identity.
    """
    map_B23 = torch.eye(2, 3, device=images_BCYX.device).repeat(len(images_BCYX), 1, 1)
    for (row, column), value_B in entries.items():
        map_B23[:, row, column] = value_B
    grid_BYX2 = F.affine_grid(map_B23, list(images_BCYX.shape), align_corners=False)
    return as_uint8(F.grid_sample(images_BCYX - GRAY, grid_BYX2, align_corners=False) + GRAY)


def rotate(images_BCYX: Tensor, amount_B: Tensor) -> Tensor:
    """Rotate by up to 135°."""
    angle = amount_B * (0.75 * math.pi)
    cos, sin = angle.cos(), angle.sin()
    return warp(images_BCYX, {(0, 0): cos, (0, 1): -sin, (1, 0): sin, (1, 1): cos})


def blend(images_BCYX: Tensor, other: Tensor, amount_B: Tensor) -> Tensor:
    """Interpolate between ``other`` (amount −1) and the image (0), and extrapolate beyond the image (1)."""
    factor = 1 + 0.99 * amount_B[:, None, None, None]
    return as_uint8(other + factor * (images_BCYX - other))


def brightness(images_BCYX: Tensor, amount_B: Tensor) -> Tensor:
    """Blend with black."""
    return blend(images_BCYX, torch.zeros((), device=images_BCYX.device), amount_B)


def color(images_BCYX: Tensor, amount_B: Tensor) -> Tensor:
    """Blend with the grayscale image."""
    return blend(images_BCYX, tv.rgb_to_grayscale(images_BCYX).float(), amount_B)


def contrast(images_BCYX: Tensor, amount_B: Tensor) -> Tensor:
    """Blend with the mean of the grayscale image."""
    return blend(images_BCYX, tv.rgb_to_grayscale(images_BCYX).float().mean(dim=(1, 2, 3), keepdim=True), amount_B)


def sharpness(images_BCYX: Tensor, amount_B: Tensor) -> Tensor:
    """Blend with the image smoothed by Pillow's 3×3 kernel (5 in the center, 1 elsewhere); border pixels are not smoothed."""
    smooth = images_BCYX.float()
    inner = smooth[:, :, 1:-1, 1:-1].clone()
    smooth[:, :, 1:-1, 1:-1] = (4 * inner + 9 * F.avg_pool2d(images_BCYX.float(), 3, stride=1)) / 13
    return blend(images_BCYX, smooth, amount_B)


def posterize(images_BCYX: Tensor, amount_B: Tensor) -> Tensor:
    """Clear up to 6 of the 8 bits of each value."""
    bits = (6 * amount_B.abs()).round().to(torch.uint8)[:, None, None, None]
    return images_BCYX >> bits << bits


def solarize(images_BCYX: Tensor, amount_B: Tensor) -> Tensor:
    """Invert values at or above a threshold that decreases from 255 to 0 with the magnitude."""
    threshold = 255 * (1 - amount_B.abs())[:, None, None, None]
    return torch.where(images_BCYX >= threshold, 255 - images_BCYX, images_BCYX)


def as_uint8(images: Tensor) -> Tensor:
    """Round and clamp to uint8."""
    return images.round().clamp(0, 255).to(torch.uint8)


# Each maps uint8 images (B, C, Y, X) and signed magnitudes (B,) in [−1, 1] to uint8 images.
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda images, amount: images,
    "shear_x": lambda images, amount: warp(images, {(0, 1): 0.99 * amount}),
    "shear_y": lambda images, amount: warp(images, {(1, 0): 0.99 * amount}),
    "translate_x": lambda images, amount: warp(images, {(0, 2): 2 * amount}),  # by up to the full width
    "translate_y": lambda images, amount: warp(images, {(1, 2): 2 * amount}),
    "rotate": rotate,
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": lambda images, amount: tv.autocontrast(images),
    "equalize": lambda images, amount: tv.equalize(images),
}
