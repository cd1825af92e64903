"""A sweep as TensorBoard shows it: through the HTTP interface of a server that is started for it."""

import io
import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import fit
from conftest import HANGS, TINY, run_train
from forked import Forked, shift_clock
from matplotlib.image import imread
from omegaconf import DictConfig, OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vix
from vix.attention.inspection import softmax_error
from vix.build import parse
from vix.reporting import images as pictures
from vix.reporting.logger import METRICS, hyperparameters
from vix.reporting.tensorboard import TensorBoard
from vix.runs.run import RunDirectory

Get = Callable[..., Any]
Compose = Callable[..., DictConfig]
AXES = {"attention": ["performer", "fourier"], "optimizer.lr": [0.001, 0.003]}
SETTINGS = [word for word in TINY if not word.startswith(("experiment=", "attention."))]
served = pytest.mark.xdist_group("tensorboard")  # one server, whichever process runs these
SWEEP = ("data=digits", "embedding=linear", *SETTINGS, "trainer.probe=true")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four real runs: two mixers, of which one has attention weights, at two rates."""
    directory = tmp_path_factory.mktemp("sweep")
    done = run_train(directory, "-m", *SWEEP, *(f"{axis}={','.join(map(str, values))}" for axis, values in AXES.items()))
    assert done.returncode == 0, done.stderr
    return directory / "outputs"


@pytest.fixture(scope="module")
def runs(outputs: Path) -> dict[str, dict[str, Any]]:
    """The runs' results, by the name that TensorBoard gives them."""
    return {str(p.parent.relative_to(outputs)): json.loads(p.read_text()) for p in outputs.glob("*/*/results.json")}


@pytest.fixture(scope="module")
def get(outputs: Path, runs: dict[str, Any]) -> Iterator[Get]:
    """``get(path, body, **query)``: what a real server of the directory answers, as JSON where it is; a body is posted."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(outputs), "--port", "0", "--host", "127.0.0.1"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))

        def ask(path: str, body: Any = None, **query: Any) -> Any:
            url = f"{address}/data/{path}?{urllib.parse.urlencode(query)}"
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=HANGS) as answer:
                content = answer.read()
            return json.loads(content) if answer.headers.get_content_type() == "application/json" else content

        deadline = time.monotonic() + HANGS
        while len(ask("runs")) < len(runs) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield ask
    finally:
        server.terminate()
        server.wait(HANGS)


@pytest.mark.slow
@served
def test_a_run_for_each_directory(get: Get, runs: dict[str, Any]) -> None:
    assert len(runs) == 4
    assert sorted(get("runs")) == sorted(runs)
    assert "vit-performer-linear-learned" in sorted(runs)[-1]
    assert all(name.endswith("/seed=0") for name in runs)


@served
def test_scalars_are_the_results(get: Get, runs: dict[str, Any]) -> None:
    tags = get("plugin/scalars/tags")
    for name, results in runs.items():
        by_epoch = {"loss/train": "train_loss", "accuracy/top1": "top1", "accuracy/top5": "top5", "train/lr": "lr"}
        for tag, key in (by_epoch | {"train/images_per_second": "images_per_second"}).items():
            assert tag in tags[name]
            points = get("plugin/scalars/scalars", run=name, tag=tag)
            assert [step for _, step, _ in points] == [1, 2]
            assert [value for *_, value in points] == pytest.approx([row[key] for row in results["history"]], rel=1e-6)
        final = {tag for tag in tags[name] if tag.startswith("final/")}
        assert final == {f"final/{key}" for key in METRICS if results[key] is not None}
        for tag in final:
            ((_, step, value),) = get("plugin/scalars/scalars", run=name, tag=tag)
            assert step == 2
            assert value == pytest.approx(results[tag.removeprefix("final/")], rel=1e-6)


@pytest.mark.slow
@served
def test_the_probe_is_of_every_layer_and_epoch(get: Get, runs: dict[str, Any], outputs: Path) -> None:
    """Of the approximate mixer alone; its last value is that of the saved model on the same test images."""
    tags = get("plugin/scalars/tags")
    for name, results in runs.items():
        probed = [tag for tag in tags[name] if tag.startswith("probe/")]
        assert probed == (["probe/softmax_error/layer_0"] if results["attention"] == "performer" else [])
        if probed:
            points = get("plugin/scalars/scalars", run=name, tag=probed[0])
            assert [step for _, step, _ in points] == [1, 2]
            _, test = parse(OmegaConf.create(results["config"])).data.load(torch.device("cpu"))
            images = next(test.eval_batches(50))[0][::3][:16]
            (expected,) = softmax_error(vix.load_model(outputs / name), images)
            assert points[-1][2] == pytest.approx(expected, rel=1e-4)
            assert 0 < expected < 2


@served
def test_pictures(get: Get, runs: dict[str, Any]) -> None:
    tags = get("plugin/images/tags")
    for name, results in runs.items():
        expected = {"test/confusion_matrix", "test/worst_images"}
        if results["attention"] == "performer":
            expected.add("test/class_token_attention")
        assert set(tags[name]) == expected
        for tag in expected:
            (image,) = get("plugin/images/images", run=name, tag=tag, sample=0)
            assert image["step"] == 2
            content = get("plugin/images/individualImage", **dict(urllib.parse.parse_qsl(image["query"])))
            picture = imread(io.BytesIO(content), format="png")
            assert min(picture.shape[:2]) > 200
            assert picture[..., :3].var() > 0.01


@served
def test_the_hparams_page_has_every_axis_and_metric(get: Get, runs: dict[str, Any]) -> None:
    experiment = get("plugin/hparams/experiment", {"experimentName": "", "hparamsLimit": 1000})
    columns = {info["name"]: info for info in experiment["hparamInfos"]}
    # What differs comes first, and TensorBoard shows the first five.
    assert {name for name, info in columns.items() if info.get("differs")} == set(AXES)
    assert {"seed", "model", "model.dim", "trainer.epochs", "attention.kernel", "experiment"} - set(columns) == {"experiment"}
    assert not [name for name in columns if "_target_" in name or name.startswith(("trainer.device", "trainer.probe"))]
    metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
    wanted = [f"final/{key}" for key in METRICS if key != "peak_gpu_allocated_gb" or torch.cuda.is_available()]
    assert set(wanted) <= set(metrics)

    ask = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS"],
        "colParams": [{"metric": {"tag": tag, "group": ""}} for tag in wanted],
        "startIndex": 0,
        "sliceSize": 100,
    }
    groups = get("plugin/hparams/session_groups", ask)["sessionGroups"]
    assert sorted(session["name"] for group in groups for session in group["sessions"]) == sorted(runs)
    assert sorted((g["hparams"]["attention"], g["hparams"]["optimizer.lr"]) for g in groups) == sorted(
        (attention, rate) for attention in AXES["attention"] for rate in AXES["optimizer.lr"]
    )
    for group in groups:
        (session,) = group["sessions"]
        results = runs[session["name"]]
        assert (group["hparams"]["attention"], group["hparams"]["seed"]) == (results["attention"], 0)
        assert group["hparams"]["optimizer.lr"] == results["config"]["optimizer"]["lr"]
        values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        for tag in wanted:
            assert values[tag] == pytest.approx(results[tag.removeprefix("final/")], rel=1e-6)


def test_null_is_a_column_where_the_command_says_so(tmp_path: Path) -> None:
    config = {"seed": 1, "rerun": False, "trainer": {"clip_norm": None, "micro_batch": None, "betas": [0.9, 0.99]}}
    run = RunDirectory(tmp_path, {"experiment": None, "model": "vit", "overrides": ["trainer.clip_norm=null"]}, config)
    assert hyperparameters(run) == {"model": "vit", "seed": 1, "trainer.clip_norm": "null", "trainer.betas": "[0.9, 0.99]"}


def test_looking_changes_nothing(compose_config: Compose, tmp_path: Path) -> None:
    """Probed and drawn, or not even asked to: bit-identical losses and weights, also with dropout and augmentation."""
    arguments = [word for word in SWEEP if "probe" not in word]
    arguments += ["attention=performer", "attention.redraw_every=3", "model.dropout=0.3", "augment.flip=true"]
    plain, model = fit(compose_config(*arguments), tmp_path / "plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorBoard, "finish", lambda *_: None)
        probed, other = fit(compose_config(*arguments, "trainer.probe=true"), tmp_path / "probed")
    assert [row["train_loss"] for row in probed["history"]] == [row["train_loss"] for row in plain["history"]]
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    kept = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["rng"]["torch"] for name in ("plain", "probed")]
    assert torch.equal(*kept)


@pytest.mark.parametrize("fails", ["confusion_matrix", "attention_maps"])
def test_a_run_that_cannot_be_drawn_is_finished(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"vix.reporting.images.{fails}", no_room)
    results, _ = fit(compose_config(*TINY), tmp_path)
    assert results["status"] == json.loads((tmp_path / "results.json").read_text())["status"] == "finished"
    (warning,) = (record.getMessage() for record in caplog.records if "TensorBoard" in record.getMessage())
    assert "No space left on device" in warning
    assert "\n" not in warning


def test_the_confusion_matrix_shows_where_mistakes_are() -> None:
    """A darker cell in the row of the true and the column of the predicted class, for any number of classes."""
    for classes in (2, 10, 30, 120):
        true = np.arange(classes).repeat(4)
        right = pictures.confusion_matrix(true, true, list(map(str, range(classes))))
        wrong = true.copy()
        wrong[:4] = classes - 1  # the first class is taken for the last
        picture = pictures.confusion_matrix(true, wrong, list(map(str, range(classes))))
        assert picture.shape == right.shape
        assert max(picture.shape) < 1500
        y, x, _ = np.nonzero(right.astype(int) - picture > 60)  # darker
        upper, right_half = y.mean() < picture.shape[0] / 2, x.mean() > picture.shape[1] / 2
        assert upper
        assert right_half


def test_worst_images_and_captions() -> None:
    """Every image is there unchanged, enlarged; one that was classified wrongly has a red caption."""
    images = np.random.default_rng(0).integers(256, size=(11, 8, 8, 3), dtype=np.uint8)
    true, names = np.zeros(11, int), ["a", "b"]
    loss = np.arange(11.0)
    right = pictures.worst_images(images, true, true, loss, names)
    wrong = pictures.worst_images(images, true, true + 1, loss, names)
    for image in images:
        enlarged = image.repeat(12, axis=0).repeat(12, axis=1)
        places = np.argwhere((right == enlarged[0, 0]).all(axis=2))
        assert any(np.array_equal(right[y : y + 96, x : x + 96], enlarged) for y, x in places)
    changed = (right != wrong).any(axis=2)
    assert changed.any()
    assert (wrong[changed].astype(int)[:, 0] - wrong[changed].astype(int)[:, 2]).mean() > 20


def test_names_of_any_kind_are_drawn() -> None:
    """Too long, in letters that the font lacks, or what would be a formula: a picture of the usual size, and no error."""
    names = ["$x^{2$", "a very long name of a class, with $ and $", "猫", ""]
    true, images = np.arange(4), np.zeros((4, 8, 8, 1), np.uint8)
    odd = pictures.attention_maps(images, true, true, [np.ones((4, 8, 8))], names), pictures.confusion_matrix(true, true, names)
    even = pictures.attention_maps(images, true, true, [np.ones((4, 8, 8))], ["a"] * 4)
    assert odd[0].shape == even.shape
    assert (odd[0] != even).any()
    assert odd[1].var() > 100


def test_captions_compare_with_uniform_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class token that attends to itself and to 16 others equally gives each of them 1/17."""
    captions: list[str] = []
    monkeypatch.setattr(pictures, "grid", lambda title, cells, texts, colors: captions.extend(texts[0]))
    images, true = np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, int)
    pictures.attention_maps(images, true, true, [np.full((1, 4, 4), 1 / 17), np.full((1, 4, 4), 2.5 / 17)], ["cat"])
    assert captions[1:] == ["layer 0\nmax. 1.0 ×", "layer 1\nmax. 2.5 ×"]


def test_heat_is_black_at_nothing_bright_at_the_most_and_blue_below() -> None:
    (none, most, half, below) = pictures.heat(np.array([[0.0, 2.0, 1.0, -1.0]]))[0].astype(int)
    assert none.max() < 10
    assert most.min() > 150
    assert half[0] > 150 > half[2]
    assert below[2] > 100 > below[0]
    assert not pictures.heat(np.zeros((3, 3))).max() > 10


@pytest.mark.slow
def test_a_continued_run_after_the_clock_went_back(tmp_path: Path, forked: Forked) -> None:
    """With a year and more between: every epoch of the real program is there, once, in TensorBoard's own reader."""
    run = tmp_path / "run"
    accuracies: dict[int, float] = {}
    live = None
    for epochs, shift in ((1, 0.0), (2, -4e7), (3, -8e7), (4, 0.0)):
        more = ["trainer.resume=force"] if epochs > 1 else []
        words = [*TINY, f"trainer.epochs={epochs}", f"hydra.run.dir={run}", *more]
        status, output = forked.run(tmp_path, *words, before=partial(shift_clock, shift))
        assert status == 0, output
        live = live or EventAccumulator(str(run))
        history = json.loads((run / "results.json").read_text())["history"]
        accuracies = {row["epoch"]: row["top1"] for row in history}
        for events in (live.Reload(), EventAccumulator(str(run)).Reload()):
            shown = {event.step: event.value for event in events.Scalars("accuracy/top1")}
            assert shown == pytest.approx(accuracies)
            assert len(events.Scalars("accuracy/top1")) == epochs
    assert len(accuracies) == 4
    assert len(list(run.glob("events.out.tfevents.*"))) == 4
