"""Augmentation of training images on the device, one batch at a time.

All random numbers of an epoch are drawn on the host with the epoch's generator and copied to the device at its start. So the
augmentation of an image does not depend on where an interrupted epoch continues, and the host never waits for the device.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vix.errors import ConfigError
from vix.types import NotNegative, UnitInterval

Alpha = Annotated[float, Field(ge=0.01, allow_inf_nan=False)]  # of a Beta distribution; smaller ones are inexact in float32


@dataclass(kw_only=True)
class Augmentation:
    """Options of the augmentation of training images.

    flip: flip horizontally with probability 1/2; ``alternate``: an image at random in the first epoch, then in every second
        one, so that two epochs show both versions of every image (Jordan, "94% on CIFAR-10 in 3.29 Seconds", 2024).
    crop_padding: pad by this many black pixels and crop at random; 0: off.
    trivial_augment: TrivialAugment (Müller and Hutter, 2021) with at most this magnitude, in (0, 1]; null: off.
    random_erasing: probability of a gray rectangle (Zhong et al., 2020), in (0, 1]; null: off.
    mixup: α ≥ 0.01 of MixUp's Beta(α, α) distribution (Zhang et al., 2018); null: off.
    cutmix: α of CutMix's Beta(α, α) distribution (Yun et al., 2019); null: off. With both, each batch gets one of them.
    """

    flip: bool | Literal["alternate"] = False
    crop_padding: NotNegative = 0
    trivial_augment: UnitInterval | None = None
    random_erasing: UnitInterval | None = None
    mixup: Alpha | None = None
    cutmix: Alpha | None = None

    def check(self, image_size: int) -> None:
        """Check these options against the images' size.

        image_size: side of the images, in pixels.

        Raises ConfigError where images of this size cannot be augmented.
        """
        if self.trivial_augment and image_size < 3:
            raise ConfigError(f"augment.trivial_augment={self.trivial_augment}: needs images of 3 pixels and more; use null")


class EpochAugmentation:
    """The augmentation of one epoch, with its random numbers.

    options: options of the augmentation.
    shape: (count, C, Y, X) of the training images.
    batch_size: images per batch.
    classes: number K of classes, for mixed labels.
    random: the epoch's generator, on the host.
    device: device of the images.
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
        """Crop and TrivialAugment, on uint8 images: (B, C, Y, X) → the same shape and dtype.

        images: images of the batch.
        number: number of the batch in the epoch, from 0.
        """
        if self.options.crop_padding:
            images = crop(images, self.options.crop_padding, *self.corners[:, self.batch(number)])
        return self.trivial_augment(images, number) if self.trivial_augment else images

    def after_normalization(self, images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Flip, random erasing, MixUp and CutMix, on normalized images.

        images: images (B, C, Y, X) of the batch, in [−1, 1].
        labels: their labels (B,).
        number: number of the batch in the epoch, from 0.
        Returns images, and labels (B,) or, with MixUp or CutMix, class probabilities (B, K).
        """
        batch = self.batch(number)
        if self.options.flip:
            images = torch.where(self.flips[batch, None, None, None], images.flip(-1), images)
        if self.random_erasing:
            images = self.random_erasing(images, batch)
        return self.mix(images, labels, number) if self.mix else (images, labels)

    def batch(self, number: int) -> slice:
        """Positions of batch ``number``'s images in the epoch."""
        return slice(number * self.batch_size, (number + 1) * self.batch_size)


def alternate_flips(count: int, seed: int, epoch: int) -> Tensor:
    """Which images ``flip=alternate`` flips in an epoch, (count,) in the order of the split: the others of the epoch before.

    seed: seed of the run.   epoch: number of the epoch, from 0.
    """
    first = torch.rand(count, generator=torch.Generator().manual_seed(seed % 2**63)) < 0.5
    return first ^ bool(epoch % 2)


def crop(images_BCYX: Tensor, padding: int, top_B: Tensor, left_B: Tensor) -> Tensor:
    """Pad images with black on all sides and crop each at its own position to the original size.

    images_BCYX: images (B, C, Y, X).
    padding: width of the padding, in pixels.
    top_B, left_B: corner of each crop in the padded image, from 0 to 2 · padding, (B,).
    """
    height, width = images_BCYX.shape[2:]
    padded_BYXC = F.pad(images_BCYX, (padding,) * 4).permute(0, 2, 3, 1)
    batch = torch.arange(len(images_BCYX), device=images_BCYX.device)[:, None, None]
    rows = (top_B[:, None] + torch.arange(height, device=top_B.device))[:, :, None]
    columns = (left_B[:, None] + torch.arange(width, device=left_B.device))[:, None, :]
    return padded_BYXC[batch, rows, columns].permute(0, 3, 1, 2)


class RandomErasing:
    """Erase a gray rectangle of 2 to 33 % of the area and aspect ratio 0.3 to 3.3 from images, at random.

    Source: Zhong et al., "Random Erasing Data Augmentation", 2020.

    probability: probability that an image is changed.
    count: images per epoch.
    height, width: size of an image, in pixels.
    random: the epoch's generator, on the host.
    device: device of the images.
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
        """Erase rectangles from one batch of normalized images, where gray is 0.

        images_BCYX: images (B, C, Y, X) in [−1, 1].
        batch: positions of the images in the epoch.
        """
        top, bottom, left, right = self.corners[:, batch, None, None, None]
        rows, columns = (torch.arange(n, device=images_BCYX.device) for n in images_BCYX.shape[2:])
        inside = (top <= rows[:, None]) & (rows[:, None] < bottom) & (left <= columns) & (columns < right)
        return images_BCYX.masked_fill(inside, 0)


class Mix:
    """MixUp (Zhang et al., 2018) and CutMix (Yun et al., 2019), as implemented by torchvision.

    With both, each batch is mixed by one of them, with probability 1/2.

    mixup, cutmix: α of the Beta(α, α) distribution of the mixing weight; None: off.
    classes: number K of classes.
    batches: batches per epoch.
    height, width: size of an image, in pixels.
    random: the epoch's generator, on the host.
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
        # torchvision draws from the host's global generator. torch.manual_seed would also seed the GPUs' generators.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=random)))
            self.draws = [(transforms[kind], transforms[kind].make_params([image])) for kind in kinds]

    def __call__(self, images_BCYX: Tensor, labels_B: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Mix the images and labels of a batch.

        images_BCYX: images (B, C, Y, X) in [−1, 1].
        labels_B: labels (B,).
        number: number of the batch in the epoch, from 0.
        Returns mixed images (B, C, Y, X) and class probabilities (B, K).
        """
        transform, params = self.draws[number]
        params = {**params, "labels": labels_B, "batch_size": len(labels_B)}
        return transform.transform(images_BCYX, params), transform.transform(labels_B, params)
