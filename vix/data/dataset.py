"""Images that live on the device as uint8 and are normalised and augmented there, a batch at a time.

CIFAR-10 is 184 MB this way. There are no worker processes: nothing has to be fed to the device during an epoch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vix.checks import ConfigError, DataError, NotNegative, Portion, Positive, PositiveFloat
from vix.data.mix import Mix


@dataclass
class Split:
    """Images (count, C, Y, X) as uint8 and labels (count,) as int64, on the device they will be used on."""

    images: Tensor
    labels: Tensor
    flip: bool = False
    crop_padding: int = 0
    trivial_augment: float | None = None
    erase: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    classes: int = 0  # needed for mixing

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + self.labels.nbytes

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (images in [−1, 1], labels) in the order of the set."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield scale(images), labels

    def shuffled(self, batch_size: int, seed: int, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a training epoch from ``first_batch`` on, shuffled, augmented and mixed.

        Labels are int64 (B,), or where images are mixed the classes' shares (B, K). Order and augmentation are a function of
        ``seed`` and ``epoch`` alone, so an interrupted epoch continues exactly. They are drawn on the host for the whole
        epoch and moved in one piece: no transfer waits inside the epoch.
        """
        random = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        count, device = len(self), self.images.device
        order = torch.randperm(count, generator=random).to(device)
        flips = (torch.rand(count, generator=random) < 0.5).to(device)
        corners = torch.randint(2 * self.crop_padding + 1, (2, count), generator=random).to(device)
        trivial_augment = erase = mix = None
        if self.trivial_augment or self.erase:
            from vix.data import augment  # imports torchvision, which takes seconds

            if self.trivial_augment:
                trivial_augment = augment.TrivialAugment(self.trivial_augment, count, batch_size, random, device)
            if self.erase:
                height, width = self.images.shape[2:]
                erase = augment.Erase(self.erase, count, height, width, random, device)
        if self.mixup or self.cutmix:
            mix_seed = int(torch.randint(2**62, (), generator=random))
            mix = Mix(self.mixup, self.cutmix, self.classes, math.ceil(count / batch_size), mix_seed)
        for number in range(first_batch, math.ceil(count / batch_size)):
            batch = slice(number * batch_size, (number + 1) * batch_size)
            images, labels = self.images[order[batch]], self.labels[order[batch]]
            if self.crop_padding:
                images = crop(images, self.crop_padding, *corners[:, batch])
            if trivial_augment:
                images = trivial_augment(images, number)
            images = scale(images)
            if self.flip:
                images = torch.where(flips[batch, None, None, None], images.flip(-1), images)
            if erase:
                images = erase(images, batch)
            yield mix(images, labels, number) if mix else (images, labels)


def scale(images: Tensor) -> Tensor:
    """uint8 0…255 → float32 in [−1, 1], the paper's normalisation."""
    return images.float().div_(127.5).sub_(1)


def crop(images_BCYX: Tensor, padding: int, top_B: Tensor, left_B: Tensor) -> Tensor:
    """Pad with black on all sides and cut each image's own window of the old size out of it."""
    height, width = images_BCYX.shape[2:]
    padded_BYXC = F.pad(images_BCYX, (padding,) * 4).permute(0, 2, 3, 1)
    batch = torch.arange(len(images_BCYX), device=images_BCYX.device)[:, None, None]
    rows = (top_B[:, None] + torch.arange(height, device=top_B.device))[:, :, None]
    columns = (left_B[:, None] + torch.arange(width, device=left_B.device))[:, None, :]
    return padded_BYXC[batch, rows, columns].permute(0, 3, 1, 2)


class Images(Protocol):
    """Images of a set: the positions (count,) of some → those images (count, Y, X, C) as uint8, read by then at the latest."""

    def __getitem__(self, positions: np.ndarray, /) -> np.ndarray: ...


Labelled = tuple[Images, np.ndarray]


class ImageSet:
    """The shape of an image set, known without reading it."""

    image_size: int
    channels: int
    class_names: tuple[str, ...]
    classes: int
    sizes: tuple[int, int]  # images in the whole training and test split


@dataclass(kw_only=True)
class ImageData(ImageSet):
    """An image set and what is done to it: which images train, how they are changed, and which are tested.

    train_size, test_size: number of images, balanced over the classes, the same ones for every seed; None takes all.
    validation_size: so many of the training images, balanced, the same ones for every seed and size, are kept from training
        and tested instead of the test images: for choices that the test images must not decide. None does not.
    flip: mirror training images left to right with probability ½.
    crop_padding: pad training images by so many black pixels and cut a random window out; 0 does not.
    trivial_augment: change each training image by one random operation, at most so strong (1: the wide space of Müller and
        Hutter, 2021); None does not.
    erase: probability of a grey rectangle over a training image (Zhong et al., 2020); None does without.
    mixup, cutmix: blend a training image with another (Zhang et al., 2018), or put a part of another into it (Yun et al.,
        2019), with shares from a Beta(α, α) of this α; both: one of them for each batch. None does not.

    Subclasses give the attributes of ``ImageSet``, but for ``classes``, and ``read``; and ``digest`` where the content is not
    always the same.
    """

    train_size: Positive | None = None
    test_size: Positive | None = None
    validation_size: Positive | None = None
    flip: bool = False
    crop_padding: NotNegative = 0
    trivial_augment: Portion | None = None
    erase: Portion | None = None
    mixup: PositiveFloat | None = None
    cutmix: PositiveFloat | None = None

    def __post_init__(self) -> None:
        self.classes = len(self.class_names)
        if self.trivial_augment and self.image_size < 3:
            raise ConfigError(f"data.trivial_augment={self.trivial_augment}: needs images of 3 pixels and more; use null")
        train, test = self.sizes
        held_out = self.validation_size or 0
        for name, size, available in (
            ("validation_size", self.validation_size, train - self.classes),
            ("train_size", self.train_size, train - held_out),
            ("test_size", self.test_size, held_out or test),
        ):
            if size is not None and not self.classes <= size <= available:
                raise ConfigError(f"data.{name}={size}: must be from {self.classes} (one image a class) to {available}")

    @property
    def train_images(self) -> int:
        """Number of training images."""
        return self.train_size or self.sizes[0] - (self.validation_size or 0)

    @property
    def tested_on(self) -> Literal["test", "validation"]:
        return "validation" if self.validation_size else "test"

    @property
    def digest(self) -> str:
        """Equal for equal images, wherever they lie; empty for a set that is always the same."""
        return ""

    @property
    def image_set(self) -> str:
        """Which images these are, as part of a run's identity and for people: the set's name, and where the content of that
        is not always the same the digest and the counts."""
        return type(self).__name__.lower()

    def read(self) -> tuple[Labelled, Labelled | None]:
        """Images and labels (count,) of the whole training and of the whole test split; None where the set has none to test.

        Raises DataError where the files are missing or not what they should be.
        """
        raise NotImplementedError

    def load(self, device: torch.device) -> tuple[Split, Split]:
        """Read what trains and what is tested, and move it to the device. Raises DataError."""
        train, test = self.read()
        for labelled, name in ((train, "training"), (test, "test")):
            if labelled and set(np.unique(labelled[1])) != set(range(self.classes)):
                raise DataError(f"the {name} labels are not 0 to {self.classes - 1}: the files are not this image set's")
        training = np.arange(len(train[1]))
        if self.validation_size:
            test, tested = train, self.held_out(train)
            training = np.delete(training, tested)
        else:
            assert test is not None  # else refused by the constructor of a set that may lack them
            tested = np.arange(len(test[1]))
        train_split = move(train, some(train, training, self.train_size), device)
        train_split.flip, train_split.crop_padding = self.flip, self.crop_padding
        train_split.trivial_augment, train_split.erase = self.trivial_augment, self.erase
        train_split.mixup, train_split.cutmix, train_split.classes = self.mixup, self.cutmix, self.classes
        return train_split, move(test, some(test, tested, self.test_size), device)

    def held_out(self, train: Labelled) -> np.ndarray:
        """Positions of the validation images. Raises DataError where a class would have none left to train on."""
        assert self.validation_size
        positions = some(train, np.arange(len(train[1])), self.validation_size)
        left = np.bincount(np.delete(train[1], positions), minlength=self.classes)
        if not left.all():
            name = self.class_names[int(left.argmin())]
            images = int((train[1] == left.argmin()).sum())
            raise DataError(
                f"data.validation_size={self.validation_size}: takes all {images} training images of class {name}; "
                "take fewer, or give that class more images"
            )
        return positions


def some(labelled: Labelled, positions: np.ndarray, size: int | None) -> np.ndarray:
    """``size`` of the positions, balanced over the classes; None takes all. Raises DataError where there are not so many."""
    if size is None:
        return positions
    if size > len(positions):  # else refused by the constructor, but for sets whose sizes only their files tell
        raise DataError(f"the image set holds {len(positions)} images of a split from which {size} are to be taken")
    return positions[balanced_subset(labelled[1][positions], size)]


def move(labelled: Labelled, positions: np.ndarray, device: torch.device) -> Split:
    """The images at these positions, with their labels, on the device."""
    images, labels = labelled
    images_BCYX = torch.from_numpy(np.ascontiguousarray(images[positions].transpose(0, 3, 1, 2)))
    return Split(images_BCYX.to(device), torch.from_numpy(labels[positions].astype(np.int64)).to(device))


def balanced_subset(labels: np.ndarray, size: int) -> np.ndarray:
    """Positions, in order, of ``size`` items with as equal a number of every class as there are items for.

    Drawn with a fixed seed of its own: runs with different seeds train on the same subset, so they compare.
    """
    random = np.random.default_rng(0)
    by_class = [random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    # The first item of every class, then the second of every class, … until there are enough.
    rounds = sorted((i, c, item) for c, items in enumerate(by_class) for i, item in enumerate(items))
    return np.sort([item for _, _, item in rounds[:size]])
