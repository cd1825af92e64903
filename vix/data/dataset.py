"""Base class of image sets: their shape, and the training, test and validation splits."""

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vix.data.loader import Split
from vix.errors import ConfigError, DataError
from vix.types import LARGEST, NotNegative, NotNegativeFloat, Positive


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
    """Base class of image sets, with the options for subsets and folds. Both are class-balanced and the same for every seed.

    Subclasses provide ``read`` and the attributes of ``ImageSet`` except ``classes``; also ``digest``, where the content can
    change, as with an option ``root``: the path itself does not identify a run.

    train_size: number of training images; null: all.
    test_size: number of evaluated images; null: all.
    validation_size: number of training images that are held out and evaluated instead of the test images, for example in a
        hyperparameter search; null: the test images are evaluated.
    folds, fold: divide the training images into ``folds`` parts for cross-validation, and hold out and evaluate part ``fold``,
        from 0, instead of the test images; null: off.
    class_weights: weight of each class in the training loss; balanced: number of images / (classes · images of the class);
        null: all 1.

    Raises ConfigError where a size is out of range, and where options contradict each other.
    """

    train_size: Positive | None = None
    test_size: Positive | None = None
    validation_size: Positive | None = None
    folds: Annotated[int, Field(ge=2, le=LARGEST)] | None = None
    fold: NotNegative | None = None
    class_weights: Literal["balanced"] | list[NotNegativeFloat] | None = None

    def __post_init__(self) -> None:
        self.classes = len(self.class_names)
        if isinstance(self.class_weights, list) and len(self.class_weights) != self.classes:
            raise ConfigError(f"data.class_weights: has {len(self.class_weights)} values, but there are {self.classes} classes")
        self.check_sizes()

    def check_sizes(self) -> None:
        """Raises ConfigError where the options for folds and subsets do not fit the numbers of images."""
        self.check_folds()
        (train, test), held_out = self.sizes, self.held_out_size
        for name, size, available in (
            ("validation_size", self.validation_size, train - self.classes),
            ("train_size", self.train_size, train - held_out),
            ("test_size", self.test_size, held_out or test),
        ):
            if size is not None and not self.classes <= size <= available:
                raise ConfigError(f"data.{name}={size}: must be from {self.classes} (one image per class) to {available}")

    def check_folds(self) -> None:
        """Raises ConfigError where the options for folds contradict one another or other options."""
        choose = f"choose with data.fold=0 to {(self.folds or 2) - 1}; all of them in a sweep (-m)"
        if self.folds is None:
            if self.fold is not None:
                raise ConfigError(f"data.fold={self.fold}: needs data.folds, the number of folds; or use data.fold=null")
        elif self.fold is None:
            raise ConfigError(f"data.folds={self.folds}: the evaluated fold is not chosen; {choose}")
        elif self.fold >= self.folds:
            raise ConfigError(f"data.fold={self.fold}: there are data.folds={self.folds} folds; {choose}")
        elif self.validation_size:
            raise ConfigError(f"data.validation_size={self.validation_size}: a fold is evaluated (data.folds); use null")
        elif self.folds > self.sizes[0]:
            raise ConfigError(f"data.folds={self.folds}: there are only {self.sizes[0]} training images")

    @property
    def holds_out(self) -> bool:
        """Whether training images are evaluated instead of the test images."""
        return self.folds is not None or bool(self.validation_size)

    @property
    def held_out_size(self) -> int:
        """Number of training images that are evaluated instead of the test images; 0 where the test images are evaluated."""
        if self.folds is not None and self.fold is not None:
            return len(range(self.fold, self.sizes[0], self.folds))
        return self.validation_size or 0

    @property
    def train_images(self) -> int:
        """Number of training images."""
        return self.train_size or self.sizes[0] - self.held_out_size

    @property
    def eval_images(self) -> int:
        """Number of evaluated images."""
        return self.test_size or self.held_out_size or self.sizes[1]

    @property
    def eval_split(self) -> Literal["test", "validation"]:
        """Name of the split that is evaluated."""
        return "validation" if self.holds_out else "test"

    def loss_weights(self, labels: Tensor) -> Tensor | None:
        """The weight of each class in the training loss, (K,) float32 on the labels' device; None where all are 1.

        labels: labels (count,) of the training images.
        """
        if self.class_weights is None:
            return None
        if self.class_weights == "balanced":
            counts = torch.bincount(labels, minlength=self.classes)
            return len(labels) / (self.classes * counts.float())
        return torch.tensor(self.class_weights, dtype=torch.float32, device=labels.device)

    @property
    def digest(self) -> str:
        """Digest of the images, independent of their location; empty for image sets whose content never changes."""
        return ""

    @property
    def image_set(self) -> str:
        """Description of the images, which is part of a run's identity.

        The image set's name, followed by the digest and the numbers of images where the content can change.
        """
        return f"{type(self).__name__.lower()} {self.digest}".rstrip()

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
        return to_device(*train, device, self), to_device(*evaluated, device, self)

    def load_evaluated(self, device: torch.device) -> Split:
        """Read the evaluated images alone, and copy them to the device. Raises DataError as ``load``."""
        return to_device(*self.read_subsets()[1], device, self)

    def read_subsets(self) -> tuple[tuple[LabeledImages, np.ndarray], tuple[LabeledImages, np.ndarray]]:
        """For the training and for the evaluated images: the split that contains them, and their positions in it (count,)."""
        train, test = self.read()
        for labeled, name in ((train, "training"), (None if self.holds_out else test, "test")):
            if labeled and (wrong := {*map(int, np.unique(labeled[1]))} ^ {*range(self.classes)}):
                shown = ", ".join(map(str, sorted(wrong)[:5]))
                where = f"{root}: " if (root := getattr(self, "root", None)) else ""
                raise DataError(
                    f"{where}the {name} labels are not 0 to {self.classes - 1}, each with images (wrong: {shown}): the files "
                    "are not those of this image set, or classes are missing"
                )
        training = np.arange(len(train[1]))
        if self.holds_out:
            test, evaluated = train, self.held_out(train)
            training = np.delete(training, evaluated)
        else:
            assert test is not None  # the constructor of an image set without a test split requires held-out images
            evaluated = np.arange(len(test[1]))
        return (
            (train, subset_indices(train, training, self.train_size)),
            (test, subset_indices(test, evaluated, self.test_size)),
        )

    def held_out(self, train: LabeledImages) -> np.ndarray:
        """Positions of the held-out images in the training split.

        Raises DataError where no training image of a class would remain.
        """
        if self.folds is not None and self.fold is not None:
            positions = fold_indices(train[1], self.folds, self.fold)
            if not len(positions):
                raise DataError(f"data.folds={self.folds}: there are only {len(train[1])} training images")
        else:
            positions = subset_indices(train, np.arange(len(train[1])), self.validation_size)
        left = np.bincount(np.delete(train[1], positions), minlength=self.classes)
        if not left.all():
            name = self.class_names[int(left.argmin())]
            images = int((train[1] == left.argmin()).sum())
            option = f"data.folds={self.folds}" if self.folds else f"data.validation_size={self.validation_size}"
            raise DataError(
                f"{option}: takes all {images} training images of class {name}; use a {'larger' if self.folds else 'smaller'} "
                "number, or add images to that class"
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


def to_device(labeled: LabeledImages, positions: np.ndarray, device: torch.device, image_set: ImageSet) -> Split:
    """Copy the images at these positions, and their labels, to the device.

    labeled: images and labels of a split.
    positions: positions (count,) of the images.
    device: where the split is kept.
    image_set: their shape.

    Raises DataError where the images of a user's own image set are not uint8, or of another shape.
    """
    images, labels = labeled
    chosen = np.asarray(images[positions])
    expected = (len(positions), image_set.image_size, image_set.image_size, image_set.channels)
    if chosen.dtype != np.uint8 or chosen.shape != expected:
        raise DataError(
            f"{type(image_set).__name__}.read returned images of type {chosen.dtype} and shape {chosen.shape}; they must be "
            f"uint8, from 0 to 255, of shape {expected}"
        )
    images_BCYX = torch.from_numpy(np.ascontiguousarray(chosen.transpose(0, 3, 1, 2)))
    return Split(images_BCYX.to(device), torch.from_numpy(labels[positions].astype(np.int64)).to(device), image_set.classes)


def fold_indices(labels: np.ndarray, folds: int, fold: int) -> np.ndarray:
    """Sorted positions of one of ``folds`` disjoint parts, each of which has as many images of every class as possible.

    The parts are drawn with a fixed seed, as in :func:`balanced_subset`.

    labels: labels (count,).   folds, fold: number of parts, and the chosen one, from 0.
    """
    random = np.random.default_rng(0)
    in_order = np.concatenate([random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)])
    return np.sort(in_order[fold::folds])


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
