"""Images and labels as arrays in one .npz file of NumPy."""

import functools
import hashlib
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from vix.data.dataset import ImageData, LabeledImages
from vix.errors import ConfigError, DataError, UserError
from vix.types import Positive

READ_ERRORS = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)


class Header(NamedTuple):
    """Shape and dtype of an array in the file."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(kw_only=True)
class Arrays(ImageData):
    """Images of one size in an .npz file: arrays ``images`` and ``labels`` of the training split, ``test_images`` and
    ``test_labels`` of the test split, and ``class_names``.

    Images are uint8 (count, Y, X, C), or (count, Y, X) where they are gray; labels are integers from 0. Without a test split,
    ``validation_size`` or ``folds`` is required. Without ``class_names`` the classes are numbered.

    root: path of the file.
    image_size, channels: side in pixels and channels of the images, which are compared with the file.
    classes: number of classes; None: as in the file. Only needed to build the model without the images.

    Raises ConfigError where the options do not match the file, and DataError where it is missing or invalid.
    """

    root: str = "data/images.npz"
    image_size: Positive = 32
    channels: Literal[1, 3] = 3
    classes: Positive | None = None  # type: ignore[assignment]  # an int after construction

    def __post_init__(self) -> None:
        if self.classes is None:
            self.class_names, self.sizes = self.names_and_sizes()
        else:
            self.class_names = tuple(map(str, range(self.classes)))  # placeholders until the file is read
            self.sizes = sys.maxsize, sys.maxsize
        super().__post_init__()

    @property
    def train_images(self) -> int:
        self.list_unknown_sizes()
        return super().train_images

    @property
    def eval_images(self) -> int:
        self.list_unknown_sizes()
        return super().eval_images

    def list_unknown_sizes(self) -> None:
        """Read the sizes where ``data.classes`` made that unnecessary so far."""
        if self.sizes[0] == sys.maxsize:
            self.sizes = self.names_and_sizes()[1]
            self.check_sizes()

    @functools.cached_property
    def digest(self) -> str:
        """Digest of names, sizes and checksums of the arrays, which the file contains."""
        try:
            with zipfile.ZipFile(self.root) as file:
                members = sorted((entry.filename, entry.file_size, entry.CRC) for entry in file.infolist())
        except READ_ERRORS as error:
            raise self.invalid(error) from error
        return hashlib.blake2b(repr(members).encode(), digest_size=6).hexdigest()

    @functools.cached_property
    def image_set(self) -> str:
        names, (train, test) = self.names_and_sizes()
        return f"{super().image_set} ({len(names)} classes, {train:,} training and {test:,} test images)"

    def names_and_sizes(self) -> tuple[tuple[str, ...], tuple[int, int]]:
        """Names of the classes and numbers of images. Reads the labels, but no images."""
        headers = self.headers()
        for name in ("images", "labels"):
            if name not in headers:
                raise DataError(
                    f"{self.root}: contains no array {name!r}, only {', '.join(headers) or 'none'}; add it (docs/data.md)"
                )
        has_test = "test_images" in headers
        if has_test != ("test_labels" in headers):
            raise DataError(f"{self.root}: contains one of test_images and test_labels; add the other")
        if not has_test and not (self.validation_size or self.folds):
            raise ConfigError(
                f"data.root={self.root}: contains no test_images; add them, or hold out N training images for evaluation with "
                "data.validation_size=N or data.folds=N"
            )
        for split in ("", "test_") if has_test else ("",):
            self.check_headers(split, headers)
        labels = self.array("labels")
        classes = int(labels.max()) + 1
        if labels.min() < 0 or classes > len(labels):
            raise DataError(
                f"{self.root}: the labels of {len(labels)} images are {labels.min()} to {classes - 1}; number them from 0"
            )
        names = self.names(headers["class_names"]) if "class_names" in headers else tuple(map(str, range(classes)))
        if len(names) < classes:
            raise DataError(
                f"{self.root}: the labels are {labels.min()} to {classes - 1}, but there are {len(names)} class names"
            )
        return names, (len(labels), headers["test_images"].shape[0] if has_test else 0)

    def names(self, header: Header) -> tuple[str, ...]:
        """The array of class names. Raises DataError where they are no list of different texts."""
        if len(header.shape) != 1 or header.dtype.kind != "U":
            raise DataError(
                f"{self.root}: class_names is {header.dtype} {header.shape}, but must be a list of texts, one for each label"
            )
        names = tuple(map(str, self.array("class_names")))
        if repeated := [name for name, number in Counter(names).items() if number > 1]:
            raise DataError(
                f"{self.root}: class_names contains {', '.join(map(repr, repeated))} more than once; rename the classes"
            )
        return names

    def check_headers(self, split: str, headers: dict[str, Header]) -> None:
        """Raises DataError or ConfigError where the images or labels of a split have another shape or dtype."""
        images, labels = headers[f"{split}images"], headers[f"{split}labels"]
        count, *shape = images.shape or (0,)
        if not count:
            raise DataError(f"{self.root}: {split}images contains no images; add some" + (", or leave it out" if split else ""))
        if (
            images.dtype != np.uint8
            or len(shape) not in (2, 3)
            or shape[0] != shape[1]
            or (len(shape) == 3 and shape[2] not in (1, 3))
        ):
            raise DataError(
                f"{self.root}: {split}images is {images.dtype} {images.shape}, but must be uint8 (count, side, side, 3 or 1) "
                "or (count, side, side); convert it"
            )
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise DataError(
                f"{self.root}: {split}labels is {labels.dtype} {labels.shape}, but must be {count} integers; convert it"
            )
        channels = shape[2] if len(shape) == 3 else 1
        for key, given, found in (("image_size", self.image_size, shape[0]), ("channels", self.channels, channels)):
            if given != found:
                raise ConfigError(f"data.{key}={given}: {split}images of {self.root} have {found}; use data.{key}={found}")

    def headers(self) -> dict[str, Header]:
        """Shapes and dtypes of all arrays, from their first bytes."""
        headers = {}
        try:
            with zipfile.ZipFile(self.root) as file:
                for entry in file.infolist():
                    with file.open(entry) as array:
                        version = np.lib.format.read_magic(array)
                        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                        shape, _, dtype = read(array)
                        headers[entry.filename.removesuffix(".npy")] = Header(shape, dtype)
        except READ_ERRORS as error:
            raise self.invalid(error) from error
        return headers

    def array(self, name: str) -> np.ndarray:
        """An array of the file; code in it is never run."""
        try:
            with np.load(self.root, allow_pickle=False) as file:
                return np.asarray(file[name])
        except READ_ERRORS as error:
            raise self.invalid(error) from error

    def invalid(self, error: Exception) -> UserError:
        """The error for a file that cannot be read."""
        if isinstance(error, FileNotFoundError):
            return ConfigError(f"data.root={self.root}: no such file; set the path of an .npz file with data.root=FILE")
        reason = " ".join(str(error).split()) or type(error).__name__
        return DataError(f"{self.root}: is not a readable .npz file ({reason}); write it with numpy.savez")

    def read(self) -> tuple[LabeledImages, LabeledImages | None]:
        names, (_, test) = self.names_and_sizes()
        if len(names) != self.classes:
            raise DataError(f"data.classes={self.classes}: {self.root} has {len(names)} classes")
        self.class_names = names
        return self.labeled(""), self.labeled("test_") if test else None

    def labeled(self, split: str) -> LabeledImages:
        """Images (count, Y, X, C) and labels of a split."""
        images = self.array(f"{split}images")
        return images.reshape(*images.shape[:3], self.channels), self.array(f"{split}labels").astype(np.int64)
