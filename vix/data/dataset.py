"""Image sets: which images there are, and which of them train and are evaluated."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from vix.data.loader import Split
from vix.errors import ConfigError, DataError
from vix.types import Positive


class Images(Protocol):
    """Images of a set: the positions (count,) of some → those images (count, Y, X, C) as uint8, read by then at the latest."""

    def __getitem__(self, positions: np.ndarray, /) -> np.ndarray: ...


LabeledImages = tuple[Images, np.ndarray]


class ImageSet:
    """The shape of an image set, known without reading it."""

    image_size: int
    channels: int
    class_names: tuple[str, ...]
    classes: int
    sizes: tuple[int, int]  # images in the whole training and test split


@dataclass(kw_only=True)
class ImageData(ImageSet):
    """An image set: which of its images are trained on, and which are evaluated.

    train_size, test_size: number of images, balanced over the classes, the same ones for every seed; null: all.
    validation_size: this many training images, balanced, the same ones for every seed, are held out and evaluated instead of
        the test images: for choices that the test images must not decide. null: none.

    Subclasses provide the attributes of ``ImageSet``, except ``classes``, and ``read``; and ``digest`` where the content can
    change.
    """

    train_size: Positive | None = None
    test_size: Positive | None = None
    validation_size: Positive | None = None

    def __post_init__(self) -> None:
        self.classes = len(self.class_names)
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
    def eval_split(self) -> Literal["test", "validation"]:
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

    def read(self) -> tuple[LabeledImages, LabeledImages | None]:
        """Images and labels (count,) of the whole training and of the whole test split; None where the set has none to test.

        Raises DataError where the files are missing or not what they should be.
        """
        raise NotImplementedError

    def load(self, device: torch.device) -> tuple[Split, Split]:
        """Read what trains and what is tested, and move it to the device. Raises DataError."""
        train, test = self.read()
        for labeled, name in ((train, "training"), (test, "test")):
            if labeled and set(np.unique(labeled[1])) != set(range(self.classes)):
                raise DataError(f"the {name} labels are not 0 to {self.classes - 1}: the files are not this image set's")
        training = np.arange(len(train[1]))
        if self.validation_size:
            test, tested = train, self.held_out(train)
            training = np.delete(training, tested)
        else:
            assert test is not None  # else refused by the constructor of a set that may lack them
            tested = np.arange(len(test[1]))
        train_split = to_device(train, subset_indices(train, training, self.train_size), device, self.classes)
        return train_split, to_device(test, subset_indices(test, tested, self.test_size), device, self.classes)

    def held_out(self, train: LabeledImages) -> np.ndarray:
        """Positions of the validation images. Raises DataError where a class would have none left to train on."""
        assert self.validation_size
        positions = subset_indices(train, np.arange(len(train[1])), self.validation_size)
        left = np.bincount(np.delete(train[1], positions), minlength=self.classes)
        if not left.all():
            name = self.class_names[int(left.argmin())]
            images = int((train[1] == left.argmin()).sum())
            raise DataError(
                f"data.validation_size={self.validation_size}: takes all {images} training images of class {name}; "
                "take fewer, or give that class more images"
            )
        return positions


def subset_indices(labeled: LabeledImages, positions: np.ndarray, size: int | None) -> np.ndarray:
    """``size`` of the positions, balanced over the classes; None takes all. Raises DataError where there are not so many."""
    if size is None:
        return positions
    if size > len(positions):  # else refused by the constructor, but for sets whose sizes only their files tell
        raise DataError(f"the image set holds {len(positions)} images of a split from which {size} are to be taken")
    return positions[balanced_subset(labeled[1][positions], size)]


def to_device(labeled: LabeledImages, positions: np.ndarray, device: torch.device, classes: int) -> Split:
    """The images at these positions, with their labels, on the device."""
    images, labels = labeled
    images_BCYX = torch.from_numpy(np.ascontiguousarray(images[positions].transpose(0, 3, 1, 2)))
    return Split(images_BCYX.to(device), torch.from_numpy(labels[positions].astype(np.int64)).to(device), classes)


def balanced_subset(labels: np.ndarray, size: int) -> np.ndarray:
    """Positions, in order, of ``size`` items with as equal a number of every class as there are items for.

    Drawn with a fixed seed of its own: runs with different seeds train on the same subset, so they compare.
    """
    random = np.random.default_rng(0)
    by_class = [random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    # The first item of every class, then the second of every class, … until there are enough.
    rounds = sorted((i, c, item) for c, items in enumerate(by_class) for i, item in enumerate(items))
    return np.sort([item for _, _, item in rounds[:size]])
