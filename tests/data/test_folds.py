"""Cross-validation by data.folds and data.fold, and class weights in the training loss."""

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, run_train
from omegaconf import DictConfig
from torch import Tensor, nn

from vix.build import parse
from vix.cli.report import HOW_TO_READ_FOLDS, parse_arguments, report
from vix.data.dataset import fold_indices
from vix.data.digits import Digits
from vix.errors import ConfigError, DataError
from vix.training.train_step import mean_loss

Compose = Callable[..., DictConfig]
CPU = torch.device("cpu")


def test_folds_are_a_balanced_partition() -> None:
    """Of 3 classes with 10, 5 and 2 images: every image once, and each class in parts of sizes that differ by at most one."""
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [10, 5, 2]))
    parts = [fold_indices(labels, 4, fold) for fold in range(4)]
    assert sorted(np.concatenate(parts)) == list(range(17))
    counts = np.array([np.bincount(labels[part], minlength=3) for part in parts])
    assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all()
    assert [len(part) for part in parts] == [5, 4, 4, 4]


def test_a_fold_is_evaluated_and_the_others_train() -> None:
    """Of real digits: the evaluated parts are all training images, and never among those that train."""
    whole, _ = Digits().load(CPU)
    everything = {image.tobytes() for image in whole.images.numpy()}
    evaluated: set[bytes] = set()
    for fold in range(5):
        data = Digits(folds=5, fold=fold)
        train, test = data.load(CPU)
        assert (len(train), len(test), data.eval_split) == (data.train_images, data.eval_images, "validation")
        assert len(train) + len(test) == len(whole)
        here = {image.tobytes() for image in test.images.numpy()}
        assert not here & {image.tobytes() for image in train.images.numpy()}
        evaluated |= here
    assert evaluated == everything


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 5}, r"^data\.folds=5: the evaluated fold is not chosen; choose with data\.fold=0 to 4"),
        ({"folds": 5, "fold": 5}, r"^data\.fold=5: there are data\.folds=5 folds"),
        ({"fold": 0}, r"^data\.fold=0: needs data\.folds"),
        ({"folds": 5, "fold": 0, "validation_size": 100}, r"^data\.validation_size=100: a fold is evaluated"),
        ({"folds": 2000, "fold": 0}, r"^data\.folds=2000: there are only 1437 training images"),
        ({"folds": 2, "fold": 0, "test_size": 720}, r"^data\.test_size=720: must be from 10 .* to 719"),
        ({"class_weights": [1.0, 2.0]}, r"^data\.class_weights: has 2 values, but there are 10 classes"),
    ],
)
def test_contradictions_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Digits(**options)


def test_a_class_needs_an_image_to_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Digits(folds=2, fold=0)
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9])
    split = np.zeros((11, 8, 8, 1), dtype=np.uint8), labels
    monkeypatch.setattr(data, "read", lambda: (split, split))
    with pytest.raises(DataError, match=r"^data\.folds=2: takes all 1 training images of class 0; use a larger number"):
        data.load(CPU)


def test_balanced_weights() -> None:
    """Each class has the same total weight, and the mean weight of the images is 1."""
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    data = Digits(class_weights="balanced")
    data.classes = 3
    weights = data.loss_weights(labels)
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    assert Digits().loss_weights(labels) is None
    given = Digits(class_weights=[0.5] * 10).loss_weights(labels)
    assert torch.equal(given, torch.full((10,), 0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_loss(smoothing: float) -> None:
    """Worked out by hand; the same for labels and for probabilities; and the mean of micro-batches, whatever is in them."""
    torch.manual_seed(0)
    model, images = nn.Linear(4, 3).double(), torch.randn(6, 4, dtype=torch.float64)
    labels, weights = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    loss = mean_loss(model, images, labels, smoothing, weights)
    targets = F.one_hot(labels).double() * (1 - smoothing) + smoothing / 3
    by_hand = -(weights * targets * model(images).log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(mean_loss(model, images, F.one_hot(labels).double(), smoothing, weights), by_hand)
    parts = [mean_loss(model, images[i : i + 2], labels[i : i + 2], smoothing, weights) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts, torch.zeros(())) / 3, by_hand)


def test_a_run_trains_with_the_weights(compose_config: Compose) -> None:
    """The step of a run has the weights of its training images."""
    from vix.runs.run import RunDirectory

    experiment = parse(compose_config(*TINY, "data.class_weights=balanced", "trainer.device=cpu"))
    run = RunDirectory(Path(), {}, {})
    seen: list[Tensor | None] = []

    def stop(session: Any) -> None:
        seen.append(session.step.class_weights)

    experiment.trainer.save_checkpoint = stop  # type: ignore[method-assign]
    run.write_results = lambda **_: None  # type: ignore[method-assign]
    model = experiment.build_model()
    session = experiment.trainer.start(model, experiment.build_optimizer, experiment.data, experiment.augmentation, run, 0)
    assert len(seen) == 1
    assert torch.equal(session.step.class_weights, experiment.data.loss_weights(session.train.labels))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_cross_validation_in_the_report(tmp_path: Path) -> None:
    """A sweep over the folds: each run is on other images, and the report averages them in one line that says so."""
    done = run_train(
        tmp_path, "-m", *TINY, "trainer.epochs=1", "data.folds=3", "data.fold=0,1,2", "data.class_weights=balanced"
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/*/*/results.json")]
    assert sorted(run["config"]["data"]["fold"] for run in results) == [0, 1, 2]
    assert {run["tested_on"] for run in results} == {"validation"}
    report(parse_arguments([str(tmp_path / "outputs")]))
    (row,) = csv.DictReader((tmp_path / "outputs" / "report.csv").open())
    assert (row["seeds"], row["folds"]) == ("1", "3")
    assert "data.fold=" not in row["experiment"]
    assert float(row["top1"]) == pytest.approx(statistics.mean(run["top1"] for run in results))
    assert float(row["top1_std"]) == pytest.approx(statistics.stdev(run["top1"] for run in results))
    assert HOW_TO_READ_FOLDS in (tmp_path / "outputs" / "report.md").read_text()
