"""SVHN, Fashion-MNIST and STL-10: torchvision reads them in its own layout, and downloads them if they are absent."""

import contextlib
import io
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from vix.data.dataset import ImageData, LabeledImages
from vix.errors import DataError
from vix.system.files import wait_for_lock, waiting_lock

log = logging.getLogger(__name__)
SplitName = Literal["train", "test"]
LOCK = ".download.lock"


@dataclass(kw_only=True)
class TorchvisionData(ImageData):
    """Base class of image sets of torchvision. A subclass is named as torchvision's class of the same images.

    root: folder that contains the files in torchvision's layout. If absent, torchvision downloads them, or unpacks the original
        archive in its place.

    Raises DataError on reading, where the files are damaged, unreadable, or absent and cannot be downloaded.
    """

    root: str = "data"

    files: ClassVar[tuple[str, str]]  # a file of the training and of the test split, which shows whether they are there

    def options(self, split: SplitName) -> dict[str, Any]:
        """The arguments of torchvision's constructor that select a split."""
        return {"split": split}

    def arrays(self, read: Any) -> LabeledImages:
        """Images (count, Y, X, C) as uint8, and labels (count,), of an object of torchvision's class."""
        return read.data.transpose(0, 2, 3, 1), read.labels

    def read(self) -> tuple[LabeledImages, LabeledImages]:
        return self.read_split("train"), self.read_split("test")

    def read_split(self, split: SplitName) -> LabeledImages:
        """Images and labels of a split. Raises DataError."""
        from torchvision import datasets  # imported here because it takes seconds

        reader, file = getattr(datasets, type(self).__name__), Path(self.root, self.files[split == "test"])
        if os.path.lexists(file):
            wait_for_lock(Path(self.root, LOCK))  # torchvision downloads to the final name, so that it may be a part
        present = os.path.lexists(file)
        try:
            if present:
                images, labels = self.arrays(reader(self.root, **self.options(split)))
            else:
                images, labels = self.download(reader, split, file)
            expected = self.sizes[split == "test"]
            if len(labels) != expected:
                raise ValueError(f"{len(labels):,} images instead of {expected:,}")
        except PermissionError as error:
            raise DataError(f"{error.filename}: no permission to access it; {self.remedy}") from error
        except Exception as error:  # a damaged file can raise any exception
            what = "is incomplete or damaged" if present else "is absent and cannot be downloaded"
            remove = "remove it to download it again, or " if present else ""
            raise DataError(f"{file} {what} ({' '.join(str(error).split())}); {remove}{self.remedy}") from error
        return images, np.asarray(labels).astype(np.int64)

    def download(self, reader: Any, split: SplitName, file: Path) -> LabeledImages:
        """Download a split and read it. Other processes wait meanwhile; ``file`` is removed if that fails."""
        Path(self.root).mkdir(parents=True, exist_ok=True)
        with waiting_lock(Path(self.root, LOCK)):
            present = os.path.lexists(file)  # another process has downloaded it
            log.info("Downloading %s into %s", type(self).__name__, self.root)
            try:
                # torchvision prints a progress bar, which is useless in a log.
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    return self.arrays(reader(self.root, download=True, **self.options(split)))
            except BaseException:  # Ctrl-C as well
                if not present:
                    file.unlink(missing_ok=True)  # a part of it; the next start downloads it again
                raise

    @property
    def remedy(self) -> str:
        """What to do about missing or damaged files; the end of every error message about them."""
        return (
            f"put the original files there, or set the folder that contains {self.files[0].partition('/')[0]} with "
            "data.root=DIR or VIX_DATA=DIR; `python train.py experiment=quickstart` needs no download"
        )


class SVHN(TorchvisionData):
    """73,257 training and 26,032 test images of 32×32 pixels: digits of house numbers (Netzer et al., 2011), 10 classes.

    root: folder that contains ``train_32x32.mat`` and ``test_32x32.mat``, which are downloaded if absent.
    """

    image_size, channels, sizes = 32, 3, (73_257, 26_032)
    class_names = tuple("0123456789")
    files = ("train_32x32.mat", "test_32x32.mat")


class FashionMNIST(TorchvisionData):
    """60,000 training and 10,000 test images of 28×28 gray pixels: clothes (Xiao et al., 2017), 10 classes.

    root: folder that contains ``FashionMNIST/raw``. If absent, it is downloaded, or unpacked from the .gz files in it.
    """

    image_size, channels, sizes = 28, 1, (60_000, 10_000)
    class_names = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    files = ("FashionMNIST/raw/train-images-idx3-ubyte", "FashionMNIST/raw/t10k-images-idx3-ubyte")

    def options(self, split: SplitName) -> dict[str, Any]:
        return {"train": split == "train"}

    def arrays(self, read: Any) -> LabeledImages:
        return read.data.numpy()[..., None], read.targets.numpy()


class STL10(TorchvisionData):
    """5,000 training and 8,000 test images of 96×96 pixels (Coates et al., 2011), 10 classes, without the unlabeled images.

    root: folder that contains ``stl10_binary``. If absent, it is unpacked from ``stl10_binary.tar.gz`` or downloaded.
    """

    image_size, channels, sizes = 96, 3, (5_000, 8_000)
    class_names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    files = ("stl10_binary/train_X.bin", "stl10_binary/test_X.bin")
