"""Images that live on the device as uint8 and are normalised and augmented there, a batch at a time.

CIFAR-10 is 184 MB this way. There are no worker processes: nothing has to be fed to the device during an epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vix.checks import ConfigError, DataError, NotNegative, Positive


@dataclass
class Split:
    """Images (count, C, Y, X) as uint8 and labels (count,) as int64, on the device they will be used on."""

    images: Tensor
    labels: Tensor
    flip: bool = False
    crop_padding: int = 0

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
        """The batches of a training epoch from ``first_batch`` on, shuffled and augmented.

        Order and augmentation are a function of ``seed`` and ``epoch`` alone, so an interrupted epoch continues exactly.
        They are drawn on the host for the whole epoch and moved in one piece: no transfer waits inside the epoch.
        """
        random = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        count, device = len(self), self.images.device
        order = torch.randperm(count, generator=random).to(device)
        flips = (torch.rand(count, generator=random) < 0.5).to(device)
        corners = torch.randint(2 * self.crop_padding + 1, (2, count), generator=random).to(device)
        for start in range(first_batch * batch_size, count, batch_size):
            batch = slice(start, start + batch_size)
            images = self.images[order[batch]]
            if self.crop_padding:
                images = crop(images, self.crop_padding, *corners[:, batch])
            images = scale(images)
            if self.flip:
                images = torch.where(flips[batch, None, None, None], images.flip(-1), images)
            yield images, self.labels[order[batch]]


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


class ImageData:
    """An image set: its shape, known without reading, and its two splits.

    train_size, test_size: number of images, balanced over the classes, the same ones for every seed; None takes all.
    flip: mirror training images left to right with probability ½.
    crop_padding: pad training images by so many black pixels and cut a random window out; 0 does not.

    Subclasses set the four attributes and ``read``.
    """

    image_size: int
    channels: int
    class_names: tuple[str, ...]
    sizes: tuple[int, int]  # images in the whole training and test split

    def __init__(
        self,
        *,
        train_size: Positive | None = None,
        test_size: Positive | None = None,
        flip: bool = False,
        crop_padding: NotNegative = 0,
    ) -> None:
        self.subset = (train_size, test_size)
        self.flip, self.crop_padding = flip, crop_padding
        for name, size, available in zip(("train_size", "test_size"), self.subset, self.sizes, strict=True):
            if size is not None and not self.classes <= size <= available:
                raise ConfigError(f"data.{name}={size}: must be from {self.classes} (one image a class) to {available}")

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def read(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Images (count, Y, X, C) as uint8 and labels (count,) of the training and of the test split.

        Raises DataError where the files are missing or not what they should be.
        """
        raise NotImplementedError

    def load(self, device: torch.device) -> tuple[Split, Split]:
        """Read both splits, take the subsets asked for, and move them to the device. Raises DataError."""
        splits = []
        for (images, labels), size, name in zip(self.read(), self.subset, ("training", "test"), strict=True):
            if set(np.unique(labels)) != set(range(self.classes)):
                raise DataError(f"the {name} labels are not 0 to {self.classes - 1}: the files are not this image set's")
            if size is not None:
                chosen = balanced_subset(labels, size)
                images, labels = images[chosen], labels[chosen]
            images_BCYX = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
            splits.append(Split(images_BCYX.to(device), torch.from_numpy(labels.astype(np.int64)).to(device)))
        train, test = splits
        train.flip, train.crop_padding = self.flip, self.crop_padding
        return train, test


def balanced_subset(labels: np.ndarray, size: int) -> np.ndarray:
    """Positions, in order, of ``size`` items with as equal a number of every class as there are items for.

    Drawn with a fixed seed of its own: runs with different seeds train on the same subset, so they compare.
    """
    random = np.random.default_rng(0)
    by_class = [random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    # The first item of every class, then the second of every class, … until there are enough.
    rounds = sorted((i, c, item) for c, items in enumerate(by_class) for i, item in enumerate(items))
    return np.sort([item for _, _, item in rounds[:size]])
