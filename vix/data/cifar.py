"""CIFAR-10 and CIFAR-100 in torchvision's layout: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009."""

import contextlib
import errno
import fcntl
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
from vix.system.files import try_lock

log = logging.getLogger(__name__)

CIFAR10_CLASSES: tuple[str, ...] = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(kw_only=True)
class Cifar10(ImageData):
    """50,000 training and 10,000 test images of 32×32 pixels, 10 classes.

    root: folder that holds (or will hold) ``cifar-10-batches-py``; where that is absent it is unpacked from
        ``cifar-10-python.tar.gz`` there, or downloaded.
    """

    root: str = "data"

    image_size, channels, sizes = 32, 3, (50_000, 10_000)
    class_names = CIFAR10_CLASSES
    reader, folder = "CIFAR10", "cifar-10-batches-py"

    def read(self) -> tuple[LabeledImages, LabeledImages]:
        from torchvision import datasets  # takes seconds, and only this needs it

        reader = getattr(datasets, self.reader)
        where, archive = Path(self.root, self.folder), Path(self.root, reader.filename)
        present = where.is_dir()
        if present and not os.access(where, os.R_OK | os.X_OK):
            raise DataError(f"{where}: no permission to read it; {self.way_out}")
        if not present and archive.is_symlink() and not archive.exists():
            raise DataError(f"{archive} is a link to {os.readlink(archive)}, which is not there; {self.way_out}")
        try:
            if not present and archive.is_file() and not os.access(self.root, os.W_OK):
                log.info("%s is not writable: unpacking %s for this run alone", self.root, archive.name)
                with tempfile.TemporaryDirectory() as elsewhere:
                    self.unpack(reader, archive, elsewhere)
                    train, test = (reader(elsewhere, train=train) for train in (True, False))
            else:
                if not present:
                    self.download(reader, archive)
                train, test = (reader(self.root, train=train) for train in (True, False))
        except PermissionError as error:
            raise DataError(f"{error.filename}: no permission for it; {self.way_out}") from error
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            what = "is incomplete or damaged" if present else "is absent and cannot be downloaded"
            unpack = f"remove that folder to unpack {archive} again, or " if present and archive.is_file() else ""
            raise DataError(f"{where} {what} ({' '.join(str(error).split())}); {unpack}{self.way_out}") from error
        self.class_names = tuple(train.classes)
        return (train.data, np.array(train.targets)), (test.data, np.array(test.targets))

    @property
    def way_out(self) -> str:
        """What every error about the files ends with."""
        return (
            f"put the original files there, or name the folder that holds {self.folder} with data.root=DIR or VIX_DATA=DIR; "
            "`python train.py experiment=quickstart` needs none"
        )

    def unpack(self, reader: Any, archive: Path, root: str) -> None:
        """Unpack the set's files of an archive into ``root`` and verify them. Raises DataError where they are not all sound.

        Only the contents count: an archive that somebody compressed again is as good as the original.
        """
        names = [name for name, _ in (*reader.train_list, *reader.test_list)] + [reader.meta["filename"]]
        try:
            Path(root, self.folder).mkdir()
            with tarfile.open(archive) as tar:
                for name in names:
                    contents = tar.extractfile(f"{self.folder}/{name}")
                    if contents is None:
                        raise KeyError(f"{self.folder}/{name} is no file")
                    with contents, open(Path(root, self.folder, name), "wb") as file:
                        shutil.copyfileobj(contents, file)
        except OSError as error:
            if error.errno is not None and error.errno != errno.EINVAL and not isinstance(error, gzip.BadGzipFile):
                raise DataError(f"{archive} cannot be unpacked ({error.strerror}); {self.way_out}") from error
            raise DataError(f"{archive} is damaged ({error}); take it away or replace it, or {self.way_out}") from error
        except (tarfile.TarError, EOFError, KeyError, zlib.error) as error:
            reason = " ".join(str(error).split()).strip("\"'")
            raise DataError(f"{archive} is damaged ({reason}); take it away or replace it, or {self.way_out}") from error
        try:
            for train in (True, False):
                reader(root, train=train)
        except RuntimeError as error:
            raise DataError(
                f"{archive} is damaged or not {self.reader}'s (a file in it has another MD5 checksum); "
                f"take it away or replace it, or {self.way_out}"
            ) from error

    def download(self, reader: Any, archive: Path) -> None:
        """Download, or take the archive in ``root``, verify and unpack next to the other contents of ``root``, and only then
        move the folder into its place.

        Of several processes that start at once, one downloads and the others wait for it.
        """
        root = Path(self.root)
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".download.lock", "w") as lock:
            try_lock(lock, fcntl.LOCK_EX)
            if (root / self.folder).is_dir():
                return
            with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as unfinished:
                if archive.is_file():
                    log.info("Unpacking %s", archive)
                    self.unpack(reader, archive, unfinished)
                else:
                    log.info("Downloading %s into %s", self.reader, root)
                    # torchvision prints its progress, which is no use in a log.
                    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                        reader(unfinished, download=True)
                try:
                    (Path(unfinished) / self.folder).rename(root / self.folder)
                except OSError:
                    if not (root / self.folder).is_dir():
                        raise
                    log.info("%s was brought by another process", root / self.folder)  # without locks both downloaded it


class Cifar100(Cifar10):
    """50,000 training and 10,000 test images of 32×32 pixels, 100 classes (fine labels).

    root: folder that holds (or will hold) ``cifar-100-python``; where that is absent it is unpacked from
        ``cifar-100-python.tar.gz`` there, or downloaded.
    """

    class_names = tuple(map(str, range(100)))  # their names come with the files
    reader, folder = "CIFAR100", "cifar-100-python"
