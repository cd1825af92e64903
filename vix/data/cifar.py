"""CIFAR-10 and CIFAR-100 in torchvision's layout: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009."""

import contextlib
import errno
import gzip
import io
import logging
import os
import pickle
import shutil
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vix.data.dataset import ImageData, LabeledImages
from vix.errors import DataError
from vix.system.files import waiting_lock

log = logging.getLogger(__name__)

CIFAR10_CLASSES: tuple[str, ...] = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(kw_only=True)
class Cifar10(ImageData):
    """50,000 training and 10,000 test images of 32×32 pixels, 10 classes.

    root: folder that contains ``cifar-10-batches-py``. If absent, it is unpacked from ``cifar-10-python.tar.gz`` in the same
        folder, or else downloaded.

    Raises DataError on reading, where the files are damaged, unreadable, or absent and cannot be downloaded.
    """

    root: str = "data"

    image_size, channels, sizes = 32, 3, (50_000, 10_000)
    class_names = CIFAR10_CLASSES
    reader, folder = "CIFAR10", "cifar-10-batches-py"

    def read(self) -> tuple[LabeledImages, LabeledImages]:
        from torchvision import datasets  # imported here because it takes seconds

        reader = getattr(datasets, self.reader)
        where, archive = Path(self.root, self.folder), Path(self.root, reader.filename)
        present = where.is_dir()
        if present and not os.access(where, os.R_OK | os.X_OK):
            raise DataError(f"{where}: no permission to read it; {self.remedy}")
        if not present and archive.is_symlink() and not archive.exists():
            raise DataError(f"{archive} is a link to {os.readlink(archive)}, which does not exist; {self.remedy}")
        try:
            if not present and archive.is_file() and not os.access(self.root, os.W_OK):
                log.info("%s is not writable: unpacking %s into a temporary directory for this run", self.root, archive.name)
                with tempfile.TemporaryDirectory() as temporary:
                    self.unpack(reader, archive, temporary)
                    train, test = (reader(temporary, train=train) for train in (True, False))
            else:
                if not present:
                    self.download(reader, archive)
                train, test = (reader(self.root, train=train) for train in (True, False))
        except PermissionError as error:
            raise DataError(f"{error.filename}: no permission to access it; {self.remedy}") from error
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            what = "is incomplete or damaged" if present else "is absent and cannot be downloaded"
            unpack = f"remove that folder to unpack {archive} again, or " if present and archive.is_file() else ""
            raise DataError(f"{where} {what} ({' '.join(str(error).split())}); {unpack}{self.remedy}") from error
        self.class_names = tuple(train.classes)
        return (train.data, np.array(train.targets)), (test.data, np.array(test.targets))

    @property
    def remedy(self) -> str:
        """What to do about missing or damaged files; the end of every error message about them."""
        return (
            f"put the original files there, or set the folder that contains {self.folder} with data.root=DIR or VIX_DATA=DIR; "
            "`python train.py experiment=quickstart` needs no download"
        )

    def unpack(self, reader: Any, archive: Path, root: str) -> None:
        """Unpack an archive's files of this image set into ``root`` and verify their checksums.

        The archive's own checksum is not compared, so a recompressed archive is accepted.

        reader: torchvision's class of this image set.
        archive: the .tar.gz file.
        root: existing directory in which ``folder`` is created.

        Raises DataError where the archive is damaged or its files are not the original ones.
        """
        names = [name for name, _ in (*reader.train_list, *reader.test_list)] + [reader.meta["filename"]]
        try:
            Path(root, self.folder).mkdir()
            with tarfile.open(archive) as tar:
                for name in names:
                    contents = tar.extractfile(f"{self.folder}/{name}")
                    if contents is None:
                        raise KeyError(f"{self.folder}/{name} is not a file")
                    with contents, open(Path(root, self.folder, name), "wb") as file:
                        shutil.copyfileobj(contents, file)
        except OSError as error:
            if error.errno is not None and error.errno != errno.EINVAL and not isinstance(error, gzip.BadGzipFile):
                raise DataError(f"{archive} cannot be unpacked ({error.strerror}); {self.remedy}") from error
            raise DataError(f"{archive} is damaged ({error}); remove or replace it, or {self.remedy}") from error
        except (tarfile.TarError, EOFError, KeyError, zlib.error) as error:
            reason = " ".join(str(error).split()).strip("\"'")
            raise DataError(f"{archive} is damaged ({reason}); remove or replace it, or {self.remedy}") from error
        try:
            for train in (True, False):
                reader(root, train=train)
        except RuntimeError as error:
            raise DataError(
                f"{archive} is damaged or not {self.reader}'s (a file in it has the wrong MD5 checksum); "
                f"remove or replace it, or {self.remedy}"
            ) from error

    def download(self, reader: Any, archive: Path) -> None:
        """Unpack the archive, or else download it, into ``root``.

        The files are unpacked and verified in a temporary directory within ``root``, and then moved. If several processes start
        at the same time, one downloads and the others wait for it.

        reader: torchvision's class of this image set.
        archive: the .tar.gz file, which need not exist.
        """
        root = Path(self.root)
        root.mkdir(parents=True, exist_ok=True)
        with waiting_lock(root / ".download.lock"):
            if (root / self.folder).is_dir():
                return
            with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as unfinished:
                if archive.is_file():
                    log.info("Unpacking %s", archive)
                    self.unpack(reader, archive, unfinished)
                else:
                    log.info("Downloading %s into %s", self.reader, root)
                    # torchvision prints a progress bar, which is useless in a log.
                    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                        reader(unfinished, download=True)
                try:
                    (Path(unfinished) / self.folder).rename(root / self.folder)
                except OSError:
                    if not (root / self.folder).is_dir():
                        raise
                    log.info("Another process has created %s", root / self.folder)  # possible on file systems without locks


class Cifar100(Cifar10):
    """50,000 training and 10,000 test images of 32×32 pixels, 100 classes (fine labels).

    root: folder that contains ``cifar-100-python``. If absent, it is unpacked from ``cifar-100-python.tar.gz`` in the same
        folder, or else downloaded.
    """

    class_names = tuple(map(str, range(100)))  # placeholders until the files, which contain the names, are read
    reader, folder = "CIFAR100", "cifar-100-python"
