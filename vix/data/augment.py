"""Augmentation of training images on the device, a whole batch at a time.

All draws of an epoch are made on the host with the epoch's generator and moved to the device in one piece: which change an
image undergoes does not depend on where an interrupted epoch continues, and nothing waits for the device.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vix.errors import ConfigError
from vix.types import NotNegative, PositiveFloat, UnitInterval


@dataclass(kw_only=True)
class Augmentation:
    """How training images are changed.

    flip: flip horizontally with probability 1/2.
    crop_padding: pad by this many black pixels and crop at random; 0: off.
    trivial_augment: TrivialAugment (Müller and Hutter, 2021) with at most this magnitude, in (0, 1]; null: off.
    random_erasing: probability of a grey rectangle (Zhong et al., 2020), in (0, 1]; null: off.
    mixup: α of MixUp's Beta(α, α) distribution (Zhang et al., 2018); null: off.
    cutmix: α of CutMix's Beta(α, α) distribution (Yun et al., 2019); null: off. With both, each batch gets one of them.
    """

    flip: bool = False
    crop_padding: NotNegative = 0
    trivial_augment: UnitInterval | None = None
    random_erasing: UnitInterval | None = None
    mixup: PositiveFloat | None = None
    cutmix: PositiveFloat | None = None

    def check(self, image_size: int) -> None:
        """Raises ConfigError where images of this size, in pixels, cannot be augmented so."""
        if self.trivial_augment and image_size < 3:
            raise ConfigError(f"augment.trivial_augment={self.trivial_augment}: needs images of 3 pixels and more; use null")


class EpochAugmentation:
    """The draws of one epoch.

    shape: (count, C, Y, X) of the training images.
    classes: number K of classes, for mixed labels.
    random: the epoch's generator, on the host.
    """

    def __init__(
        self,
        options: Augmentation,
        shape: torch.Size,
        batch_size: int,
        classes: int,
        random: torch.Generator,
        device: torch.device,
    ) -> None:
        self.options, self.batch_size = options, batch_size
        count, _, height, width = shape
        self.flips = (torch.rand(count, generator=random) < 0.5).to(device)
        self.corners = torch.randint(2 * options.crop_padding + 1, (2, count), generator=random).to(device)
        self.trivial_augment = self.random_erasing = self.mix = None
        if options.trivial_augment:
            from vix.data.trivial_augment import TrivialAugment  # imports torchvision, which takes seconds

            self.trivial_augment = TrivialAugment(options.trivial_augment, count, batch_size, random, device)
        if options.random_erasing:
            self.random_erasing = RandomErasing(options.random_erasing, count, height, width, random, device)
        if options.mixup or options.cutmix:
            batches = math.ceil(count / batch_size)
            self.mix = Mix(options.mixup, options.cutmix, classes, batches, height, width, random)

    def before_normalization(self, images: Tensor, number: int) -> Tensor:
        """Batch ``number`` of the epoch, uint8 (B, C, Y, X) → the same shape and type."""
        if self.options.crop_padding:
            images = crop(images, self.options.crop_padding, *self.corners[:, self.batch(number)])
        return self.trivial_augment(images, number) if self.trivial_augment else images

    def after_normalization(self, images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Batch ``number``, images in [−1, 1] and labels (B,) → images and labels, or class probabilities (B, K)."""
        batch = self.batch(number)
        if self.options.flip:
            images = torch.where(self.flips[batch, None, None, None], images.flip(-1), images)
        if self.random_erasing:
            images = self.random_erasing(images, batch)
        return self.mix(images, labels, number) if self.mix else (images, labels)

    def batch(self, number: int) -> slice:
        """Positions of the batch's images in the epoch."""
        return slice(number * self.batch_size, (number + 1) * self.batch_size)


def crop(images_BCYX: Tensor, padding: int, top_B: Tensor, left_B: Tensor) -> Tensor:
    """Pad with black on all sides, and crop each image at its own position to the old size."""
    height, width = images_BCYX.shape[2:]
    padded_BYXC = F.pad(images_BCYX, (padding,) * 4).permute(0, 2, 3, 1)
    batch = torch.arange(len(images_BCYX), device=images_BCYX.device)[:, None, None]
    rows = (top_B[:, None] + torch.arange(height, device=top_B.device))[:, :, None]
    columns = (left_B[:, None] + torch.arange(width, device=left_B.device))[:, None, :]
    return padded_BYXC[batch, rows, columns].permute(0, 3, 1, 2)


class RandomErasing:
    """A grey rectangle over an image with some probability: 2 to 33 % of its area, aspect ratio 0.3 to 3.3.

    count: images per epoch; height, width: of an image, in pixels.

    Source: Zhong et al., "Random Erasing Data Augmentation", 2020.
    """

    def __init__(
        self, probability: float, count: int, height: int, width: int, random: torch.Generator, device: torch.device
    ) -> None:
        chosen, area, ratio, top, left = torch.rand(5, count, generator=random)
        pixels = (0.02 + 0.31 * area) * height * width
        ratio = torch.exp(math.log(3.3) * (2 * ratio - 1))
        rows = (pixels * ratio).sqrt().round().clamp(1, height)
        columns = (pixels / ratio).sqrt().round().clamp(1, width) * (chosen < probability)
        top, left = (top * (height - rows + 1)).floor(), (left * (width - columns + 1)).floor()
        self.corners = torch.stack([top, top + rows, left, left + columns]).to(device)

    def __call__(self, images_BCYX: Tensor, batch: slice) -> Tensor:
        """Images in [−1, 1] at these places of the epoch; grey is 0."""
        top, bottom, left, right = self.corners[:, batch, None, None, None]
        rows, columns = (torch.arange(n, device=images_BCYX.device) for n in images_BCYX.shape[2:])
        inside = (top <= rows[:, None]) & (rows[:, None] < bottom) & (left <= columns) & (columns < right)
        return images_BCYX.masked_fill(inside, 0)


class Mix:
    """torchvision's MixUp and CutMix; with both, each batch is mixed by one of them, with probability 1/2.

    mixup, cutmix: α of the Beta(α, α) distribution of the first image's share; None: off.
    classes: number K of classes.
    batches: per epoch.
    height, width: of an image, in pixels.
    """

    def __init__(
        self,
        mixup: float | None,
        cutmix: float | None,
        classes: int,
        batches: int,
        height: int,
        width: int,
        random: torch.Generator,
    ) -> None:
        from torchvision.transforms.v2 import CutMix, MixUp  # imports torchvision, which takes seconds

        transforms = [kind(alpha=alpha, num_classes=classes) for kind, alpha in ((MixUp, mixup), (CutMix, cutmix)) if alpha]
        kinds = torch.randint(len(transforms), (batches,), generator=random).tolist()
        image = torch.empty(1, 1, height, width)
        # torchvision draws from the host's global generator (and torch.manual_seed would seed those of GPUs, too).
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=random)))
            self.draws = [(transforms[kind], transforms[kind].make_params([image])) for kind in kinds]

    def __call__(self, images_BCYX: Tensor, labels_B: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Batch ``number`` of the epoch, images in [−1, 1] → mixed images and class probabilities (B, K)."""
        transform, params = self.draws[number]
        params = {**params, "labels": labels_B, "batch_size": len(labels_B)}
        return transform.transform(images_BCYX, params), transform.transform(labels_B, params)
