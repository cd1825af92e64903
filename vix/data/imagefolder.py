"""A user's own images, a folder for each class (torchvision's ImageFolder layout), and Tiny ImageNet as it is distributed."""

import functools
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vix.checks import ConfigError, DataError, Positive
from vix.data.dataset import ImageData, Labelled
from vix.data.identity import files_digest

Sample = tuple[str, int]  # the path of an image and its class
MODES = {1: "L", 3: "RGB"}
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ImageFolder(ImageData):
    """Images of any size in ``root/train/<class>/`` and in ``root/val/<class>/`` or ``root/test/<class>/``.

    The test split is ``val`` where there is one, else ``test`` (Tiny ImageNet's and ImageNet's ``test`` have no labels).
    Folders below that of a class belong to it. A ``val`` with a flat ``images/`` folder and a ``val_annotations.txt``, which is
    Tiny ImageNet's, is read by that file.

    All images are held in memory as uint8: count · channels · image_size² bytes (1.35 GB for Tiny ImageNet).

    root: the folder that holds ``train``.
    image_size: side of the square that the middle of each image is cut and resized to, in pixels.
    channels: 3, or 1 to make the images grey.
    classes: None counts the folders of ``root/train``; a number builds the model where the images are not, and is compared
        with the folders when they are read.

    Raises ConfigError where ``root`` has no such folders, and DataError where they hold no images or not the same classes.
    """

    root: str = "data"
    image_size: Positive = 64
    channels: Literal[1, 3] = 3
    classes: Positive | None = None  # type: ignore[assignment]  # a number once it is made

    def __post_init__(self) -> None:
        if self.classes is None:
            self.class_names, train, test = self.list_files()
            self.sizes = len(train), len(test)
        else:
            self.class_names = tuple(map(str, range(self.classes)))  # their names come with the files
            self.sizes = sys.maxsize, sys.maxsize
        super().__post_init__()

    @functools.cached_property
    def digest(self) -> str:
        names, train, test = self.list_files()
        splits = {"train": train, "test": test}
        return files_digest(self.root, {split: [(path, names[k]) for path, k in files] for split, files in splits.items()})

    @functools.cached_property
    def image_set(self) -> str:
        names, train, test = self.list_files()
        counts = f"{len(names)} classes, {len(train):,} training and {len(test):,} test images"
        return f"{super().image_set} {self.digest} ({counts})"

    def read(self) -> tuple[Labelled, Labelled]:
        names, train, test = self.list_files()
        if len(names) != self.classes:
            raise DataError(f"data.classes={self.classes}: {self.root}/train has {len(names)} class folders")
        self.class_names = names
        return self.files(train), self.files(test)

    def files(self, samples: list[Sample]) -> Labelled:
        """A split, whose files are read when they are picked."""
        paths = [path for path, _ in samples]
        return Files(paths, self.image_size, self.channels), np.array([label for _, label in samples])

    def list_files(self) -> tuple[tuple[str, ...], list[Sample], list[Sample]]:
        """Names of the classes, in order, and all images of the training and of the test split."""
        train = Path(self.root, "train")
        test = next((folder for name in ("val", "test") if (folder := Path(self.root, name)).is_dir()), None)
        if not train.is_dir() or test is None:
            absent = f"{self.root}/val or {self.root}/test" if train.is_dir() else train
            raise ConfigError(
                f"data.root={self.root}: there is no {absent}; the images of each class belong in {self.root}/train/CLASS/ "
                f"and {self.root}/val/CLASS/ (or test/); name the folder that holds them with data.root=DIR or VIX_DATA=DIR"
            )
        by_class, test_by_class = in_folders(train), tiny_imagenet_val(test) or in_folders(test)
        for a, b, here, there in ((by_class, test_by_class, train, test), (test_by_class, by_class, test, train)):
            if only := sorted(set(a) - set(b)):
                names = ", ".join(only[:5]) + (f" and {len(only) - 5} more" if len(only) > 5 else "")
                raise DataError(f"{here} and {there} differ in their classes: only {here} has {names}")
        classes = sorted(by_class)
        train_files, test_files = (
            [(path, label) for label, name in enumerate(classes) for path in split[name]] for split in (by_class, test_by_class)
        )
        return tuple(classes), train_files, test_files


@dataclass
class Files:
    """Image files that are read when they are picked, as (count, size, size, channels) of uint8."""

    paths: list[str]
    size: int
    channels: int

    def __getitem__(self, positions: np.ndarray, /) -> np.ndarray:
        log.info("Reading %s images", f"{len(positions):,}")
        images = np.empty((len(positions), self.size, self.size, self.channels), dtype=np.uint8)

        def put(i: int) -> None:
            images[i] = read_image(self.paths[positions[i]], self.size, self.channels)

        with ThreadPoolExecutor() as threads:  # Pillow decodes without holding the interpreter's lock
            for _ in threads.map(put, range(len(positions))):
                pass
        return images


def in_folders(folder: Path) -> dict[str, list[str]]:
    """Paths of the images of each class, which is a folder in ``folder``. Raises DataError where a class has none."""
    from torchvision import datasets  # takes seconds, and only this needs it

    try:
        found = datasets.ImageFolder(str(folder))
    except OSError as error:
        raise DataError(f"{folder}: {' '.join(str(error).split())}") from error
    paths: dict[str, list[str]] = {name: [] for name in found.classes}
    for path, label in found.samples:
        paths[found.classes[label]].append(path)
    return paths


def tiny_imagenet_val(folder: Path) -> dict[str, list[str]]:
    """Paths of the images of each class by Tiny ImageNet's ``val_annotations.txt``; nothing where the layout is another."""
    annotations, images = folder / "val_annotations.txt", folder / "images"
    if not (annotations.is_file() and images.is_dir()):
        return {}
    paths: dict[str, list[str]] = {}
    for number, line in enumerate(annotations.read_text(errors="replace").splitlines(), start=1):
        name, _, rest = line.partition("\t")
        if not rest:
            raise DataError(f"{annotations}: line {number} is not a file's name, a tab, and its class")
        paths.setdefault(rest.split("\t")[0], []).append(str(images / name))
    return paths


def read_image(path: str, size: int, channels: int) -> np.ndarray:
    """The middle square of an image, resized: (size, size, channels) as uint8. Raises DataError, which names the file."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError("more than 8 bits a pixel, which would be cut off; convert it")
            # Cameras turn pictures by a note in the file.
            upright = ImageOps.exif_transpose(image).convert(MODES[channels])
            square = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # a damaged file raises almost anything
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read as an image ({reason}); replace it or take it out") from error
    return np.asarray(square).reshape(size, size, channels)
