"""vix evaluate and vix predict apply the models of real runs: the figures are the runs' own, wherever the images are."""

import csv
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import digit_folder
from conftest import ROOT, TINY, run_train
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import nn

import vix
from vix.analysis.trained_run import evaluate, load_trained_run, predict
from vix.composition.command import Flags
from vix.data.digits import Digits
from vix.data.image_folder import ImageFolder
from vix.errors import UserError

FIGURES = ("top1", "top5", "test_loss", "class_accuracy")
# In a precision that must be the run's own, with a learning rate at which accuracy goes up and down.
DIGITS = (*TINY, "trainer.epochs=4", "optimizer.lr=0.5", "trainer.precision=bf16", "trainer.eval_batch_size=7")


def command(directory: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """``python -m vix ARGUMENTS`` in a directory."""
    return run_train(directory, *arguments, program=ROOT / "vix" / "__main__.py", **env)


def train(directory: Path, *arguments: str) -> dict[str, Any]:
    """A real run in ``directory``/run; its results."""
    done = run_train(directory, *arguments, "hydra.run.dir=run", "trainer.compile=false")
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads((directory / "run/results.json").read_text())
    return results


@pytest.mark.slow
def test_the_figures_are_those_of_the_run(tmp_path: Path) -> None:
    """For the last and the best weights, to the last digit; the confusion matrix counts what the model predicts."""
    runs = (train(tmp_path, *DIGITS, f"seed={seed}", "rerun=true") for seed in range(5))
    results = next(run for run in runs if run["best_epoch"] < run["epochs"])
    done = command(tmp_path, "evaluate", "run", "--json")
    assert done.returncode == 0, done.stderr
    (last,) = json.loads(done.stdout)
    best = evaluate(load_trained_run(tmp_path / "run", "best"))
    for found, before, epoch in ((last, "", results["epochs"]), (best, "best_", results["best_epoch"])):
        assert {key: found[key] for key in FIGURES} == {key: results[before + key] for key in FIGURES}
        assert (found["epoch"], found["test_images"], found["image_set"]) == (epoch, 50, "digits")

    data = Digits(train_size=100, test_size=50)
    _, test = data.load(torch.device("cpu"))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model = vix.load_model(tmp_path / "run")
        predicted = torch.cat([model(images).argmax(dim=1) for images, _ in test.eval_batches(7)])
    assert last["confusion_matrix"] == confusion_matrix(test.labels, predicted).tolist()
    assert last["class_names"] == list(data.class_names)


def test_mirror_images_are_evaluated_too(tmp_path: Path) -> None:
    """With ``trainer.mirror_eval`` the run's own figures, and those of evaluate and predict, are of the mean of both logits."""
    results = train(tmp_path, *TINY, "trainer.mirror_eval=true", "trainer.precision=fp32", "trainer.epochs=2")
    _, test = Digits(train_size=100, test_size=50).load(torch.device("cpu"))
    model = vix.load_model(tmp_path / "run")
    with torch.no_grad():
        plain_BK, mirrored_BK = (
            torch.cat([model(change(images)) for images, _ in test.eval_batches(256)])
            for change in (lambda images: images, lambda images: images.flip(3))
        )
    mean_BK = (plain_BK + mirrored_BK) / 2
    assert not torch.allclose(plain_BK, mirrored_BK)
    assert results["test_loss"] == pytest.approx(nn.functional.cross_entropy(mean_BK, test.labels).item(), rel=1e-5)
    assert results["top1"] == pytest.approx(100 * (mean_BK.argmax(dim=1) == test.labels).float().mean().item())
    own, without = (
        evaluate(load_trained_run(tmp_path / "run", "last", overrides)) for overrides in ((), ["trainer.mirror_eval=false"])
    )
    assert own["test_loss"] == results["test_loss"]
    assert without["test_loss"] == pytest.approx(nn.functional.cross_entropy(plain_BK, test.labels).item(), rel=1e-5)

    Image.fromarray(test.images[0, 0].numpy()).save(tmp_path / "digit.png")
    (prediction,) = predict(load_trained_run(tmp_path / "run", "last"), [str(tmp_path / "digit.png")])
    values = dict(prediction.classes)
    softmax = dict(zip(Digits().class_names, mean_BK[0].softmax(dim=0).tolist(), strict=True))
    assert values == {name: pytest.approx(softmax[name], rel=1e-4) for name in values}
    assert len(values) == 5


# Three classes of digits as image files, center-cropped; half of the training images are held out.
FOLDER = (
    *("model=vit", "attention=softmax", "embedding=linear", "data=imagefolder", "data.image_size=8", "data.channels=1"),
    *("model.dim=16", "model.depth=1", "attention.heads=2", "embedding.patch_size=2", "trainer.epochs=3", "optimizer.lr=0.01"),
    *("trainer.batch_size=8", "trainer.precision=fp32", "data.root=digits"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on validation images of an image folder, which also has test images, and a run on the digits of scikit-learn."""
    directory = tmp_path_factory.mktemp("folder")
    digit_folder(directory / "digits", classes=3, side=8)
    train(directory, *FOLDER, "data.validation_size=12")
    (directory / "run").rename(directory / "held out")
    train(directory, *FOLDER)
    return directory


@pytest.mark.slow
def test_splits_and_other_images(folder: Path, tmp_path: Path) -> None:
    """The run's own split by default; the test images; a folder without training images, whose classes are in another order."""
    results = json.loads((folder / "held out/results.json").read_text())
    done = command(folder, "evaluate", "held out", "run", "--csv")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["run"], row["tested_on"], row["class"]) for row in rows[::3]] == [
        ("held out", "validation", "digit 0"),
        ("run", "test", "digit 0"),
    ]
    assert {float(row["test_loss"]) for row in rows[:3]} == {results["test_loss"]}
    assert [float(row["class_accuracy"]) for row in rows[:3]] == results["class_accuracy"]
    assert all(sum(int(row[f"predicted/digit {k}"]) for k in range(3)) == 4 for row in rows)

    done = command(folder, "evaluate", "held out", "--split", "test", "--json")
    (test,) = json.loads(done.stdout)
    assert (test["tested_on"], test["test_images"]) == ("test", 12)

    # The same images elsewhere, with names that sort otherwise.
    names = {"digit 0": "z", "digit 1": "y", "digit 2": "x"}
    for name, other in names.items():
        for file in (folder / "digits/test" / name).iterdir():
            path = tmp_path / "elsewhere" / other / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, path)
    done = command(folder, "evaluate", "run", f"data.root={tmp_path / 'elsewhere'}")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: data: the classes are not those of run: only the run has digit 0, digit 1, digit 2"
    ]
    checkpoint = torch.load(folder / "run/checkpoint.pt", weights_only=True)
    checkpoint["results"]["class_names"] = list(names.values())
    (tmp_path / "renamed").mkdir()
    torch.save(checkpoint, tmp_path / "renamed/checkpoint.pt")
    shutil.copy(folder / "run/results.json", tmp_path / "renamed")
    own = evaluate(load_trained_run(folder / "run", "last", [f"data.root={folder / 'digits'}"]))
    other_set = evaluate(
        load_trained_run(tmp_path / "renamed", "last", ["data=imagefolder", f"data.root={tmp_path / 'elsewhere'}"])
    )
    assert other_set["class_names"] == ["z", "y", "x"]
    assert other_set["confusion_matrix"] == own["confusion_matrix"]

    done = command(folder, "evaluate", "run", "held out")
    assert f"{results['top1']:.2f}" in done.stdout
    assert "Predicted classes: held out, last weights" in done.stdout


@pytest.mark.slow
def test_a_run_that_held_out_a_fold(tmp_path: Path) -> None:
    """The fold and the test images are two things; the other folds are what it was trained on."""
    folds = ("data.train_size=null", "data.test_size=null", "data.folds=5", "data.fold=0", "trainer.epochs=1")
    results = train(tmp_path, *TINY, *folds)

    def evaluated(split: Any, *overrides: str) -> dict[str, Any]:
        return evaluate(load_trained_run(tmp_path / "run", "last", overrides), split)

    for split in (None, "validation"):
        fold = evaluated(split)
        assert (fold["tested_on"], fold["test_images"], fold["top1"]) == ("validation", 288, results["top1"])
    test = evaluated("test")
    assert (test["tested_on"], test["test_images"]) == ("test", 360)
    with pytest.raises(UserError, match=r"^data.folds=5, data.fold=1: .* held out data.folds=5, data.fold=0, and"):
        evaluated(None, "data.fold=1")

    shutil.rmtree(tmp_path / "run")
    train(tmp_path, *TINY, "data.validation_size=100", "data.test_size=50", "trainer.epochs=1")
    sizes = [evaluated(*arguments)["test_images"] for arguments in ((None,), ("test",), ("test", "data.test_size=20"))]
    assert sizes == [50, 360, 20]  # 50 of the validation images; all test images


@pytest.mark.slow
def test_a_folder_without_test_images_has_none_elsewhere(tmp_path: Path) -> None:
    """All but the fold are training images of the run, also where its folder has been copied to."""
    digit_folder(tmp_path / "digits", classes=3, side=8)
    root = tmp_path / "images"
    (tmp_path / "digits/train").rename(root)
    train(tmp_path, *FOLDER, f"data.root={root}", "data.folds=3", "data.fold=0")
    copied = shutil.copytree(root, tmp_path / "copied")
    for overrides in ([f"data.root={copied}"], ["data=imagefolder", f"data.root={copied}"]):
        with pytest.raises(UserError, match=r"^data\.root=.*/copied: there is no "):
            evaluate(load_trained_run(tmp_path / "run", "last", overrides), "test")
    fold = evaluate(load_trained_run(tmp_path / "run", "last", [f"data.root={copied}"]))
    assert fold == {**evaluate(load_trained_run(tmp_path / "run", "last")), "run": fold["run"]}
    assert fold["tested_on"] == "validation"


@pytest.mark.slow
def test_what_cannot_be_evaluated(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one line with the cause; the other runs are evaluated."""
    monkeypatch.chdir(folder)
    refused = {
        ("run", "validation"): "--split validation: run held out no validation images; use --split test",
        ("held out", "validation", "data.validation_size=6"): "held out data.validation_size=12, and was trained",
        ("run", None, "data=digits"): "data: digits has 10 classes, but the model of run has 3",
        ("run", None, "data=cifar10"): "data: cifar10 has 32 pixels a side, but the model of run has 8",
        ("run", None, "data.rot=x"): "data.rot: ",
        ("run", None, "data.root=nowhere"): f"data.root=nowhere: there is no {folder}/nowhere/",
        ("run", None, "trainer.device=cuda:9"): "trainer.device=cuda:9",
        ("nowhere", None): "there is no nowhere/checkpoint.pt: pass the directory of a run",
    }
    for (run, split, *overrides), message in refused.items():
        with pytest.raises(UserError) as caught:
            evaluate(load_trained_run(Path(str(run)), "last", list(map(str, overrides))), split)  # type: ignore[arg-type]
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    (tmp_path / "begun").mkdir()
    torch.save({**checkpoint, "best_model": {}}, tmp_path / "begun/checkpoint.pt")
    (tmp_path / "lost").mkdir()
    shutil.copy("run/results.json", tmp_path / "lost")
    done = command(folder, "evaluate", str(tmp_path / "begun"), "run", str(tmp_path / "lost"), "--weights", "best", "--json")
    assert done.returncode == 1
    assert [row["run"] for row in json.loads(done.stdout)] == ["run"]
    begun, lost = done.stderr.splitlines()
    assert "contains no best weights, because no epoch is finished" in begun
    assert "the run's checkpoint is missing" in lost
    for arguments, message in (
        (("run", "model.dim=3"), "model.dim: cannot be set for a trained model"),
        (("run", "data.root=a,b"), "has several values; use one"),
        (("run", "data=imagefolders"), "data=imagefolders: conf/data/ has no such file; nearest: imagefolder"),
        (("trainer.device=cpu",), "RUN: pass the directory of a run"),
    ):
        done = command(folder, "evaluate", *arguments)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert message in line

    # Images that the run was not evaluated on, unless that is asked for.
    shutil.copytree("digits", tmp_path / "digits")
    (tmp_path / "digits/test/digit 0/20.png").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data\.root=digits: contains other images"):
        evaluate(load_trained_run(folder / "run", "last"))
    assert evaluate(load_trained_run(folder / "run", "last", ["data.root=digits"]))["test_images"] == 11
    (tmp_path / "mine/data").mkdir(parents=True)
    shutil.copy(ROOT / "conf/data/imagefolder.yaml", tmp_path / "mine/data/own.yaml")
    own = load_trained_run(folder / "run", "last", ["data=own", "data.root=digits"], Flags(str(tmp_path / "mine")))
    assert evaluate(own)["test_images"] == 11
    done = command(folder, "evaluate", "run", "data=own", f"data.root={tmp_path}/digits", "-cd", f"{tmp_path}/mine", "--json")
    assert json.loads(done.stdout)[0]["test_images"] == 11


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")


@pytest.mark.slow
def test_predictions_of_files(folder: Path, tmp_path: Path) -> None:
    """As in the evaluation; images of every size and mode; what cannot be read is named, and the others are predicted."""
    results = json.loads((folder / "run/results.json").read_text())
    done = command(folder, "predict", "run", "digits/test", "trainer.eval_batch_size=5")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["file"] for row in rows] == sorted(str(p.relative_to(folder)) for p in folder.glob("digits/test/*/*.png"))
    assert 100 * np.mean([row["class"] in row["file"] for row in rows]) == pytest.approx(results["top1"])
    for row in rows:
        probabilities = [float(row[key]) for key in ("probability", "probability_1", "probability_2")]
        assert sum(probabilities) == pytest.approx(1, abs=2e-6)
        assert probabilities == sorted(probabilities, reverse=True)
        assert {row["class"], row["class_1"], row["class_2"]} == {f"digit {k}" for k in range(3)}
    model, file = vix.load_model(folder / "run"), rows[0]["file"]
    _, test = ImageFolder(root=str(folder / "digits"), image_size=8, channels=1).load(torch.device("cpu"))
    with torch.no_grad():
        expected = model(next(test.eval_batches(1))[0]).softmax(dim=1).max().item()
    assert float(rows[0]["probability"]) == pytest.approx(expected, abs=1e-5), file

    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for i, mode in enumerate(MODES):
        Image.fromarray(pixels).convert(mode).resize((1 + 37 * i, 900 // (i + 1))).save(images / f"{mode}.tiff")
    (images / "damaged.png").write_bytes(b"not a picture")
    (images / "notes.txt").write_text("no image")
    (images / "empty").mkdir()
    done = command(folder, "predict", "run", str(images), "missing.png", str(images / "empty"), "--weights", "best")
    assert done.returncode == 1
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert {Path(row["file"]).stem for row in rows} == set(MODES)
    errors = done.stderr.splitlines()
    assert len(errors) == 3
    assert "empty: contains no images" in errors[0]
    assert "damaged.png: cannot be read as an image" in errors[1]
    assert "missing.png" in errors[2]
    for arguments, message in ((("run",), "required: PATH"), (("run", "data.root=x", "y"), "data.root: cannot be set")):
        assert message in command(folder, "predict", *arguments).stderr


@pytest.mark.slow
def test_ten_thousand_files_take_no_more_memory(folder: Path, tmp_path: Path) -> None:
    """Each would take 3 MB decoded, and 12 kB at the size of the model: 120 MB in all."""
    large = (*FOLDER, "data.image_size=64", "data.channels=3", "embedding.patch_size=32", "data.root=" + str(folder / "digits"))
    train(tmp_path, *large)
    (tmp_path / "images").mkdir()
    picture = tmp_path / "picture.bmp"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(picture)
    peaks = []
    for count in (500, 10_000):
        for i in range(count):
            path = tmp_path / "images" / f"{i}.bmp"
            if not path.exists():
                os.link(picture, path)
        run_file = tmp_path / "measured.py"
        run_file.write_text(
            "import sys\nfrom vix.__main__ import main\nfrom vix.system.memory import STATUS\ntry:\n    main()\nfinally:\n"
            "    print(next(line for line in STATUS.read_text().splitlines() if 'VmHWM' in line), file=sys.stderr)\n"
        )
        done = run_train(tmp_path, "predict", "run", "images", program=run_file)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == count + 1
        peaks.append(int(done.stderr.split()[1]))
    assert peaks[1] - peaks[0] < 40_000  # kB
