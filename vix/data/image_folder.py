"""A user's own images, a folder for each class (torchvision's ImageFolder layout), and Tiny ImageNet as it is distributed."""

import functools
import logging
import os
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
# What file managers, notebooks, archives and file servers leave behind; hidden entries (.DS_Store, ._x.png) besides.
SYSTEM_ENTRIES = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "__pycache__", "@eadir", "#recycle", "@recycle"),
    *("$recycle.bin", "system volume information", "lost+found"),
}
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ImageFolder(ImageData):
    """Images of any size in ``root/train/<class>/`` and in ``root/val/<class>/`` or ``root/test/<class>/``; or all of them
    in ``root/<class>/`` or ``root/train/<class>/``, of which ``validation_size`` images are then tested.

    The test split is ``val`` where there is one, else ``test`` (Tiny ImageNet's and ImageNet's ``test`` have no labels).
    Folders below that of a class belong to it. Which files are images follows from the endings of their names: all that
    Pillow reads. Hidden and system entries are skipped; what is left out is logged. A ``val`` with a flat ``images/`` folder
    and a ``val_annotations.txt``, which is Tiny ImageNet's, is read by that file.

    All images are held in memory as uint8: count · channels · image_size² bytes (1.35 GB for Tiny ImageNet).

    root: the folder that holds ``train``, or the folders of the classes.
    image_size: side of the square that the middle of each image is cut and resized to, in pixels.
    channels: 3, or 1 to make the images grey.
    classes: None counts the folders of the classes; a number builds the model where the images are not, and is compared
        with the folders when they are read.

    Raises ConfigError where ``root`` has no such folders, and DataError where they hold no images or not the same classes.
    """

    root: str = "data"
    image_size: Positive = 64
    channels: Literal[1, 3] = 3
    classes: Positive | None = None  # type: ignore[assignment]  # a number once it is made

    def __post_init__(self) -> None:
        if self.classes is None:
            self.class_names, train, test, _ = self.list_files()
            self.sizes = len(train), len(test or ())
        else:
            self.class_names = tuple(map(str, range(self.classes)))  # their names come with the files
            self.sizes = sys.maxsize, sys.maxsize
        super().__post_init__()

    @property
    def train_images(self) -> int:
        if self.train_size is None and self.sizes[0] == sys.maxsize:  # data.classes: only the files say how many there are
            return len(self.list_files()[1]) - (self.validation_size or 0)
        return super().train_images

    @functools.cached_property
    def digest(self) -> str:
        names, train, test, _ = self.list_files()
        splits = {"train": train, "test": test or []}
        return files_digest(self.root, {split: [(path, names[k]) for path, k in files] for split, files in splits.items()})

    @functools.cached_property
    def image_set(self) -> str:
        names, train, test, _ = self.list_files()
        counts = f"{len(names)} classes, {len(train):,} training and {len(test or ()):,} test images"
        return f"{super().image_set} {self.digest} ({counts})"

    def read(self) -> tuple[LabeledImages, LabeledImages | None]:
        names, train, test, listing = self.list_files()
        if len(names) != self.classes:
            raise DataError(f"data.classes={self.classes}: {listing.folders[0]} has {len(names)} class folders")
        self.class_names = names
        listing.log_left_out()
        return self.files(train), None if test is None else self.files(test)

    def files(self, samples: list[Sample]) -> LabeledImages:
        """A split, whose files are read when they are picked."""
        paths = [path for path, _ in samples]
        return Files(paths, self.image_size, self.channels), np.array([label for _, label in samples])

    def list_files(self) -> tuple[tuple[str, ...], list[Sample], list[Sample] | None, "Listing"]:
        """Names of the classes, in order, and all images of the training and of the test split (None where it is absent)."""
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
                    raise DataError(f"{here} and {there} differ in their classes: only {here} has {names}")
        classes = sorted(by_class)
        train_files, *test_files = (
            [(path, label) for label, name in enumerate(classes) for path in split[name]] for split in splits
        )
        return tuple(classes), train_files, test_files[0] if test_files else None, listing

    def split_folders(self) -> tuple[Path, Path | None]:
        """The folders of the training and of the test split (None: there is none). Raises ConfigError for another layout."""
        root, train = Path(self.root), Path(self.root, "train")
        # A folder of splits holds folders of classes; a class may itself be called train, val or test, and holds images.
        test = next((folder for name in ("val", "test") if has_folders(folder := root / name)), None)
        if has_folders(train):
            absent = f"{root}/val or {root}/test"
        else:
            absent, train = str(train), root
        works = (test is None and has_folders(root)) if train == root else True
        if works and (test is not None or self.validation_size):
            return train, test
        raise ConfigError(
            f"data.root={root}: there is no {absent}; the images of each class belong in {root}/train/CLASS/ and "
            f"{root}/val/CLASS/ (or test/), or all in {root}/train/CLASS/ or {root}/CLASS/ with data.validation_size=N, which "
            "keeps N of them for testing; name the folder that holds them with data.root=DIR or VIX_DATA=DIR"
        )


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


@dataclass
class Listing:
    """Finds the images below folders of classes, and keeps count of all that is left out.

    skipped: hidden and system entries, by name; others: files that are no images, by the ending of their names.
    """

    folders: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)

    def in_folders(self, folder: Path) -> dict[str, list[str]]:
        """Paths of the images of each class, which is a folder in ``folder``. Raises DataError where a class has none."""
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
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}); it holds images of {folder}") from error
        if not paths:
            raise DataError(f"{folder}: holds no folders, and each class needs one with its images: {folder}/CLASS/")
        if empty := [name for name, images in paths.items() if not images]:
            names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
            raise DataError(f"{folder}: no images in the class folders {names}; put some there, or take these folders away")
        return paths

    def images_below(self, folder: Path) -> list[str]:
        """Paths of the images in a class's folder and in those below it."""
        images = []
        for directory, entries in walk(folder, self.is_listed):
            for entry in filter(self.is_listed, entries):
                ending = os.path.splitext(entry.name)[1].lower()
                if ending in image_endings():
                    images.append((directory, entry.name))
                else:
                    self.others[ending or "no ending"] += self.check_link(entry)
        return [os.path.join(*image) for image in sorted(images)]

    def is_listed(self, entry: os.DirEntry[str]) -> bool:
        """Whether an entry is neither a hidden nor a system one, which are counted."""
        listed = not entry.name.startswith(".") and entry.name.lower() not in SYSTEM_ENTRIES
        self.skipped["._*" if entry.name.startswith("._") else entry.name] += not listed
        return listed

    def check_link(self, entry: os.DirEntry[str]) -> bool:
        """True, to be counted. Raises DataError for a broken link that may have led to a folder of images."""
        if entry.is_symlink() and not os.path.exists(entry.path) and not os.path.splitext(entry.name)[1]:
            target = os.readlink(entry.path)
            raise DataError(
                f"{entry.path}: a link to {target}, which is not there; mount or restore that, or take the link away"
            )
        return True

    def log_left_out(self) -> None:
        """Log what was left out, a line for each reason."""
        folders = " and ".join(map(str, self.folders))
        if self.skipped.total():
            log.info("Skipped hidden and system entries in %s: %s", folders, counts(self.skipped))
        if self.others.total():
            log.info("Left out %d files in %s that are no images: %s", self.others.total(), folders, counts(self.others))


def counts(names: Counter[str]) -> str:
    """The most frequent names with how often each occurs, for a log line."""
    there = [f"{name} ({count})" for name, count in names.most_common(8) if count]
    more = sum(count > 0 for count in names.values()) - len(there)
    return ", ".join(there) + (f" and {more} more kinds" if more > 0 else "")


def has_folders(folder: Path) -> bool:
    """Whether a folder holds another that is neither hidden nor a system's."""
    try:
        with os.scandir(folder) as entries:
            return any(is_directory(entry) and Listing().is_listed(entry) for entry in entries)
    except OSError:
        return False


@functools.cache
def image_endings() -> frozenset[str]:
    """Endings (``.png``) of the files that this machine's Pillow reads as images; not of videos, documents and mere stubs."""
    from PIL import Image, ImageFile

    def reads(kind: str) -> bool:
        opener = Image.OPEN.get(kind, (None,))[0]
        stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
        return opener is not None and not stub and Image.MIME.get(kind, "image/").startswith("image/")

    return frozenset(ending for ending, kind in Image.registered_extensions().items() if reads(kind))


def tiny_imagenet_val(folder: Path) -> dict[str, list[str]]:
    """Paths of the images of each class by Tiny ImageNet's ``val_annotations.txt``; nothing where the layout is another."""
    annotations, images = folder / "val_annotations.txt", folder / "images"
    if not (annotations.is_file() and images.is_dir()):
        return {}
    paths: dict[str, list[str]] = {}
    for number, line in enumerate(os.fsdecode(annotations.read_bytes()).splitlines(), start=1):
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
