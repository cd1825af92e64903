"""Image sets on the device: subsets, order, augmentation, and files that are absent or damaged."""

import functools
import hashlib
import json
import os
import pickle
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_train
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import datasets
from torchvision.transforms import v2

from vix.data.augment import Augmentation, crop
from vix.data.cifar import Cifar10, Cifar100
from vix.data.dataset import LabeledImages, balanced_subset
from vix.data.digits import Digits
from vix.data.loader import Split, normalize
from vix.errors import DataError

CPU = torch.device("cpu")


@pytest.mark.slow  # unpacking takes half a minute
@pytest.mark.xdist_group("cifar10")  # and is done once for each process
def test_real_cifar10(cifar10_root: Path) -> None:
    """The tensors are torchvision's images, all of them, as uint8: 184 MB."""
    train, test = Cifar10(root=str(cifar10_root)).load(CPU)
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.images.nbytes + test.images.nbytes == 184_320_000
    reference = datasets.CIFAR10(str(cifar10_root), train=False)
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    images, labels = next(test.eval_batches(8))
    expected = torch.stack([to_tensor(reference[i][0]) for i in range(8)])
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
    assert labels.tolist() == [reference[i][1] for i in range(8)]


@pytest.mark.slow
@pytest.mark.xdist_group("cifar10")
def test_subsets_are_balanced_and_the_same_for_every_run(cifar10_root: Path) -> None:
    data = Cifar10(root=str(cifar10_root), train_size=500, test_size=25)
    train, test = data.load(CPU)
    assert torch.bincount(train.labels).tolist() == [50] * 10
    assert sorted(torch.bincount(test.labels).tolist()) == [2] * 5 + [3] * 5
    again, _ = data.load(CPU)
    assert torch.equal(train.images, again.images)


@pytest.mark.parametrize("size", [3, 7, 60])
def test_balanced_subset_of_unequal_classes(size: int) -> None:
    """A class with too few items gives all it has, and the others make up for it."""
    labels = np.repeat([0, 1, 2], [2, 40, 60])
    counts = np.bincount(labels[balanced_subset(labels, size)], minlength=3)
    assert counts.sum() == size
    assert counts[0] == min(2, -(-size // 3))
    assert counts[1:].max() - counts[1:].min() <= 1


def test_digits_are_scikit_learns() -> None:
    """The images, their order, the labels and the split are those of scikit-learn, from which results so far were computed."""
    (train_images, train_labels), (test_images, test_labels) = Digits().read()
    digits = load_digits()
    expected = train_test_split(digits.images, digits.target, test_size=360, stratify=digits.target, random_state=0)
    for images, pixels in zip((train_images, test_images), expected[:2], strict=True):
        assert images.dtype == np.uint8
        assert (images[..., 0] * (16 / 255)).round().tolist() == pixels.tolist()
    assert (train_labels.tolist(), test_labels.tolist()) == (expected[2].tolist(), expected[3].tolist())
    train, test = Digits().load(CPU)
    assert (train.images.shape, test.images.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))


class Scaled(Digits):
    """An image set of a user's own, with images from 0 to 1."""

    def read(self) -> tuple[LabeledImages, LabeledImages | None]:
        (images, labels), test = super().read()
        return (images[np.arange(len(labels))] / 255, labels), test


class Larger(Digits):
    """An image set of a user's own, whose images are not as large as it says."""

    image_size = 9


@pytest.mark.parametrize(
    ("kind", "found"), [(Scaled, r"float64 and shape \(1437, 8, 8, 1\)"), (Larger, r"uint8 and shape \(1437, 8, 8, 1\)")]
)
def test_images_of_a_users_own_set_are_checked(kind: type[Digits], found: str) -> None:
    with pytest.raises(DataError, match=rf"^{kind.__name__}\.read returned images of type {found}; they must be uint8"):
        kind().load(CPU)


class Changing(Digits):
    """An image set of a user's own, whose content can change."""

    digest = "1f3a9c2b4d5e"


def test_the_digest_is_part_of_the_image_set() -> None:
    assert (Changing().image_set, Digits().image_set) == ("changing 1f3a9c2b4d5e", "digits")


@pytest.fixture
def split() -> Split:
    images = torch.arange(50 * 3 * 6 * 6).view(50, 3, 6, 6).to(torch.uint8)
    return Split(images, torch.arange(50))


def test_an_epoch_is_a_permutation(split: Split) -> None:
    """Every image once, with its label; a new order every epoch and seed, and the same for the same."""

    def order(seed: int, epoch: int) -> list[int]:
        batches = list(split.train_batches(8, seed, epoch))
        assert [len(labels) for _, labels in batches] == [8] * 6 + [2]
        for images, labels in batches:
            assert torch.equal(images, normalize(split.images[labels]))
        return torch.cat([labels for _, labels in batches]).tolist()

    assert sorted(order(0, 0)) == list(range(50))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_an_epoch_continues_in_its_middle(split: Split) -> None:
    """From any batch on, images and augmentation are those of the whole epoch."""
    augmentation = Augmentation(flip=True, crop_padding=2)
    whole = list(split.train_batches(8, seed=3, epoch=5, augmentation=augmentation))
    for first in range(8):
        rest = list(split.train_batches(8, seed=3, epoch=5, first_batch=first, augmentation=augmentation))
        assert len(rest) == 7 - min(first, 7)
        for (images, labels), (expected_images, expected_labels) in zip(rest, whole[first:], strict=True):
            assert torch.equal(images, expected_images)
            assert torch.equal(labels, expected_labels)


def test_crop_is_torchvisions_with_black_borders(split: Split) -> None:
    top, left = torch.randint(5, (2, 50), generator=torch.Generator().manual_seed(0))
    cropped = crop(split.images, 2, top, left)
    for i in range(50):
        padded = v2.functional.pad(split.images[i], [2])
        assert torch.equal(cropped[i], v2.functional.crop(padded, int(top[i]), int(left[i]), 6, 6))


def test_half_of_the_images_are_flipped() -> None:
    split = Split(torch.arange(6, dtype=torch.uint8).expand(2000, 1, 6, 6).contiguous(), torch.zeros(2000).long())
    batch = torch.cat([images for images, _ in split.train_batches(64, seed=0, epoch=0, augmentation=Augmentation(flip=True))])
    flipped = batch[:, 0, 0, 0] > batch[:, 0, 0, 5]
    assert 0.45 < flipped.float().mean() < 0.55
    plain = normalize(split.images[0])
    assert torch.equal(batch[~flipped][0], plain)
    assert torch.equal(batch[flipped][0], plain.flip(-1))


def test_two_epochs_of_alternate_flips_show_both_versions_of_every_image() -> None:
    labels = torch.arange(2000)
    split = Split(torch.arange(6, dtype=torch.uint8).expand(2000, 1, 6, 6).contiguous(), labels)
    flipped = torch.empty(4, 2000, dtype=torch.bool)
    for epoch in range(4):
        for images, batch in split.train_batches(64, seed=7, epoch=epoch, augmentation=Augmentation(flip="alternate")):
            flipped[epoch, batch] = images[:, 0, 0, 0] > images[:, 0, 0, 5]
    assert 0.45 < flipped[0].float().mean() < 0.55
    assert torch.equal(flipped[1], ~flipped[0])
    assert torch.equal(flipped[2:], flipped[:2])
    other = next(split.train_batches(2000, seed=8, epoch=0, augmentation=Augmentation(flip="alternate")))
    assert not torch.equal(flipped[0, other[1]], other[0][:, 0, 0, 0] > other[0][:, 0, 0, 5])


@pytest.fixture
def small_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, np.ndarray]]:
    """Files in CIFAR-100's layout with 200 training and 100 test images, known to torchvision by their checksums,
    and the archive they would be downloaded in."""
    folder = tmp_path / "server" / "cifar-100-python"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (300, 3 * 32 * 32), dtype=np.uint8)
    contents = {
        "train": {"data": images[:200], "fine_labels": [i % 100 for i in range(200)]},
        "test": {"data": images[200:], "fine_labels": list(range(100))},
        "meta": {"fine_label_names": [f"name {i}" for i in range(100)]},
    }
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    archive = tmp_path / "server" / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-100-python")
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": sums["meta"]})
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(archive.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.CIFAR100, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        yield tmp_path / "server", images
        server.shutdown()


def test_cifar100_layout(small_cifar100: tuple[Path, np.ndarray]) -> None:
    root, images = small_cifar100
    data = Cifar100(root=str(root))
    train, test = data.load(CPU)
    assert (len(train), len(test), data.classes) == (200, 100, 100)
    assert torch.equal(train.images.flatten(1), torch.from_numpy(images[:200]))
    assert data.class_names[7] == "name 7"


def test_absent_files_are_downloaded(small_cifar100: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    train, _ = Cifar100(root=str(tmp_path / "new")).load(CPU)
    assert len(train) == 200


def test_damaged_and_unreachable_files_are_named(
    small_cifar100: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = small_cifar100
    (root / "cifar-100-python" / "train").write_bytes(b"half")
    monkeypatch.setattr(datasets.CIFAR100, "url", datasets.CIFAR100.url + ".absent")
    for folder, words in ((root, "incomplete or damaged"), (tmp_path / "new", "cannot be downloaded")):
        with pytest.raises(DataError) as error:
            Cifar100(root=str(folder)).load(CPU)
        message = str(error.value)
        assert "\n" not in message
        for part in (words, str(folder), "data.root", "VIX_DATA", "experiment=quickstart"):
            assert part in message


@pytest.mark.parametrize("writable", [True, False])
def test_an_archive_is_unpacked(
    small_cifar100: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    """Offline, whoever compressed it; where the folder is not writable nothing is written there. A damaged one is refused."""
    server, images = small_cifar100
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.setattr(datasets.CIFAR100, "url", "http://127.0.0.1:9/absent")
    archive = root / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:  # another MD5 checksum than the original's
        tar.add(server / "cifar-100-python", "cifar-100-python")
    whole = archive.read_bytes()
    if not writable:  # the tests may run as root, who may write everywhere
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    (server / "cifar-100-python" / "test").write_bytes(pickle.dumps("another"))
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as tar:
        tar.add(server / "cifar-100-python", "cifar-100-python")
    changed = bytearray(whole)
    changed[len(changed) // 2] ^= 255
    for damage in (whole[: len(whole) // 2], b"no archive", bytes(changed), b"", (tmp_path / "other.tar.gz").read_bytes()):
        archive.write_bytes(damage)
        with pytest.raises(DataError, match=r"root/cifar-100-python\.tar\.gz is damaged.*remove or replace it") as error:
            Cifar100(root=str(root)).load(CPU)
        assert "\n" not in str(error.value)
        assert not (root / "cifar-100-python").exists()
    archive.write_bytes(whole)
    train, test = Cifar100(root=str(root)).load(CPU)
    assert torch.equal(train.images.flatten(1), torch.from_numpy(images[:200]))
    assert len(test) == 100
    assert (root / "cifar-100-python").is_dir() == writable
    assert {path.name for path in root.iterdir()} - {"cifar-100-python", ".download.lock"} == {archive.name}


@pytest.mark.slow
@pytest.mark.xdist_group("cifar10")
def test_the_real_archive(cifar10_root: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(cifar10_root / "cifar-10-batches-py", "cifar-10-batches-py")
    _, test = Cifar10(root=str(tmp_path)).load(CPU)
    _, expected = Cifar10(root=str(cifar10_root)).load(CPU)
    assert torch.equal(test.images, expected.images)


ON_CIFAR = ("experiment=quickstart", "data=cifar10", "embedding.patch_size=4", "model.depth=1", "data.train_size=64")
ON_CIFAR += ("data.test_size=50", "trainer.epochs=1", "trainer.compile=false", "trainer.batch_size=32", "hydra.run.dir=run")


@pytest.mark.slow
def test_the_program_names_what_is_wrong_with_an_archive(tmp_path: Path) -> None:
    """A damaged archive, a link to one that is absent, and a damaged folder next to an archive: one line, nothing unpacked."""
    archive = tmp_path / "set" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()

    def refused(*parts: str) -> None:
        done = run_train(tmp_path, *ON_CIFAR, VIX_DATA=str(archive.parent))
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        for part in (*parts, "data.root=DIR", "VIX_DATA=DIR"):
            assert part in done.stderr

    archive.symlink_to(tmp_path / "gone.tar.gz")
    refused(f"error: {archive} is a link to {tmp_path}/gone.tar.gz, which does not exist; ")
    archive.unlink()
    archive.write_bytes(b"no archive")
    refused(f"error: {archive} is damaged (", "remove or replace it")
    assert not (archive.parent / "cifar-10-batches-py").exists()
    (archive.parent / "cifar-10-batches-py").mkdir()
    refused("cifar-10-batches-py is incomplete or damaged (", f"remove that folder to unpack {archive} again")


@pytest.mark.slow
@pytest.mark.xdist_group("cifar10")
def test_the_program_trains_on_the_real_archive(cifar10_root: Path, tmp_path: Path) -> None:
    archive = tmp_path / "set" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(cifar10_root / "cifar-10-batches-py", "cifar-10-batches-py")
    done = run_train(tmp_path, *ON_CIFAR, VIX_DATA=str(archive.parent))
    assert done.returncode == 0, done.stderr
    assert "Unpacking" in done.stdout
    assert {path.name for path in archive.parent.iterdir()} == {"cifar-10-batches-py", ".download.lock", archive.name}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["status"], results["data"]) == ("finished", "cifar10")
