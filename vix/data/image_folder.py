"""Images in one folder per class (the layout of torchvision's ImageFolder), and Tiny ImageNet as distributed."""

import functools
import logging
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from vix.data.dataset import ImageData, LabeledImages
from vix.data.digest import files_digest
from vix.errors import ConfigError, DataError
from vix.system.files import is_directory, walk
from vix.types import Positive

Sample = tuple[str, int]  # the path of an image and its class
MODES = {1: "L", 3: "RGB"}
# Files and folders that file managers, notebooks, archives and file servers create, in addition to hidden ones (.DS_Store).
SYSTEM_ENTRIES = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "__pycache__", "@eadir", "#recycle", "@recycle"),
    *("$recycle.bin", "system volume information", "lost+found"),
}
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ImageFolder(ImageData):
    """Images of any size in one folder per class.

    Layouts: ``root/train/<class>/`` with ``root/val/<class>/`` or ``root/test/<class>/``; or without a test split,
    ``root/train/<class>/`` or ``root/<class>/``, which requires ``validation_size`` or ``folds``.

    The test split is ``val`` if it exists, else ``test``, because ImageNet's and Tiny ImageNet's ``test`` have no labels.
    Subfolders of a class folder belong to the class. Images are recognized by the file name extensions that Pillow reads.
    Hidden and system entries are skipped, and all skipped files are logged. Tiny ImageNet's ``val``, a flat ``images/`` folder
    with a ``val_annotations.txt``, is also supported.

    All images are kept in memory as uint8: count · channels · image_size² bytes (1.35 GB for Tiny ImageNet).

    root: folder that contains ``train`` or the class folders.
    image_size: side of the square to which each image is center-cropped and resized, in pixels.
    channels: 3, or 1 to convert the images to grayscale.
    classes: number of classes; None: the number of class folders. Only needed to build the model without the images; it is
        compared with the folders when the images are read.

    Raises ConfigError where ``root`` has another layout, and DataError where a class has no images or the splits
    differ in their classes.
    """

    root: str = "data"
    image_size: Positive = 64
    channels: Literal[1, 3] = 3
    classes: Positive | None = None  # type: ignore[assignment]  # an int after construction

    def __post_init__(self) -> None:
        if self.classes is None:
            self.class_names, train, test, _ = self.list_files()
            self.sizes = len(train), len(test or ())
        else:
            self.class_names = tuple(map(str, range(self.classes)))  # placeholders until the folders are listed
            self.sizes = sys.maxsize, sys.maxsize
        super().__post_init__()

    @property
    def train_images(self) -> int:
        if self.train_size is None:
            self.list_unknown_sizes()
        return super().train_images

    @property
    def eval_images(self) -> int:
        if self.test_size is None:
            self.list_unknown_sizes()
        return super().eval_images

    def list_unknown_sizes(self) -> None:
        """List the files where ``data.classes`` made that unnecessary so far."""
        if self.sizes[0] == sys.maxsize:
            _, train, test, _ = self.list_files()
            self.sizes = len(train), len(test or ())
            self.check_sizes()

    @functools.cached_property
    def digest(self) -> str:
        names, train, test, _ = self.list_files()
        splits = {"train": train, "test": test or []}
        return files_digest(self.root, {split: [(path, names[k]) for path, k in files] for split, files in splits.items()})

    @functools.cached_property
    def image_set(self) -> str:
        names, train, test, _ = self.list_files()
        counts = f"{len(names)} classes, {len(train):,} training and {len(test or ()):,} test images"
        return f"{super().image_set} ({counts})"

    def read(self) -> tuple[LabeledImages, LabeledImages | None]:
        names, train, test, listing = self.list_files()
        if len(names) != self.classes:
            raise DataError(f"data.classes={self.classes}: {listing.folders[0]} has {len(names)} class folders")
        self.class_names = names
        listing.log_left_out()
        return self.files(train), None if test is None else self.files(test)

    def files(self, samples: list[Sample]) -> LabeledImages:
        """Images and labels of a split; the files are read when the images are indexed."""
        paths = [path for path, _ in samples]
        return Files(paths, self.image_size, self.channels), np.array([label for _, label in samples])

    def list_files(self) -> tuple[tuple[str, ...], list[Sample], list[Sample] | None, "Listing"]:
        """List the image files.

        Returns the sorted names of the classes, the samples of the training split and of the test split (None if absent), and
        the listing with the skipped files.
        """
        train, test = self.split_folders()
        listing = Listing()
        by_class = listing.in_folders(train)
        splits = [by_class]
        if test is not None:
            test_by_class = tiny_imagenet_val(test) or listing.in_folders(test)
            splits.append(test_by_class)
            for a, b, here, there in ((by_class, test_by_class, train, test), (test_by_class, by_class, test, train)):
                if only := sorted(set(a) - set(b)):
                    names = ", ".join(only[:5]) + (f" and {len(only) - 5} more" if len(only) > 5 else "")
                    raise DataError(
                        f"{here} and {there} differ in their classes: only {here} has {names}; rename or remove its folders"
                    )
        classes = sorted(by_class)
        train_files, *test_files = (
            [(path, label) for label, name in enumerate(classes) for path in split[name]] for split in splits
        )
        return tuple(classes), train_files, test_files[0] if test_files else None, listing

    def split_folders(self) -> tuple[Path, Path | None]:
        """The folders of the training split and of the test split (None if absent).

        Raises ConfigError where the layout of ``root`` is not supported.
        """
        root, train = Path(self.root), Path(self.root, "train")
        # A split contains class folders. A class folder may also be named train, val or test, but contains images.
        test = next((folder for name in ("val", "test") if has_folders(folder := root / name)), None)
        if has_folders(train):
            absent = f"{root.absolute()}/val or {root.absolute()}/test"
        else:
            absent, train = str(train.absolute()), root
        works = (test is None and has_folders(root)) if train == root else True
        if works and (test is not None or self.validation_size or self.folds):
            return train, test
        raise ConfigError(
            f"data.root={root}: there is no {absent}; put the images of each class in {root}/train/CLASS/ and "
            f"{root}/val/CLASS/ (or test/), or all in {root}/train/CLASS/ or {root}/CLASS/ with data.validation_size=N, which "
            "holds out N of them for evaluation, or data.folds=N; set the folder that contains them with data.root=DIR or "
            "VIX_DATA=DIR; data.classes=N builds the model alone, without images"
        )


@dataclass(kw_only=True)
class EvaluatedFolder(ImageFolder):
    """Images that are only evaluated: an :class:`ImageFolder` that may lack training images.

    The images of ``root/val/<class>/``, ``root/test/<class>/`` or ``root/<class>/`` then are both splits.
    """

    @functools.cached_property
    def image_set(self) -> str:
        names, _, test, _ = self.list_files()
        return f"imagefolder {self.digest} ({len(names)} classes, {len(test or ()):,} images)"

    def split_folders(self) -> tuple[Path, Path | None]:
        try:
            return super().split_folders()
        except ConfigError:
            root = Path(self.root)
            folder = next((folder for folder in (root / "val", root / "test", root) if has_folders(folder)), None)
            if folder is None:
                raise
            return folder, folder


@dataclass
class Files:
    """Image files that are read when they are indexed, as uint8 (count, size, size, channels).

    paths: paths of the files.
    size: side of the square that the images are resized to, in pixels.
    channels: 3, or 1 for grayscale.
    """

    paths: list[str]
    size: int
    channels: int

    def __getitem__(self, positions: np.ndarray, /) -> np.ndarray:
        log.info("Reading %s images", f"{len(positions):,}")
        images = np.empty((len(positions), self.size, self.size, self.channels), dtype=np.uint8)

        def read_into(i: int) -> None:
            images[i] = read_image(self.paths[positions[i]], self.size, self.channels)

        with ThreadPoolExecutor() as threads:  # Pillow releases the GIL while it decodes
            for _ in threads.map(read_into, range(len(positions))):
                pass
        return images


@dataclass
class Listing:
    """Lists the images in class folders and counts the files that are left out.

    folders: folders of the splits that were listed.
    skipped: numbers of hidden and system entries, by name.
    others: numbers of files that are not images, by file name extension.
    """

    folders: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)

    def in_folders(self, folder: Path) -> dict[str, list[str]]:
        """Paths of the images by class, for a folder with one folder per class.

        Raises DataError where a folder is unreadable, there are no class folders, or a class has no images.
        """
        self.folders.append(folder)
        try:
            with os.scandir(folder) as found:
                entries = [entry for entry in sorted(found, key=lambda entry: entry.name) if self.is_listed(entry)]
            classes = [entry for entry in entries if is_directory(entry)]
            for entry in entries:
                if not is_directory(entry):
                    self.others["outside of the class folders"] += self.check_link(entry)
            paths = {entry.name: self.images_below(Path(entry.path)) for entry in classes}
        except OSError as error:
            raise DataError(
                f"{error.filename}: cannot be read ({error.strerror}); make it readable or remove it from {folder}"
            ) from error
        if not paths:
            raise DataError(f"{folder}: contains no class folders; put the images of each class in {folder}/CLASS/")
        if empty := [name for name, images in paths.items() if not images]:
            names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
            raise DataError(f"{folder}: no images in the class folders {names}; add some, or remove these folders")
        return paths

    def images_below(self, folder: Path) -> list[str]:
        """Paths of the images in a class folder and its subfolders."""
        images = []
        for directory, entries in walk(folder, self.is_listed):
            for entry in filter(self.is_listed, entries):
                extension = os.path.splitext(entry.name)[1].lower()
                if extension in image_extensions():
                    images.append((directory, entry.name))
                else:
                    self.others[extension or "no extension"] += self.check_link(entry)
        return [os.path.join(*image) for image in sorted(images)]

    def is_listed(self, entry: os.DirEntry[str]) -> bool:
        """Whether an entry is neither hidden nor a system entry. Those are counted as skipped."""
        listed = not entry.name.startswith(".") and entry.name.lower() not in SYSTEM_ENTRIES
        self.skipped["._*" if entry.name.startswith("._") else entry.name] += not listed
        return listed

    def check_link(self, entry: os.DirEntry[str]) -> bool:
        """Return True, which counts the entry as left out.

        Raises DataError for a broken link without an extension, which may have pointed to a folder of images.
        """
        if entry.is_symlink() and not os.path.exists(entry.path) and not os.path.splitext(entry.name)[1]:
            target = os.readlink(entry.path)
            raise DataError(
                f"{entry.path}: a link to {target}, which does not exist; mount or restore that, or remove the link"
            )
        return True

    def log_left_out(self) -> None:
        """Log the files that were left out, one line per reason."""
        folders = " and ".join(map(str, self.folders))
        if self.skipped.total():
            log.info("Skipped hidden and system entries in %s: %s", folders, counts(self.skipped))
        if self.others.total():
            log.info("Left out %d files in %s that are not images: %s", self.others.total(), folders, counts(self.others))


def counts(names: Counter[str]) -> str:
    """The most frequent names with their counts, for a log line."""
    shown = [f"{name} ({count})" for name, count in names.most_common(8) if count]
    more = sum(count > 0 for count in names.values()) - len(shown)
    return ", ".join(shown) + (f" and {more} more kinds" if more > 0 else "")


def has_folders(folder: Path) -> bool:
    """Whether a folder contains a folder that is neither hidden nor a system folder."""
    try:
        with os.scandir(folder) as entries:
            return any(is_directory(entry) and Listing().is_listed(entry) for entry in entries)
    except OSError:
        return False


@functools.cache
def image_extensions() -> frozenset[str]:
    """File name extensions (such as ``.png``) of the image formats that the installed Pillow reads.

    Videos, documents, and formats that Pillow only identifies are excluded.
    """
    from PIL import Image, ImageFile

    def reads(kind: str) -> bool:
        opener = Image.OPEN.get(kind, (None,))[0]
        stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
        return opener is not None and not stub and Image.MIME.get(kind, "image/").startswith("image/")

    return frozenset(extension for extension, kind in Image.registered_extensions().items() if reads(kind))


def tiny_imagenet_val(folder: Path) -> dict[str, list[str]]:
    """Paths of the images by class, for Tiny ImageNet's ``val`` folder; empty where the folder has another layout.

    Raises DataError where ``val_annotations.txt`` is invalid.
    """
    annotations, images = folder / "val_annotations.txt", folder / "images"
    if not (annotations.is_file() and images.is_dir()):
        return {}
    paths: dict[str, list[str]] = {}
    for number, line in enumerate(os.fsdecode(annotations.read_bytes()).splitlines(), start=1):
        name, _, rest = line.partition("\t")
        if not rest:
            raise DataError(f"{annotations}: line {number} is not a file name, a tab and a class; restore the original file")
        paths.setdefault(rest.split("\t")[0], []).append(str(images / name))
    return paths


def read_image(path: str, size: int, channels: int) -> np.ndarray:
    """Read an image file, center-crop it to a square and resize that: (size, size, channels) as uint8.

    path: path of the file.
    size: side of the square, in pixels.
    channels: 3, or 1 for grayscale.

    Raises DataError where the file cannot be read as an image of at most 8 bits per channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            # Pillow opens color images of 16 bits as 8 bits; what it decodes them from is in its tiles.
            if image.mode[0] in "IF" or any(re.search(r";16[BLN]", str(tile[3])) for tile in getattr(image, "tile", ())):
                raise ValueError("more than 8 bits per channel, which would be truncated; convert it")
            # Cameras store the orientation of a picture as EXIF metadata.
            upright = ImageOps.exif_transpose(image).convert(MODES[channels])
            square = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # a damaged file raises almost anything
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read as an image ({reason}); replace or remove it") from error
    return np.asarray(square).reshape(size, size, channels)
