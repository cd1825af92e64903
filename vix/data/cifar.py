"""CIFAR-10 and CIFAR-100 in torchvision's layout (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009)."""

import contextlib
import io
from pathlib import Path

import numpy as np

from vix.checks import DataError, NotNegative, Positive
from vix.data.dataset import ImageData


class Cifar10(ImageData):
    """50,000 training and 10,000 test images of 32×32 pixels, 10 classes.

    root: folder that holds (or will hold) ``cifar-10-batches-py``; downloaded there where it is absent.
    """

    image_size, channels, sizes = 32, 3, (50_000, 10_000)
    class_names: tuple[str, ...] = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    reader, folder = "CIFAR10", "cifar-10-batches-py"

    def __init__(
        self,
        *,
        root: str = "data",
        train_size: Positive | None = None,
        test_size: Positive | None = None,
        flip: bool = False,
        crop_padding: NotNegative = 0,
    ) -> None:
        super().__init__(train_size=train_size, test_size=test_size, flip=flip, crop_padding=crop_padding)
        self.root = Path(root)

    def read(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        from torchvision import datasets  # takes seconds, and only this needs it

        reader = getattr(datasets, self.reader)
        present = (self.root / self.folder).is_dir()
        try:
            # torchvision prints its download's progress; its result is all that matters here.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                train, test = (reader(str(self.root), train=train, download=not present) for train in (True, False))
        except (OSError, RuntimeError) as error:
            what = f"{self.root / self.folder} is incomplete or damaged" if present else f"{self.root / self.folder} is absent and cannot be downloaded"
            reason = " ".join(str(error).split())
            raise DataError(
                f"{what} ({reason}); put the original files there, or name the folder that holds {self.folder} with "
                f"data.root=DIR or VIX_DATA=DIR; `python train.py experiment=quickstart` needs none"
            ) from error
        self.class_names = tuple(train.classes)
        return (train.data, np.array(train.targets)), (test.data, np.array(test.targets))


class Cifar100(Cifar10):
    """50,000 training and 10,000 test images of 32×32 pixels, 100 classes (fine labels).

    root: folder that holds (or will hold) ``cifar-100-python``; downloaded there where it is absent.
    """

    class_names = tuple(map(str, range(100)))  # their names come with the files
    reader, folder = "CIFAR100", "cifar-100-python"
