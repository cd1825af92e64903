"""data=arrays: images and labels in one .npz file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, run_train
from sklearn.datasets import load_digits

import vix
from vix.analysis.trained_run import evaluate, load_trained_run
from vix.data.arrays import Arrays
from vix.errors import ConfigError, DataError, UserError


def digits(**changes: Any) -> dict[str, Any]:
    """The arrays of scikit-learn's digits, the last 297 for the test."""
    source = load_digits()
    images, labels = (source.images * 15).astype(np.uint8), source.target
    parts = {"images": images[:1500], "labels": labels[:1500], "test_images": images[1500:], "test_labels": labels[1500:]}
    return {name: array for name, array in (parts | changes).items() if array is not None}


def written(path: Path, **changes: Any) -> str:
    np.savez_compressed(path, **digits(**changes))
    return str(path)


def gray(root: str, **options: Any) -> Arrays:
    return Arrays(root=root, image_size=8, channels=1, **options)


def test_what_is_read(tmp_path: Path) -> None:
    """Gray images without a channel axis, class names, and both splits."""
    expected = digits()
    data = gray(written(tmp_path / "x.npz", class_names=[f"digit {i}" for i in range(10)]))
    assert (data.classes, data.class_names[3], data.sizes) == (10, "digit 3", (1500, 297))
    train, test = data.load(torch.device("cpu"))
    np.testing.assert_array_equal(train.images[:, 0].numpy(), expected["images"])
    np.testing.assert_array_equal(test.labels.numpy(), expected["test_labels"])
    without = gray(written(tmp_path / "y.npz", test_images=None, test_labels=None), validation_size=100)
    assert [len(split) for split in without.load(torch.device("cpu"))] == [1400, 100]
    assert without.class_names == tuple("0123456789")


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint64"])
def test_integers_of_every_kind_are_labels(tmp_path: Path, dtype: str) -> None:
    labels = digits()["labels"].astype(dtype)
    data = gray(written(tmp_path / "x.npz", labels=labels))
    assert data.classes == 10
    np.testing.assert_array_equal(data.load(torch.device("cpu"))[0].labels.numpy(), labels)


def test_identity_is_the_content(tmp_path: Path) -> None:
    """A copy elsewhere is the same set; one changed label, in a file of the same size, is another."""
    labels = digits()["labels"]
    labels[0] = (labels[0] + 1) % 10
    files = [tmp_path / name for name in ("a.npz", "b.npz", "c.npz")]
    for path, changes in zip(files, ({}, {}, {"labels": labels}), strict=True):
        np.savez(path, **digits(**changes))
    assert files[0].stat().st_size == files[2].stat().st_size
    sets = [gray(str(path)).image_set for path in files]
    assert sets[0] == sets[1] != sets[2]
    assert sets[0].endswith("(10 classes, 1,500 training and 297 test images)")


def test_a_model_is_built_without_the_file() -> None:
    data = Arrays(root="/nonexistent.npz", classes=7)
    assert data.classes == 7
    with pytest.raises(UserError, match="no such file"):
        data.load(torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, r"contains no array 'images', only labels, test_images, test_labels"),
        ({"test_labels": None}, r"contains one of test_images and test_labels"),
        ({"test_images": None, "test_labels": None}, r"^data\.root=.*: contains no test_images; .* data\.validation_size=N"),
        ({"images": np.zeros((1500, 8, 8))}, r"images is float64 \(1500, 8, 8\), but must be uint8"),
        ({"images": np.zeros((1500, 8, 9), np.uint8)}, r"images is uint8 \(1500, 8, 9\), but must be"),
        ({"images": np.zeros((1500, 9, 9), np.uint8)}, r"^data\.image_size=8: images of .* have 9; use data\.image_size=9"),
        ({"images": np.zeros((1500, 8, 8, 3), np.uint8)}, r"^data\.channels=1: images of .* have 3; use data\.channels=3"),
        ({"labels": np.zeros(1500)}, r"labels is float64 \(1500,\), but must be 1500 integers"),
        ({"labels": np.zeros(3, int)}, r"labels is int64 \(3,\), but must be 1500 integers"),
        ({"labels": np.full(1500, -1)}, r"the labels of 1500 images are -1 to -1; number them from 0$"),
        ({"class_names": ["a", "b"]}, r"the labels are 0 to 9, but there are 2 class names"),
        ({"class_names": [*"abcdefghia"]}, r"class_names contains 'a' more than once; rename the classes$"),
        ({"class_names": np.array("a")}, r"class_names is <U1 \(\), but must be a list of texts"),
        (
            {"class_names": [name.encode() for name in "abcdefghij"]},
            r"class_names is \|S1 \(10,\), but must be a list of texts",
        ),
        ({"labels": np.arange(1500) * 10**12}, r"the labels of 1500 images are 0 to 1499\d+; number them from 0$"),
        ({"labels": np.full(1500, 2**64 - 1, np.uint64)}, r"the labels of 1500 images are 18446744073709551615 to"),
        (
            {"test_images": np.zeros((0, 8, 8), np.uint8), "test_labels": np.zeros(0, int)},
            r"test_images contains no images; .* out",
        ),
    ],
)
def test_a_file_that_does_not_suit_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        gray(written(tmp_path / "x.npz", **changes))
    assert "\n" not in str(refused.value)


def test_no_npz_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.root=.*: no such file; set the path of an \.npz file"):
        gray(str(tmp_path / "x.npz"))
    (tmp_path / "x.npz").write_text("text")
    with pytest.raises(DataError, match=r"is not a readable \.npz file \(File is not a zip file\); write it with numpy\.savez"):
        gray(str(tmp_path / "x.npz"))
    whole = Path(written(tmp_path / "y.npz")).read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is not a readable"):
        gray(str(tmp_path / "x.npz"))
    with pytest.raises(DataError, match=r"class_names is object \(10,\), but must be a list of texts"):
        gray(written(tmp_path / "code.npz", class_names=np.array([{}] * 10, dtype=object)))


def test_labels_with_gaps_are_named(tmp_path: Path) -> None:
    labels = digits()["labels"]
    path = written(tmp_path / "x.npz", labels=np.where(labels == 3, 4, labels))
    with pytest.raises(
        DataError, match=r"x\.npz: the training labels are not 0 to 9, each with images \(wrong: 3\): the files"
    ):
        gray(path).load(torch.device("cpu"))


@pytest.mark.slow
def test_a_run(tmp_path: Path) -> None:
    """From the command line; the directory's name contains the digest of the content, and the model loads without the file."""
    path = written(tmp_path / "x.npz")
    own = (f"data.root={path}", "data.image_size=8", "data.channels=1")
    done = run_train(tmp_path, *TINY, "trainer.epochs=1", "data=arrays", *own)
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.glob("outputs/*/*/results.json")
    results = json.loads(found.read_text())
    assert f"images={gray(path).digest[:8]}" in found.parts[-3]
    assert results["image_set"] == gray(path).image_set
    Path(path).unlink()
    assert vix.load_model(found.parent)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.slow
def test_a_run_is_evaluated_on_the_test_images_of_another_file(tmp_path: Path) -> None:
    """Whatever images of its own it held out."""
    root, labels = written(tmp_path / "x.npz"), digits()["labels"]
    few = {"images": digits()["images"][:20], "labels": labels[:20]}
    other = written(tmp_path / "other.npz", **few)
    data = ("data=arrays", f"data.root={root}", "data.image_size=8", "data.channels=1", "data.train_size=null")
    for held_out in (["data.folds=3", "data.fold=0"], ["data.validation_size=30"]):
        run = (*TINY, *data, "data.test_size=null", "trainer.epochs=1", *held_out, "hydra.run.dir=run", "rerun=true")
        done = run_train(tmp_path, *run)
        assert done.returncode == 0, done.stderr
        found = evaluate(load_trained_run(tmp_path / "run", "last", [f"data.root={other}"]))
        assert (found["tested_on"], found["test_images"]) == ("test", 297)


def test_folds_of_a_set_whose_sizes_are_read_later(tmp_path: Path) -> None:
    """A fold without images is refused, not replaced by the test images, which need not have images of all classes then."""
    few = digits()["labels"][:20]
    root = written(tmp_path / "x.npz", images=digits()["images"][:20], labels=few)
    data = gray(root, classes=10, folds=30, fold=25)
    with pytest.raises(DataError, match=r"^data\.folds=30: there are only 20 training images$"):
        data.load(torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"^data\.folds=30: there are only 20 training images$"):
        _ = data.eval_images
    one_class = {"test_images": digits()["test_images"][:1], "test_labels": digits()["test_labels"][:1]}
    root = written(tmp_path / "y.npz", **one_class)
    train, evaluated = gray(root, classes=10, folds=3, fold=1).load(torch.device("cpu"))
    assert (len(train), len(evaluated)) == (1000, 500)
    with pytest.raises(DataError, match="the test labels are not 0 to 9"):
        gray(root, classes=10).load(torch.device("cpu"))
