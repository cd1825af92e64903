"""Base class of image sets: their shape, and the training, test and validation splits."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from vix.data.loader import Split
from vix.errors import ConfigError, DataError
from vix.types import Positive


class Images(Protocol):
    """Images that are indexed by positions (count,): returns those images (count, Y, X, C) as uint8.

    An implementation may read them from files only when they are indexed.
    """

    def __getitem__(self, positions: np.ndarray, /) -> np.ndarray: ...


LabeledImages = tuple[Images, np.ndarray]


class ImageSet:
    """The shape of an image set, which is known without reading the images.

    image_size: side of the square images, in pixels.
    channels: number C of channels.
    class_names: names of the classes, in the order of the labels.
    classes: number K of classes.
    sizes: numbers of images in the whole training split and the whole test split.
    """

    image_size: int
    channels: int
    class_names: tuple[str, ...]
    classes: int
    sizes: tuple[int, int]


@dataclass(kw_only=True)
class ImageData(ImageSet):
    """Base class of image sets, with the options for subsets. Subsets are class-balanced and the same for every seed.

    Subclasses provide ``read`` and the attributes of ``ImageSet`` except ``classes``; also ``digest``, where the content can
    change.

    train_size: number of training images; null: all.
    test_size: number of evaluated images; null: all.
    validation_size: number of training images that are held out and evaluated instead of the test images, for example in a
        hyperparameter search; null: the test images are evaluated.

    Raises ConfigError where a size is out of range.
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
                raise ConfigError(f"data.{name}={size}: must be from {self.classes} (one image per class) to {available}")

    @property
    def train_images(self) -> int:
        """Number of training images."""
        return self.train_size or self.sizes[0] - (self.validation_size or 0)

    @property
    def eval_split(self) -> Literal["test", "validation"]:
        """Name of the split that is evaluated."""
        return "validation" if self.validation_size else "test"

    @property
    def digest(self) -> str:
        """Digest of the images, independent of their location; empty for image sets whose content never changes."""
        return ""

    @property
    def image_set(self) -> str:
        """Description of the images, which is part of a run's identity.

        The image set's name, followed by the digest and the numbers of images where the content can change.
        """
        return type(self).__name__.lower()

    def read(self) -> tuple[LabeledImages, LabeledImages | None]:
        """Images and labels (count,) of the whole training split and the whole test split; None if there is no test split.

        Raises DataError where the files are missing or invalid.
        """
        raise NotImplementedError

    def load(self, device: torch.device) -> tuple[Split, Split]:
        """Read the training images and the evaluated images, and copy both to the device.

        Raises DataError where the files are missing or invalid.
        """
        train, evaluated = self.read_subsets()
        return to_device(*train, device, self.classes), to_device(*evaluated, device, self.classes)

    def load_evaluated(self, device: torch.device) -> Split:
        """Read the evaluated images alone, and copy them to the device. Raises DataError as ``load``."""
        return to_device(*self.read_subsets()[1], device, self.classes)

    def read_subsets(self) -> tuple[tuple[LabeledImages, np.ndarray], tuple[LabeledImages, np.ndarray]]:
        """For the training and for the evaluated images: the split that contains them, and their positions in it (count,)."""
        train, test = self.read()
        for labeled, name in ((train, "training"), (test, "test")):
            if labeled and set(np.unique(labeled[1])) != set(range(self.classes)):
                raise DataError(f"the {name} labels are not 0 to {self.classes - 1}: the files are not those of this image set")
        training = np.arange(len(train[1]))
        if self.validation_size:
            test, evaluated = train, self.held_out(train)
            training = np.delete(training, evaluated)
        else:
            assert test is not None  # the constructor of an image set without a test split requires validation_size
            evaluated = np.arange(len(test[1]))
        return (
            (train, subset_indices(train, training, self.train_size)),
            (test, subset_indices(test, evaluated, self.test_size)),
        )

    def held_out(self, train: LabeledImages) -> np.ndarray:
        """Positions of the validation images in the training split.

        Raises DataError where no training image of a class would remain.
        """
        assert self.validation_size
        positions = subset_indices(train, np.arange(len(train[1])), self.validation_size)
        left = np.bincount(np.delete(train[1], positions), minlength=self.classes)
        if not left.all():
            name = self.class_names[int(left.argmin())]
            images = int((train[1] == left.argmin()).sum())
            raise DataError(
                f"data.validation_size={self.validation_size}: takes all {images} training images of class {name}; "
                "use a smaller number, or add images to that class"
            )
        return positions


def subset_indices(labeled: LabeledImages, positions: np.ndarray, size: int | None) -> np.ndarray:
    """Choose ``size`` of the positions, balanced over the classes; None chooses all.

    labeled: images and labels of a split.
    positions: positions (count,) to choose from.
    size: number of positions, or None.

    Raises DataError where there are fewer positions than ``size``.
    """
    if size is None:
        return positions
    if size > len(positions):  # the constructor checks it only for image sets whose sizes it knows
        raise DataError(f"the image set has {len(positions)} images in a split of which {size} are requested; request fewer")
    return positions[balanced_subset(labeled[1][positions], size)]


def to_device(labeled: LabeledImages, positions: np.ndarray, device: torch.device, classes: int) -> Split:
    """Copy the images at these positions, and their labels, to the device.

    labeled: images and labels of a split.
    positions: positions (count,) of the images.
    device: where the split is kept.
    classes: number K of classes.
    """
    images, labels = labeled
    images_BCYX = torch.from_numpy(np.ascontiguousarray(images[positions].transpose(0, 3, 1, 2)))
    return Split(images_BCYX.to(device), torch.from_numpy(labels[positions].astype(np.int64)).to(device), classes)


def balanced_subset(labels: np.ndarray, size: int) -> np.ndarray:
    """Sorted positions of a random subset in which the classes are as balanced as possible.

    It is drawn with a fixed seed, so that runs with different seeds use the same subset and are comparable.

    labels: labels (count,).
    size: number of positions to draw.
    """
    random = np.random.default_rng(0)
    by_class = [random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    # Take the first item of every class, then the second of every class, and so on.
    rounds = sorted((i, c, item) for c, items in enumerate(by_class) for i, item in enumerate(items))
    return np.sort([item for _, _, item in rounds[:size]])
