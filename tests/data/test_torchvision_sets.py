"""SVHN, Fashion-MNIST and STL-10 in torchvision's layout: small files in the original formats, read and downloaded by it."""

import hashlib
import logging
import struct
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from torchvision import datasets

from vix.data.dataset import LabeledImages
from vix.data.torchvision_sets import LOCK, STL10, SVHN, FashionMNIST, TorchvisionData
from vix.errors import DataError
from vix.system.files import waiting_lock

Write = Callable[[Path, str, np.ndarray, np.ndarray], None]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_svhn(root: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """MATLAB's format: images along the last axis, and the digit 0 labelled 10."""
    matrices = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None]}
    scipy.io.savemat(root / f"{split}_32x32.mat", matrices)


def write_fashion(root: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """The idx format: big-endian sizes, then the bytes."""
    raw, name = root / "FashionMNIST" / "raw", {"train": "train", "test": "t10k"}[split]
    raw.mkdir(parents=True, exist_ok=True)
    sizes = struct.pack(">IIII", 0x803, len(images), 28, 28)
    (raw / f"{name}-images-idx3-ubyte").write_bytes(sizes + images.tobytes())
    (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + labels.astype(np.uint8).tobytes())


def write_stl(root: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Bytes alone, by image, channel and column; labels from 1."""
    folder = root / "stl10_binary"
    folder.mkdir(exist_ok=True)
    (folder / f"{split}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
    (folder / f"{split}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
    (folder / "unlabeled_X.bin").touch()


SETS: list[tuple[type[TorchvisionData], Write]] = [(SVHN, write_svhn), (FashionMNIST, write_fashion), (STL10, write_stl)]


@pytest.fixture(params=SETS, ids=lambda pair: pair[0].__name__)
def small(
    request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[type[TorchvisionData], dict[str, LabeledImages]]:
    """A set of 30 training and 20 test images in ``tmp_path``, whose checksums torchvision takes for the original ones."""
    kind, write = request.param
    random, content = np.random.default_rng(0), {}
    for split, count in (("train", 30), ("test", 20)):
        images = random.integers(0, 256, (count, kind.image_size, kind.image_size, kind.channels), dtype=np.uint8)
        content[split] = images, np.arange(count) % 10
        write(tmp_path, split, *content[split])
    monkeypatch.setattr(kind, "sizes", (30, 20))
    files = {split: tmp_path / f"{split}_32x32.mat" for split in ("train", "test")}
    if kind is SVHN:
        there = {split: [f"file://{tmp_path}/there/{path.name}", path.name, md5(path)] for split, path in files.items()}
        monkeypatch.setattr(datasets.SVHN, "split_list", there)
    if kind is STL10:
        folder = tmp_path / "stl10_binary"
        for names, split in (("train_list", "train"), ("test_list", "test")):
            listed = [f"{split}_X.bin", f"{split}_y.bin", *(["unlabeled_X.bin"] if split == "train" else [])]
            monkeypatch.setattr(datasets.STL10, names, [[name, md5(folder / name)] for name in listed])
    return kind, content


def test_the_files_are_read(small: tuple[type[TorchvisionData], dict[str, LabeledImages]], tmp_path: Path) -> None:
    """Offline, pixel by pixel, upright and with labels from 0."""
    kind, content = small
    data = kind(root=str(tmp_path), test_size=10)
    for (images, labels), (expected, expected_labels) in zip(data.read(), content.values(), strict=True):
        np.testing.assert_array_equal(np.asarray(images[np.arange(len(labels))]), expected)
        np.testing.assert_array_equal(labels, expected_labels)
    train, test = data.load(torch.device("cpu"))
    assert train.images.shape == (30, kind.channels, kind.image_size, kind.image_size)
    assert len(test) == 10
    assert data.image_set == kind.__name__.lower()


def test_damaged_files_stay(small: tuple[type[TorchvisionData], dict[str, LabeledImages]], tmp_path: Path) -> None:
    """One line names the file and the way out; nothing is downloaded over it."""
    kind, _ = small
    path = tmp_path / kind.files[0]
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(half)
    with pytest.raises(
        DataError, match=r"is incomplete or damaged \(.*\); remove it to download it again, or put the original"
    ) as e:
        kind(root=str(tmp_path)).read()
    assert str(e.value).startswith(str(path))
    assert "\n" not in str(e.value)
    assert path.read_bytes() == half


def test_a_download_by_another_process_is_waited_for(
    small: tuple[type[TorchvisionData], dict[str, LabeledImages]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While it lasts, the file is there in part."""
    caplog.set_level(logging.INFO)
    kind, content = small
    path = tmp_path / kind.files[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    read: list[Any] = []
    reader = threading.Thread(target=lambda: read.append(kind(root=str(tmp_path)).read()))
    with waiting_lock(tmp_path / LOCK):
        reader.start()
        reader.join(0.5)
        assert not read
        path.write_bytes(whole)
    reader.join()
    np.testing.assert_array_equal(read[0][0][1], content["train"][1])
    assert caplog.messages == [f"Waiting for another process that has locked {tmp_path / LOCK}"]


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By torchvision, from a server of this machine; without it, one line, and the next start tries again."""
    server = tmp_path / "server"
    server.mkdir()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(server)))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    images, labels = np.zeros((20, 32, 32, 3), dtype=np.uint8), np.arange(20) % 10
    urls = {}
    for split in ("train", "test"):
        write_svhn(server, split, images, labels)
        path = server / f"{split}_32x32.mat"
        urls[split] = [f"http://127.0.0.1:{http.server_port}/{path.name}", path.name, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", urls)
    monkeypatch.setattr(SVHN, "sizes", (20, 20))
    root, train = tmp_path / "data", server / "train_32x32.mat"
    original = train.read_bytes()
    train.write_bytes(original[:100])
    with pytest.raises(DataError, match=r"train_32x32\.mat is absent and cannot be downloaded \(.*\); put the original files"):
        SVHN(root=str(root)).read()
    train.write_bytes(original)
    (_, read), _ = SVHN(root=str(root)).read()
    np.testing.assert_array_equal(read, labels)
    assert capsys.readouterr().out == ""
    http.shutdown()
    http.server_close()
    (root / "test_32x32.mat").unlink()
    with pytest.raises(DataError, match=r"test_32x32\.mat is absent and cannot be downloaded \(.*refused"):
        SVHN(root=str(root)).read()
