"""A folder of images: layouts, sizes, damage, and a run that trains on one."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from common import digit_folder
from conftest import TINY, run_train
from omegaconf import DictConfig
from PIL import Image, features
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms import v2

import vix
from vix.build import parse
from vix.data import image_folder
from vix.data.dataset import balanced_subset
from vix.data.image_folder import ImageFolder
from vix.data.loader import Split
from vix.errors import ConfigError, DataError
from vix.reporting.logger import METRICS, LoggedRun
from vix.reporting.tensorboard import TensorBoard
from vix.runs.run import RunDirectory
from vix.training.evaluate import predictions

Compose = Callable[..., DictConfig]
CPU = torch.device("cpu")
DIGITS = load_digits()


def picture(seed: int, size: tuple[int, int] = (8, 8), channels: int = 3) -> np.ndarray:
    """Random pixels (rows, columns, channels); ``size`` is (columns, rows), as Pillow has it."""
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, four training and two test images of each, 8×8 pixels."""
    for split, count in (("train", 4), ("val", 2)):
        for i in range(3 * count):
            write(tmp_path / "set" / split / ("ape", "bee", "cow")[i % 3] / f"{i}.png", picture(100 * count + i))
    return tmp_path / "set"


def test_pixels_and_labels_are_the_files(folder: Path) -> None:
    data = ImageFolder(root=str(folder), image_size=8)
    assert (data.classes, data.class_names, data.sizes, data.channels) == (3, ("ape", "bee", "cow"), (12, 6), 3)
    train, test = data.load(CPU)
    assert (train.images.dtype, train.images.shape, test.images.shape) == (torch.uint8, (12, 3, 8, 8), (6, 3, 8, 8))
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for image, seed in zip(test.images, (200, 203, 201, 204, 202, 205), strict=True):
        assert np.array_equal(image.permute(1, 2, 0), picture(seed))


def test_val_comes_before_test(folder: Path) -> None:
    (folder / "val").rename(folder / "test")
    assert ImageFolder(root=str(folder)).sizes == (12, 6)
    (folder / "val").mkdir()
    for name in ("ape", "bee", "cow"):
        write(folder / "val" / name / "x.png", picture(0))
    assert ImageFolder(root=str(folder)).sizes == (12, 3)


def test_tiny_imagenet_as_distributed(tmp_path: Path) -> None:
    """train/<id>/images/*.JPEG with boxes next to them, a flat val/ with its annotations, a test/ without labels."""
    ids, lines = ("n01443537", "n02085620"), []
    for i, name in enumerate(ids):
        for j in range(3):
            write(tmp_path / "train" / name / "images" / f"{name}_{j}.JPEG", np.full((64, 64, 3), 100 * i + j, np.uint8))
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t10\t63\t58\n")
    for j in range(4):
        write(tmp_path / "val" / "images" / f"val_{j}.JPEG", np.full((64, 64, 3), 10 * j, np.uint8))
        lines.append(f"val_{j}.JPEG\t{ids[j % 2 == 0]}\t0\t32\t44\t62\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    write(tmp_path / "test" / "images" / "test_0.JPEG", picture(0, (64, 64)))
    (tmp_path / "wnids.txt").write_text("\n".join(ids))

    data = ImageFolder(root=str(tmp_path))
    assert (data.image_size, data.class_names, data.sizes) == (64, ids, (6, 4))
    train, test = data.load(CPU)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert test.images[:, 0, 0, 0].tolist() == [10, 30, 0, 20]

    (tmp_path / "val" / "val_annotations.txt").write_text(lines[0] + "val_1.JPEG\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt: line 2 is not"):
        ImageFolder(root=str(tmp_path))
    # Sorted into folders, as many do, with the annotations left behind.
    for j in range(4):
        (tmp_path / "val" / ids[j % 2 == 0]).mkdir(exist_ok=True)
        (tmp_path / "val" / "images" / f"val_{j}.JPEG").rename(tmp_path / "val" / ids[j % 2 == 0] / f"val_{j}.JPEG")
    (tmp_path / "val" / "images").rmdir()
    assert ImageFolder(root=str(tmp_path)).load(CPU)[1].labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("size", [(48, 16), (16, 48), (16, 16), (17, 40), (5, 4)])
def test_the_middle_square_is_resized(folder: Path, size: tuple[int, int]) -> None:
    """Of any shape of image, to the size asked for; torchvision's crop and resize agree but for rounding."""
    pixels = picture(1, size)
    write(folder / "train" / "ape" / "0.png", pixels)
    train, _ = ImageFolder(root=str(folder), image_size=16).load(CPU)
    ours = train.images[0]
    assert ours.shape == (3, 16, 16)
    side = min(size)
    corner = [(s - side) // 2 for s in size]  # exact where the rest is even
    square = Image.fromarray(pixels[corner[1] : corner[1] + side, corner[0] : corner[0] + side])
    expected = v2.functional.pil_to_tensor(v2.functional.resize(square, [16, 16]))
    if all((s - side) % 2 == 0 for s in size):
        assert torch.equal(ours, expected)


def test_a_photograph_stands_upright(folder: Path) -> None:
    pixels = picture(1)
    turned = Image.fromarray(np.rot90(pixels).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn clockwise to show"
    turned.save(folder / "train" / "ape" / "0.png", exif=exif)
    train, _ = ImageFolder(root=str(folder), image_size=8).load(CPU)
    assert np.array_equal(train.images[0].permute(1, 2, 0), pixels)


def test_grey_and_coloured_files_mix(folder: Path) -> None:
    grey = picture(1, channels=1)
    write(folder / "train" / "ape" / "0.png", grey)
    coloured, _ = ImageFolder(root=str(folder), image_size=8).load(CPU)
    assert np.array_equal(coloured.images[0], np.stack([grey] * 3))
    data = ImageFolder(root=str(folder), image_size=8, channels=1)
    train, test = data.load(CPU)
    assert (train.images.shape, test.images.shape) == ((12, 1, 8, 8), (6, 1, 8, 8))
    assert np.array_equal(train.images[0, 0], grey)
    assert np.array_equal(test.images[0, 0], np.asarray(Image.fromarray(picture(200)).convert("L")))


def test_a_subset_is_what_the_whole_would_give(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its files are read, and they are those that every other image set would take."""
    opened = []
    read_image = image_folder.read_image
    monkeypatch.setattr(image_folder, "read_image", lambda path, *shape: (opened.append(path), read_image(path, *shape))[1])
    train, test = ImageFolder(root=str(folder), image_size=8, train_size=6, test_size=3).load(CPU)
    assert len(opened) == 9
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert test.labels.tolist() == [0, 1, 2]
    whole, _ = ImageFolder(root=str(folder), image_size=8).load(CPU)
    assert torch.equal(train.images, whole.images[balanced_subset(whole.labels.numpy(), 6)])
    for options, message in (
        ({"train_size": 13}, r"^data\.train_size=13: must be from 3 \(one image per class\) to 12$"),
        ({"test_size": 2}, r"^data\.test_size=2: must be from 3 .* to 6$"),
    ):
        with pytest.raises(ConfigError, match=message):
            ImageFolder(root=str(folder), **options)


def break_file(folder: Path) -> None:
    path = folder / "val" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:60])


def write_text(folder: Path) -> None:
    (folder / "val" / "bee" / "1.png").write_text("no image")


def write_deep(folder: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(folder / "val" / "bee" / "1.png")


def write_deep_color(folder: Path) -> None:
    """16 bits per channel: Pillow, which cannot write such files, opens them as 8 bits."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + bytes(8 * 3 * 2) for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path = folder / "val" / "bee" / "1.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert Image.open(path).mode == "RGB"


@pytest.mark.parametrize("damage", [break_file, write_text, write_deep, write_deep_color])
def test_a_file_that_is_no_image_is_named(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    with pytest.raises(
        DataError, match=r"set/val/bee/1\.png: cannot be read as an image \(.+\); replace or remove it"
    ) as error:
        ImageFolder(root=str(folder)).load(CPU)
    assert "\n" not in str(error.value)


def test_an_absent_folder_is_refused_with_what_is_expected(folder: Path) -> None:
    (folder / "val").rename(folder / "valid")
    for root, absent in ((folder / "no", folder / "no" / "train"), (folder, f"{folder}/val or {folder}/test")):
        with pytest.raises(ConfigError) as error:
            ImageFolder(root=str(root))
        message = str(error.value)
        assert message.startswith(f"data.root={root}: there is no {absent}; ")
        for part in (f"{root}/train/CLASS/", f"{root}/val/CLASS/", "test/", "VIX_DATA", "data.root=DIR"):
            assert part in message
        assert "\n" not in message


def test_classes_of_one_split_only_are_named(folder: Path) -> None:
    write(folder / "val" / "dog" / "x.png", picture(0))
    with pytest.raises(DataError, match=r"differ in their classes: only .*/set/val has dog; rename or remove"):
        ImageFolder(root=str(folder))
    (folder / "val" / "dog").rename(folder / "train" / "dog")
    with pytest.raises(DataError, match=r"differ in their classes: only .*/set/train has dog; rename or remove"):
        ImageFolder(root=str(folder))
    for i in range(9):
        write(folder / "val" / f"e{i}" / "x.png", picture(0))
    with pytest.raises(DataError, match=r"only .*/set/train has dog; rename or remove"):
        ImageFolder(root=str(folder))
    write(folder / "val" / "dog" / "x.png", picture(0))
    with pytest.raises(DataError, match=r"only .*/set/val has e0, e1, e2, e3, e4 and 4 more; "):
        ImageFolder(root=str(folder))


def test_a_class_without_images_is_named(folder: Path) -> None:
    (folder / "train" / "empty").mkdir()
    with pytest.raises(DataError, match=r"/set/train: no images in the class folders empty; add some, or remove"):
        ImageFolder(root=str(folder))


def test_a_number_of_classes_builds_the_model_without_the_images(compose_config: Compose, folder: Path) -> None:
    small = ("data=imagefolder", "data.image_size=8", "model.dim=16", "attention=softmax", "attention.heads=2")
    model = vix.build_model(compose_config(*small, "data.root=/nonexistent", "data.classes=200"))
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 200)
    data = ImageFolder(root=str(folder), classes=3, image_size=8)
    train, _ = data.load(CPU)
    assert (len(train), data.class_names) == (12, ("ape", "bee", "cow"))
    with pytest.raises(DataError, match=r"^data\.classes=4: .*/set/train has 3 class folders$"):
        ImageFolder(root=str(folder), classes=4).load(CPU)
    with pytest.raises(DataError, match=r"has 12 images in a split of which 13 are requested"):
        ImageFolder(root=str(folder), classes=3, train_size=13).load(CPU)
    with pytest.raises(ConfigError, match=r"^data\.root=/nonexistent: there is no /nonexistent/train"):
        ImageFolder(root="/nonexistent", classes=3).load(CPU)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "levit", "cct", "cvt", "pit"])
@pytest.mark.parametrize(
    ("embedding", "patch_size", "channels"), [("linear", 1, 1), ("conv", 2, 3), ("cct", 4, 3), ("linear", 3, 3)]
)
def test_every_family_takes_a_users_images(
    compose_config: Compose, tmp_path: Path, model: str, embedding: str, patch_size: int, channels: int
) -> None:
    """Images of 20×20 pixels of 7 classes, read from files, through a model of them; 3 does not divide 20."""
    root = digit_folder(tmp_path, classes=7, side=20)
    cfg = compose_config(
        f"model={model}",
        "model.dim=[16,32]" if model == "pit" else "model.dim=16",
        "attention=linformer",
        "attention.heads=2",
        f"embedding={embedding}",
        f"embedding.patch_size={patch_size}",
        "data=imagefolder",
        f"data.root={root}",
        "data.image_size=20",
        f"data.channels={channels}",
        "data.train_size=7",
    )
    if patch_size == 3:
        with pytest.raises(ConfigError, match=r"^embedding\.patch_size=3 does not divide the image size 20; .*: 2, 4$"):
            vix.build_model(cfg)
        return
    built = vix.build_model(cfg).eval()
    train, _ = parse(cfg).data.load(CPU)
    images, _ = next(train.eval_batches(7))
    assert images.shape == (7, channels, 20, 20)
    logits = built(images)
    assert logits.shape == (7, 7)
    assert logits.isfinite().all()


def test_a_run_learns_a_users_images(tmp_path: Path) -> None:
    """``python train.py data=imagefolder``: seven digits as 12×12 colour PNGs in train/ and test/."""
    root = digit_folder(tmp_path / "digits", classes=7, side=12)
    done = run_train(
        tmp_path,
        *TINY[:4],
        "data=imagefolder",
        "data.image_size=12",
        "embedding.patch_size=2",
        "trainer.batch_size=20",
        "trainer.epochs=8",
        "trainer.precision=fp32",
        "optimizer.lr=3e-3",
        VIX_DATA=str(root),
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("outputs/*/*/results.json")
    results = json.loads(path.read_text())
    assert (results["status"], results["data"]) == ("finished", "imagefolder")
    assert results["config"]["data"]["channels"] == 3
    assert results["top1"] > 50  # by chance: 14 %


def test_refused_in_one_line_and_nothing_left_behind(tmp_path: Path) -> None:
    done = run_train(tmp_path, "data=imagefolder", VIX_DATA=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: data.root={tmp_path}: there is no {tmp_path}/train; ")
    assert not list(tmp_path.glob("outputs/*/*"))


@pytest.mark.slow
def test_relative_paths_are_those_of_the_command_with_chdir(tmp_path: Path) -> None:
    """Hydra then makes the run's directory the current one."""
    digit_folder(tmp_path / "digits", classes=3, side=8)
    common = (*TINY, "data=imagefolder", "data.image_size=8", "data.channels=1", "data.root=digits", "data.train_size=null")
    common = (*common, "data.test_size=null", "hydra.job.chdir=true")
    assert run_train(tmp_path, *common, "hydra.run.dir=a").returncode == 0
    done = run_train(tmp_path, *common, "hydra.run.dir=b", "trainer.init_from=a")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "b/results.json").read_text())["init_weights"]
    assert json.loads((tmp_path / "b/results.json").read_text())["config"]["data"]["root"] == str(tmp_path / "digits")


def test_what_systems_leave_behind_is_skipped_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Hidden and system entries are neither classes nor images; other files are counted by their endings."""
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        write(folder / "train" / name / "0.png", picture(0))
        write(folder / "val" / "ape" / name / "0.png", picture(0))
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):
        (folder / "train" / name).write_text("x")
        (folder / "train" / "ape" / name).write_text("x")
    for name in ("notes.txt", "more.TXT", "labels.csv", "README"):
        (folder / "train" / "bee" / name).write_text("x")
    (folder / "val" / "loose.png").write_bytes((folder / "val" / "ape" / "0.png").read_bytes())
    with caplog.at_level("INFO"):
        data = ImageFolder(root=str(folder), image_size=8)
        assert caplog.messages == []  # the model is built more than once; the images are read once
        train, test = data.load(CPU)
    assert (data.class_names, len(train), len(test)) == (("ape", "bee", "cow"), 12, 6)
    skipped, left_out = caplog.messages[:2]
    assert skipped.startswith("Skipped hidden and system entries in ")
    for part in (".ipynb_checkpoints (2)", "__MACOSX (2)", "@eaDir (2)", "Thumbs.db (2)", "._* (2)"):
        assert part in skipped
    assert left_out.startswith("Left out 5 files in ")
    assert all(part in left_out for part in (".txt (2)", ".csv (1)", "no extension (1)", "outside of the class folders (1)"))


def test_every_image_that_pillow_reads(tmp_path: Path) -> None:
    endings = ["jfif", "JPG", "Png", "gif", "webp", "bmp", "tif", "ppm", "tga", "jp2"]
    endings += ["avif"] if features.check("avif") else []
    for ending in endings:
        for split in ("train", "val"):
            path = tmp_path / split / "a" / f"x.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(path, format={"jfif": "JPEG"}.get(ending))
    (tmp_path / "train" / "a" / "film.mpg").write_bytes(b"\x00\x00\x01\xb3")  # which Pillow knows, but cannot read
    (tmp_path / "train" / "a" / "paper.pdf").write_text("%PDF")  # which Pillow can only write
    train, test = ImageFolder(root=str(tmp_path), image_size=8).load(CPU)
    assert (len(train), len(test)) == (len(endings), len(endings))
    assert (train.images.float() - 200).abs().max() < 5


@pytest.mark.parametrize("below", ["", "train"])
def test_one_folder_of_classes(folder: Path, tmp_path: Path, below: str) -> None:
    """Without val/ or test/, images of root/CLASS or root/train/CLASS are kept for testing; one of each class still trains."""
    root = tmp_path / "one"
    root.mkdir()
    (folder / "train").rename(root / below)
    for options in ({}, {"classes": 3}):
        with pytest.raises(
            ConfigError, match=r"^data\.root=.*/one: there is no .*/one/.*data\.validation_size=N, which holds out N"
        ):
            ImageFolder(root=str(root), **options).load(CPU)
        data = ImageFolder(root=str(root), image_size=8, validation_size=6, **options)
        train, test = data.load(CPU)
        assert data.class_names == ("ape", "bee", "cow")
        assert data.eval_split == "validation"
        assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    class_folder = root / below / "ape"
    for path in sorted(class_folder.iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match=r"^data\.validation_size=3: takes all 1 training images of class ape; "):
        ImageFolder(root=str(root), image_size=8, validation_size=3).load(CPU)


def test_the_program_on_one_folder_as_it_is(tmp_path: Path) -> None:
    """Refused without data.validation_size, which the line names; with it the log counts what is skipped and left out."""
    root = tmp_path / "set"
    for k, name in enumerate(("ape", "bee")):
        for i in range(8):
            write(root / name / f"{i}.PNG", picture(8 * k + i))
        Image.fromarray(picture(k)).save(root / name / "photo.jfif", format="JPEG")
        (root / name / "notes.txt").write_text("x")
        (root / name / "Thumbs.db").write_text("x")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        write(root / name / "0.png", picture(0))
    (root / ".DS_Store").write_text("x")
    small = (*TINY[:4], "data=imagefolder", "data.image_size=8", "embedding.patch_size=2", "trainer.batch_size=4")
    command = (*small, "trainer.epochs=1", "hydra.run.dir=run")
    done = run_train(tmp_path, *command, VIX_DATA=str(root))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: data.root={root}: there is no {root}/train; ")
    assert "data.validation_size=N" in done.stderr
    done = run_train(tmp_path, *command, "data.validation_size=6", VIX_DATA=str(root))
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run" / "train.log").read_text()
    skipped = next(line for line in log.splitlines() if "Skipped hidden and system entries" in line)
    for part in (".DS_Store (1)", ".ipynb_checkpoints (1)", "__MACOSX (1)", "Thumbs.db (2)"):
        assert part in skipped
    assert "that are not images: .txt (2)" in log
    for count in (12, 6):  # 9 of each class: 8 .PNG and a .jfif
        assert f"Reading {count} images" in log


def test_classes_may_be_called_train_and_test(tmp_path: Path) -> None:
    for name in ("car", "test", "train"):
        for i in range(3):
            write(tmp_path / name / f"{i}.png", picture(i))
    assert ImageFolder(root=str(tmp_path), validation_size=3).class_names == ("car", "test", "train")


def test_links_are_followed_once_and_broken_ones_are_named(folder: Path, tmp_path: Path) -> None:
    whole = ImageFolder(root=str(folder)).sizes
    (folder / "train" / "ape" / "round").symlink_to("..")
    (folder / "train" / "ape" / "itself").symlink_to("itself.png")
    (folder / "train" / "ape" / "itself.png").symlink_to("itself")
    with pytest.raises(DataError, match=r"/train/ape/itself: a link to itself\.png, which does not exist; "):
        ImageFolder(root=str(folder))
    (folder / "train" / "ape" / "itself").unlink()
    (folder / "train" / "ape" / "itself.png").unlink()
    (folder / "train" / "ape" / "round").unlink()
    (folder / "train" / "ape" / "here").symlink_to(".")
    assert ImageFolder(root=str(folder)).sizes == whole
    (folder / "train" / "bee").rename(tmp_path / "elsewhere")
    (folder / "train" / "bee").symlink_to(tmp_path / "elsewhere")
    assert ImageFolder(root=str(folder)).sizes == whole
    (tmp_path / "elsewhere" / "x.png").symlink_to("gone.png")
    with pytest.raises(DataError, match=r"/train/bee/x\.png: cannot be read as an image \(.*No such file"):
        ImageFolder(root=str(folder)).load(CPU)
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"/train/bee: a link to .*/elsewhere, which does not exist; "):
        ImageFolder(root=str(folder))


@pytest.mark.parametrize(("classes", "images"), [(1, 1), (1, 3), (2, 1), (6, 1)])
def test_the_end_of_a_small_set(tmp_path: Path, classes: int, images: int) -> None:
    """One class, or one test image of each, and of one class: confusion matrix, worst images and attention are all there."""
    names = [f"class {k}" for k in range(classes)]
    data = Split(torch.zeros(classes * images, 3, 8, 8, dtype=torch.uint8), torch.arange(classes).repeat(images))
    few = Split(data.images[:1], data.labels[:1])
    for number, test in enumerate((data, few)):
        directory = tmp_path / str(number)
        directory.mkdir()
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, classes))
        results = {**dict.fromkeys(METRICS, 1.0), "epochs": 1}
        with TensorBoard(LoggedRun(RunDirectory(directory, {}, {}), 1, model, test, names, False)) as board:
            predicted = predictions(model, test.eval_batches(2), torch.autocast("cpu", enabled=False))
            board.finish(results, predicted.loss, predicted.top[:, 0])
        events = EventAccumulator(str(directory)).Reload()
        assert events.Tags()["images"] == ["test/confusion_matrix", "test/worst_images"]


@pytest.mark.slow
def test_a_run_on_one_image_of_one_class(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / "set" / split / "only" / "0.png", picture(0))
    small = ("data=imagefolder", "data.image_size=8", "embedding.patch_size=2", "trainer.epochs=1")
    done = run_train(tmp_path, *TINY[:4], *small, "trainer.batch_size=4", "hydra.run.dir=run", VIX_DATA=str(tmp_path / "set"))
    assert done.returncode == 0, done.stderr
    assert "TensorBoard lacks" not in done.stdout
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert len(events.Tags()["images"]) == 3


def test_a_last_batch_that_is_too_small_is_refused_although_the_classes_are_given(tmp_path: Path) -> None:
    root = digit_folder(tmp_path / "digits", classes=2, side=8)  # 40 training images
    given = ("experiment=levit_pyramid", "data=imagefolder", "data.image_size=8", "data.classes=2", "trainer.batch_size=39")
    done = run_train(tmp_path, *given, VIX_DATA=str(root))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: trainer.batch_size=39: of 40 training images some step would compute 1 image at a time" in done.stderr
