"""A run's identity and its directory: other images, other options, reruns, refused starts, lost results, no locks."""

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import fit, table_after
from conftest import ROOT, TINY, run_train
from forked import Forked, signal_at_file
from omegaconf import DictConfig
from PIL import Image

import vix
from vix.cli.plan import plan
from vix.data.image_folder import ImageFolder
from vix.errors import ConfigError, DataError, UserError
from vix.reporting.logger import hyperparameters
from vix.runs.checkpoint import read_checkpoint
from vix.runs.identity import changed_keys
from vix.runs.results import RunRecord, find_runs, group_seeds, read_run
from vix.runs.run import RunDirectory
from vix.system.files import atomic_write, out_file

FOLDER = (
    *("model=vit", "attention=nystrom", "embedding=linear", "data=imagefolder", "data.image_size=16", "embedding.patch_size=4"),
    *("model.dim=16", "model.depth=1", "attention.heads=2", "attention.landmarks=8", "trainer.compile=false"),
    *("trainer.epochs=2", "trainer.batch_size=8", "trainer.precision=fp32"),
)
IN_R = (*TINY, "hydra.run.dir=r")


def write_images(root: Path, seed: int, count: int = 8) -> None:
    """Images of noise in two classes; the names and, as noise does not compress, the sizes are those of every other seed."""
    random = np.random.default_rng(seed)
    for split, number in (("train", count), ("val", 4)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(number):
                Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def last_error(output: str) -> str:
    """The error of the last program in ``output``, which must be one line and no traceback."""
    line = output.splitlines()[-1]
    assert line.startswith("error: "), output
    assert "Traceback" not in output
    return line


def stop_in_epoch(
    forked: Forked, directory: Path, number: signal.Signals, *arguments: str, run: str = "r", after: int = 0
) -> None:
    """Start a long run, and stop it by a signal once it has done more than ``after`` epochs."""
    process = forked.start(directory, *arguments)
    path = directory / run / "results.json"
    while True:
        assert forked.is_running(process)
        with suppress(OSError, ValueError):
            results = read(path)
            if results["status"] == "running" and results.get("epochs", 0) > after:
                break
        time.sleep(0.005)
    os.kill(process, number)
    forked.wait(process)


def test_image_set(tmp_path: Path) -> None:
    """Equal for equal files wherever they lie; other contents, names, classes or files make another set."""
    write_images(tmp_path / "a", 0)
    write_images(tmp_path / "b", 1)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    sizes = [[p.stat().st_size for p in sorted((tmp_path / name).rglob("*.png"))] for name in ("a", "b")]
    assert sizes[0] == sizes[1]

    def image_set(name: str) -> str:
        return ImageFolder(root=str(tmp_path / name), image_size=16).image_set

    first = image_set("a")
    assert first.endswith("(2 classes, 16 training and 8 test images)")
    assert image_set("copy") == first != image_set("b")
    assert ImageFolder(root=str(tmp_path / "a"), image_size=16, classes=2).image_set == first
    (tmp_path / "copy/train/cat/0.png").rename(tmp_path / "copy/train/cat/00.png")
    renamed = image_set("copy")
    (tmp_path / "copy/train/cat/1.png").rename(tmp_path / "copy/train/dog/10.png")
    assert len({first, renamed, image_set("copy")}) == 3


@pytest.mark.slow
def test_other_images_are_another_run(tmp_path: Path, forked: Forked, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep over data.root gives two runs, in the report two rows; a moved set finds its run; a fixed directory refuses."""
    write_images(tmp_path / "a", 0)
    write_images(tmp_path / "b", 1)
    status, output = forked.run(tmp_path, "-m", *FOLDER, "data.root=a,b")
    assert status == 0, output
    runs = sorted(tmp_path.glob("outputs/*/*/results.json"))
    assert len(runs) == 2
    results = {read(path)["config"]["data"]["root"]: read(path) for path in runs}
    assert results["a"]["image_set"] != results["b"]["image_set"]
    assert results["a"]["train_loss"] != results["b"]["train_loss"]
    groups, others = group_seeds(find_runs([tmp_path / "outputs"]))
    assert [len(group.runs) for group in groups] == [1, 1]
    assert not others
    assert all(results[x]["image_set"].partition(" (")[0] in str([g.name for g in groups]) for x in "ab")
    columns = [hyperparameters(RunDirectory(tmp_path, results[x], results[x]["config"]))["image_set"] for x in "ab"]
    assert columns == [results[x]["image_set"] for x in "ab"]

    (tmp_path / "a").rename(tmp_path / "moved")
    status, output = forked.run(tmp_path, *FOLDER, "data.root=moved", "data.classes=2", "trainer.compile=False")
    assert "Already finished" in output
    monkeypatch.chdir(tmp_path)
    jobs = plan([*FOLDER, "data.root=moved,b"])
    assert [job.state for job in jobs] == ["finished"] * 2
    assert len({job.directory for job in jobs}) == 2

    fixed = (*FOLDER, "hydra.run.dir=r")
    assert forked.run(tmp_path, *fixed, "data.root=b")[0] == 0
    before = (tmp_path / "r/results.json").read_bytes()
    for resume in ("auto", "force"):
        status, output = forked.run(tmp_path, *fixed, "data.root=moved", f"trainer.resume={resume}")
        assert status == 1
        assert results["a"]["image_set"] in last_error(output)
        assert results["b"]["image_set"] in last_error(output)
        assert (tmp_path / "r/results.json").read_bytes() == before


def test_results_without_an_image_set_are_grouped_as_before() -> None:
    """The oldest kept results do not name their image set; a run of today is a seed of theirs."""
    runs = find_runs([ROOT / "results" / "cpu" / name for name in ("cpu_vit", "cpu_hybrid_vin")])
    assert not any("image_set" in run.results for run in runs)
    runs[0].results["image_set"] = "cifar10"
    assert sorted(len(group.runs) for group in group_seeds(runs)[0]) == [3, 3]


# Options that a run takes from its new config: the values, and what the checkpoint or the results then say.
CHANGED = {
    "optimizer.lr": 1e-5,
    "optimizer.betas": [0.8, 0.9],
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.3,
    "optimizer.no_decay_on_norm_and_bias": "true",
    "trainer.batch_size": 10,
    "trainer.schedule": "linear",
    "trainer.warmup_epochs": 2.0,
    "trainer.clip_norm": 0.1,
    "trainer.label_smoothing": 0.2,
    "trainer.ema_decay": 0.5,
    "trainer.precision": "bf16",
    "trainer.micro_batch": 5,
    "augment.flip": "true",
    "data.train_size": 60,
    "model.dropout": 0.5,
}
GROUP_OPTIONS = {"optimizer.betas": "betas", "optimizer.eps": "eps", "optimizer.weight_decay": "weight_decay"}


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory: pytest.TempPathFactory, forked: Forked) -> dict[str, Any]:
    """A run of one epoch, and the results of a second one with nothing else changed."""
    directory = tmp_path_factory.mktemp("one_epoch")
    status, output = forked.run(directory, *IN_R, "trainer.epochs=1")
    assert status == 0, output
    return {"directory": directory / "r", "unchanged": second_epoch(forked, directory / "r", directory / "unchanged")[0]}


def second_epoch(forked: Forked, first: Path, directory: Path, *changed: str) -> tuple[dict[str, Any], str]:
    """Continue a copy of a run of one epoch: its results and its output."""
    shutil.copytree(first, directory / "r")
    status, output = forked.run(directory, *IN_R, "trainer.epochs=2", "trainer.resume=force", *changed)
    assert status == 0, output
    return read(directory / "r/results.json"), output


@pytest.mark.slow
@pytest.mark.xdist_group("one_epoch")
@pytest.mark.parametrize("key", CHANGED)
def test_forced_options_are_used(tmp_path: Path, forked: Forked, one_epoch: dict[str, Any], key: str) -> None:
    """The second epoch is computed with the new value: history, checkpoint and results agree."""
    value = CHANGED[key]
    argument = f"{key}={json.dumps(value)}".replace('"', "")
    results, output = second_epoch(forked, one_epoch["directory"], tmp_path / "changed", argument)
    runs = (one_epoch["unchanged"], results)
    first = read(one_epoch["directory"] / "results.json")["history"]
    assert all(run["history"][:1] == first for run in runs)
    losses = [run["history"][1]["train_loss"] for run in runs]
    # Weights are averaged, and their norms reported, without a change of the loss; micro-batches change roundings alone.
    if key not in ("trainer.ema_decay", "trainer.micro_batch"):
        assert losses[0] != losses[1]
    changed = results["config_changes"][0]["changed"]
    assert set(changed) == {"trainer.epochs", key}
    checkpoint = read_checkpoint(tmp_path / "changed/r/checkpoint.pt")
    groups, rate = checkpoint["optimizer"]["param_groups"], results["history"][1]["lr"]
    steps = -(-results["train_images"] // results["config"]["trainer"]["batch_size"])
    expected = {
        "optimizer.lr": 1e-5,
        "trainer.schedule": 1e-3 * (1 - (2 * steps - 1) / (2 * steps)),
        "trainer.warmup_epochs": 1e-3 * 2 * steps / (2 * steps + 1),
    }
    assert rate == pytest.approx(expected.get(key, 1e-3))
    if key in GROUP_OPTIONS:
        assert [list(np.atleast_1d(group[GROUP_OPTIONS[key]])) for group in groups] == [list(np.atleast_1d(value))]
    if key == "optimizer.no_decay_on_norm_and_bias":
        assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    if key == "trainer.ema_decay":
        assert "trained_model" in checkpoint
        assert checkpoint["ema_updates"] == steps
    if key == "trainer.precision":
        assert results["precision"] == "bf16"
    assert "no single command reproduces" in output


REFUSED = {
    "optimizer=sgd": "optimizer._target_",
    "+optimizer.amsgrad=true": "optimizer.amsgrad",
    "seed=1": "seed",
    "model.dim=32": "model.dim",
    "model.depth=2": "model.depth",
    "posenc=sincos": "posenc._target_",
    "data.test_size=40": "data.test_size",
    "data.validation_size=50": "data.validation_size",
    "trainer.epochs=1": "trainer.epochs",
}


@pytest.mark.slow
def test_what_force_cannot_change(tmp_path: Path, forked: Forked) -> None:
    """Each is refused in one line that names the key, and leaves the run as it was."""
    assert forked.run(tmp_path, *IN_R)[0] == 0
    before = snapshot(tmp_path / "r")
    for argument, key in REFUSED.items():
        more = [] if key == "trainer.epochs" else ["trainer.epochs=3"]
        status, output = forked.run(tmp_path, *IN_R, *more, argument, "trainer.resume=force")
        assert status == 1, (argument, output)
        assert f"{key} was " in last_error(output)
        assert snapshot(tmp_path / "r") == before, argument


@pytest.mark.slow
def test_a_finished_run_keeps_its_config(tmp_path: Path, forked: Forked) -> None:
    """Nothing would be trained under another one, and its results would name a config that did not lead to them."""
    assert forked.run(tmp_path, *IN_R)[0] == 0
    before = snapshot(tmp_path / "r")
    for force in ("auto", "force"):
        status, output = forked.run(tmp_path, *IN_R, "optimizer.lr=0.1", f"trainer.resume={force}")
        assert status == 1
        line = last_error(output)
        assert (
            "(optimizer.lr was 0.001 and is 0.1), whose epochs are all done; start over with rerun=true, or train more" in line
        )
        assert snapshot(tmp_path / "r") == before
    sweep = (*TINY, "hydra.sweep.dir=.", "hydra.sweep.subdir=r", "optimizer.lr=0.1")  # the same directory
    status, output = forked.run(tmp_path, "-m", *sweep)
    assert status == 1
    assert "refused" in output
    after = snapshot(tmp_path / "r")
    assert {name: content for name, content in after.items() if not name.endswith(".log")} == {
        name: content for name, content in before.items() if not name.endswith(".log")
    }
    status, output = forked.run(tmp_path, *IN_R, "optimizer.lr=0.1", "trainer.epochs=3", "trainer.resume=force")
    assert status == 0, output
    status, output = forked.run(tmp_path, *TINY, "hydra.run.dir=other", "trainer.epochs=1", "trainer.resume=force")
    assert status == 0
    assert "trainer.resume=force: nothing to continue in " in output


@pytest.mark.slow
def test_a_run_that_stops_early(tmp_path: Path, forked: Forked) -> None:
    """Interrupted, it ends at the same epoch; it is finished, also without its results.json; more patience continues it."""
    still = (
        *TINY,
        "hydra.run.dir=outputs/r",
        "trainer.epochs=30",
        "optimizer.lr=0.0",
        "trainer.patience=3",
    )  # the first epoch stays the best
    stop = partial(signal_at_file, signal.SIGTERM, "checkpoint.pt", 4)  # of the start, and of each epoch
    assert forked.wait(forked.start(tmp_path, *still, before=stop)) == 128 + signal.SIGTERM
    assert read(tmp_path / "outputs/r/results.json")["status"] == "interrupted"
    status, output = forked.run(tmp_path, *still)
    assert status == 0, output
    assert "Stopped early: top-1 has not increased since epoch 1" in output
    results = read(tmp_path / "outputs/r/results.json")
    assert (results["epochs"], results["stopped_early"], results["best_epoch"]) == (4, True, 1)
    (tmp_path / "outputs/r/results.json").unlink()
    assert "Already finished" in forked.run(tmp_path, *still)[1]
    assert read(tmp_path / "outputs/r/results.json") == results
    status, output = forked.run(tmp_path, *still[:-1], "trainer.patience=4", "trainer.resume=force")
    assert status == 0, output
    assert read(tmp_path / "outputs/r/results.json")["epochs"] == 5


@pytest.mark.slow
def test_a_batch_size_within_an_epoch(tmp_path: Path, forked: Forked) -> None:
    """Stopped within an epoch by a checkpoint there, the batch size cannot change; the learning rate can."""
    arguments = (*IN_R, "trainer.epochs=400", "trainer.checkpoint_every=2")
    process = forked.start(tmp_path, *arguments)
    path = tmp_path / "r/checkpoint.pt"
    while True:
        assert forked.is_running(process)
        with suppress(UserError):
            if path.exists() and read_checkpoint(path)["progress"]["batch"]:
                break
    os.kill(process, signal.SIGSTOP)
    try:
        position = read_checkpoint(path)["progress"]
    finally:
        os.kill(process, signal.SIGKILL)
    forked.wait(process)
    if not position["batch"]:  # it had gone on by one checkpoint
        shutil.copy(tmp_path / "r/checkpoint.previous.pt", path)
        position = read_checkpoint(path)["progress"]
    assert position["batch"]
    forced = (*IN_R, f"trainer.epochs={position['epoch'] + 1}", "trainer.resume=force")
    status, output = forked.run(tmp_path, *forced, "trainer.batch_size=10")
    assert status == 1
    assert "trainer.batch_size was 20 and is 10" in last_error(output)
    status, output = forked.run(tmp_path / "", *forced, "optimizer.lr=1e-5")
    assert status == 0, output
    results = read(tmp_path / "r/results.json")
    assert results["history"][-1]["lr"] == pytest.approx(1e-5)
    assert results["config_changes"][0]["steps_before"] == position["batch"]


@pytest.mark.slow
def test_an_interrupted_rerun_is_continued(tmp_path: Path, forked: Forked) -> None:
    """rerun=true moves a finished run aside once, goes on after SIGTERM and kill -9, and begins a finished one again."""
    long = (*IN_R, "trainer.epochs=60")
    assert forked.run(tmp_path, *long)[0] == 0
    first = read(tmp_path / "r/results.json")
    rerun = (*long, "rerun=true")
    done = 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        stop_in_epoch(forked, tmp_path, number, *rerun, after=done)
        done = read_checkpoint(tmp_path / "r/checkpoint.pt")["progress"]["epoch"]
        assert done > 0
    status, output = forked.run(tmp_path, *rerun)
    assert status == 0, output
    results = read(tmp_path / "r/results.json")
    assert output.count("Resuming an interrupted rerun") == 2
    assert output.count("was moved to") == 1
    assert sum("epoch 1/60" in line for line in output.splitlines()) == 2  # of the first run, and of the rerun
    assert results["train_loss"] == first["train_loss"]
    assert [p.name for p in (tmp_path / "r").glob("previous-*")] == ["previous-1"]
    assert read(tmp_path / "r/previous-1/results.json") == first

    stop_in_epoch(forked, tmp_path, signal.SIGTERM, *rerun)  # finished before: once more from the start
    assert read(tmp_path / "r/previous-2/results.json") == results
    short = (*IN_R, "trainer.epochs=1", "rerun=true")  # another config: no rerun of this one
    status, output = forked.run(tmp_path, *short)
    assert status == 0, output
    assert read(tmp_path / "r/previous-3/results.json")["status"] == "interrupted"


@pytest.mark.slow
def test_rerun_of_an_interrupted_run_begins_anew(tmp_path: Path, forked: Forked) -> None:
    long = (*IN_R, "trainer.epochs=400")
    stop_in_epoch(forked, tmp_path, signal.SIGTERM, *long)
    stop_in_epoch(forked, tmp_path, signal.SIGTERM, *long, "rerun=true")
    assert read(tmp_path / "r/previous-1/results.json")["status"] == "interrupted"
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):  # what the error about damage says is right here, too
        (tmp_path / "r" / name).write_bytes(b"damaged")
    status, output = forked.run(tmp_path, *long)
    assert status == 1
    assert "start over with rerun=true" in last_error(output)
    stop_in_epoch(forked, tmp_path, signal.SIGTERM, *long, "rerun=true")
    assert (tmp_path / "r/previous-2/checkpoint.pt").read_bytes() == b"damaged"


@pytest.mark.slow
def test_an_interrupted_rerun_of_a_sweep_is_continued(tmp_path: Path, forked: Forked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished jobs are not started over, the interrupted one goes on, the plan says the same; later it is a new rerun."""
    monkeypatch.chdir(tmp_path)
    sweep = (*TINY, "seed=0,1")
    assert forked.run(tmp_path, "-m", *sweep)[0] == 0
    before = [run.results for run in find_runs([Path("outputs")])]
    rerun = (*sweep, "rerun=true")
    assert [job.state for job in plan(rerun)] == ["again", "again"]
    stop = partial(signal_at_file, signal.SIGTERM, "checkpoint.pt", 7)  # each job moves one aside and writes three
    assert forked.wait(forked.start(tmp_path, "-m", *rerun, before=stop)) == 128 + signal.SIGTERM
    assert [(job.state, job.left) for job in plan(rerun)] == [("finished", 0), ("continues", 1)]
    assert [job.state for job in plan([*rerun, "trainer.resume=force"])] == ["again", "continues"]  # another command
    (tmp_path / "out").unlink()
    status, output = forked.run(tmp_path, "-m", *rerun)
    assert status == 0, output
    assert "Continuing the rerun of" in output
    states = [row[1] for row in table_after(output, "jobs of this sweep") if len(row) > 2 and row[1]]
    assert states == ["finished before", "finished"]
    after = [run.results for run in find_runs([Path("outputs")])]
    assert [r["train_loss"] for r in after] == [r["train_loss"] for r in before]
    assert [path.name for path in sorted(Path("outputs").glob("*/*/previous-*"))] == ["previous-1"] * 2
    assert not Path("outputs/.sweeps").exists()
    assert [job.state for job in plan(rerun)] == ["again", "again"]


def snapshot(directory: Path) -> dict[str, Any]:
    """Every file, folder and link below a directory, with its contents, but for the output and who held it."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        if path.name not in ("out", ".lock"):
            name = str(path.relative_to(directory))
            found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("where", [".", "link", "new/nested/r", "there/new", "outputs"])
def test_a_refused_start_leaves_everything(tmp_path: Path, forked: Forked, where: str) -> None:
    """Files, folders and links that were there stay with their contents; what the start made is gone."""
    real = tmp_path / "real"
    for folder in (tmp_path, real):
        (folder / ".hydra").mkdir(parents=True)
        (folder / "train.log").write_text("mine\n")
        (folder / ".hydra/config.yaml").write_text("mine: too\n")
        (folder / ".hydra/notes").write_text("and these")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "there").mkdir()
    before = snapshot(tmp_path)
    directory = () if where == "outputs" else (f"hydra.run.dir={where}",)
    for wrong in ("attention.heads=3", "trainer.warmup_epochs=9"):
        status, output = forked.run(tmp_path, *TINY, *directory, wrong)
        assert status == 1
        last_error(output)
        assert snapshot(tmp_path) == before
        assert not list(tmp_path.rglob(".lock"))


@pytest.mark.slow
def test_a_refused_sweep_leaves_everything(tmp_path: Path, forked: Forked) -> None:
    """A job keeps the reason in its directory; files and folders from before stay, empty ones too."""
    (tmp_path / "sweep").mkdir()
    status, output = forked.run(tmp_path, "-m", *TINY, "no.such.key=1,2", "hydra.sweep.dir=sweep")
    assert status == 1
    assert (tmp_path / "sweep").is_dir()
    (tmp_path / "train.log").write_text("mine\n")
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/notes").write_text("mine")
    here = ("hydra.sweep.dir=.", "hydra.sweep.subdir=.")
    status, output = forked.run(tmp_path, "-m", *TINY, "attention.heads=3", *here)
    assert status == 1, output
    assert (tmp_path / "train.log").read_text().startswith("mine\n")
    assert (tmp_path / ".hydra/notes").read_text() == "mine"
    assert read(tmp_path / "results.json")["status"] == "refused"


def test_previous_runs_are_never_overwritten(tmp_path: Path) -> None:
    """The number is one more than the highest, whatever is missing below it; a failure moves everything back."""
    run = RunDirectory(tmp_path, {}, {})
    for name in ("previous-2", "previous-10", "previous-x", "previous-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "previous-12").write_text("a file")
    (tmp_path / "results.json").write_text("first")
    (tmp_path / "checkpoint.pt").write_text("weights")
    run.archive_previous()
    assert (tmp_path / "previous-13/results.json").read_text() == "first"

    # A start that was killed while it moved: the next one finds everything where it was.
    (tmp_path / ".previous.tmp").mkdir()
    (tmp_path / ".previous.tmp/results.json").write_text("half moved")
    (tmp_path / "checkpoint.pt").write_text("not yet")
    run.undo_archiving()
    assert {p.name: p.read_text() for p in tmp_path.iterdir() if p.is_file()} == {
        "results.json": "half moved",
        "checkpoint.pt": "not yet",
        "previous-12": "a file",
    }


@pytest.mark.slow
def test_a_run_that_cannot_be_moved_stays_finished(tmp_path: Path, forked: Forked) -> None:
    assert forked.run(tmp_path, *IN_R)[0] == 0
    before = (tmp_path / "r/results.json").read_bytes()
    (tmp_path / "r/.previous.tmp").write_text("in the way")
    status, output = forked.run(tmp_path, *IN_R, "rerun=true")
    assert status == 1
    assert "cannot archive the earlier run" in last_error(output)
    assert (tmp_path / "r/results.json").read_bytes() == before
    (tmp_path / "r/.previous.tmp").unlink()
    assert forked.run(tmp_path, *IN_R, "rerun=true")[0] == 0
    assert (tmp_path / "r/previous-1/results.json").read_bytes() == before


@pytest.mark.slow
def test_lost_and_damaged_results(tmp_path: Path, forked: Forked) -> None:
    """results.json is restored from the checkpoint, as it was; without a checkpoint finished results stay finished."""
    assert forked.run(tmp_path, *IN_R)[0] == 0
    path = tmp_path / "r/results.json"
    whole = path.read_bytes()
    parts = json.loads(whole)
    no_top1 = {key: value for key, value in parts.items() if key != "top1"}
    for damage in (None, b"", whole[:100], b"[]", json.dumps(no_top1).encode(), b'{"status": "finished", "config": 3}'):
        path.unlink() if damage is None else path.write_bytes(damage)
        status, output = forked.run(tmp_path, *IN_R)
        assert status == 0, output
        assert "Already finished" in output.split("restored from the checkpoint")[-1]
        assert "Traceback" not in output
        assert read(path) == parts

    path.unlink()
    status, output = forked.run(tmp_path, *IN_R, "optimizer.lr=0.5")
    assert status == 1
    assert "optimizer.lr was 0.001 and is 0.5" in last_error(output)
    path.write_bytes(whole)
    for contents in (b"damaged", None):
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            (tmp_path / "r" / name).write_bytes(contents) if contents else (tmp_path / "r" / name).unlink()
        status, output = forked.run(tmp_path, *IN_R)
        assert status == 0, output
        assert path.read_bytes() == whole
        with pytest.raises(UserError, match="damaged" if contents else "checkpoint is missing"):
            vix.load_model(tmp_path / "r")
    with pytest.raises(DataError, match="rerun=true"):
        vix.load_model(tmp_path / "r")
    status, output = forked.run(tmp_path, *IN_R, "trainer.epochs=3", "trainer.resume=force")
    assert status == 1
    assert "checkpoint is missing" in last_error(output)
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_lost_results_of_an_interrupted_run(tmp_path: Path, forked: Forked) -> None:
    long = (*IN_R, "trainer.epochs=40")
    assert forked.run(tmp_path / "whole", *long)[0] == 0
    stop_in_epoch(forked, tmp_path / "parts", signal.SIGTERM, *long)
    (tmp_path / "parts/r/results.json").unlink()
    status, output = forked.run(tmp_path / "parts", *long)
    assert status == 0, output
    assert "Continuing after" in output
    whole, parts = (read(tmp_path / name / "r/results.json") for name in ("whole", "parts"))
    timings = {"seconds", "images_per_second", "git_commit", "name"}
    assert set(whole) == set(parts)
    for row in (*whole["history"], *parts["history"]):
        del row["images_per_second"]
    assert {k: v for k, v in whole.items() if k not in timings} == {k: v for k, v in parts.items() if k not in timings}


WITHOUT_LOCKS = """
import errno, fcntl, os

def refuse(*_):
    raise OSError(errno.{name}, os.strerror(errno.{name}))

fcntl.flock = os.link = refuse
real = os.fsync
os.fsync = lambda descriptor: refuse() if "{name}" in ("ENOSYS", "EOPNOTSUPP") else real(descriptor)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ENOSYS", pytest.param("ENOLCK", marks=pytest.mark.slow), pytest.param("EPERM", marks=pytest.mark.slow)]
)
def test_without_locks_and_hard_links(tmp_path: Path, name: str) -> None:
    """A file system that has neither: one warning for each, a run as always, and a copy as the previous checkpoint."""
    assert hasattr(errno, name)
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_LOCKS.format(name=name))
    extra = {"PYTHONPATH": str(tmp_path)}
    done = run_train(tmp_path, *IN_R, "trainer.epochs=3", **extra)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be locked") == 1
    assert done.stdout.count("cannot be hard-linked") == 1
    run = tmp_path / "r"
    assert read(run / "results.json")["status"] == "finished"
    previous, last = (read_checkpoint(run / name)["progress"]["epoch"] for name in ("checkpoint.previous.pt", "checkpoint.pt"))
    assert (previous, last) == (2, 3)
    assert not list(run.glob(".*.tmp"))
    planned = subprocess.run(
        [sys.executable, "-m", "vix", "plan", *TINY, "trainer.epochs=3", "hydra.sweep.dir=.", "hydra.sweep.subdir=r"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    assert planned.returncode == 0, planned.stderr
    assert "1 finished" in planned.stdout


def test_downloads_without_locks(tmp_path: Path) -> None:
    """Two processes then download both, and the later one finds the folder in its place."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from vix.data.cifar import Cifar10
class Reader:
    def __init__(self, root, download=False):
        (Path(root) / "cifar-10-batches-py").mkdir()
        other = Path({str(tmp_path / "data" / "cifar-10-batches-py")!r})
        other.mkdir()
        (other / "data_batch_1").write_text("from the other")
Cifar10(root={str(tmp_path / "data")!r}).download(Reader, Path("no-archive"))
"""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_LOCKS.format(name="ENOSYS"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/cifar-10-batches-py/data_batch_1").read_text() == "from the other"


@pytest.mark.slow
def test_an_option_that_is_removed_from_a_file(tmp_path: Path) -> None:
    """Then the class's default counts, which need not be off: another config, and in a report another group."""
    file = tmp_path / "mine/optimizer/adamw0.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("_target_: torch.optim.AdamW\nlr: 0.001\nweight_decay: 0\n")
    command = ("--config-dir", str(tmp_path / "mine"), *TINY, "optimizer=adamw0")
    assert run_train(tmp_path, *command, "hydra.run.dir=r").returncode == 0
    file.write_text("_target_: torch.optim.AdamW\nlr: 0.001\n")
    again = run_train(tmp_path, *command, "hydra.run.dir=r")
    assert "another config (optimizer.weight_decay was 0 and is 0.01)" in again.stderr
    assert run_train(tmp_path, *command, "hydra.run.dir=s", "seed=1").returncode == 0
    records = [read_run(tmp_path / name / "results.json") for name in "rs"]
    assert records[1].results["defaults"]["optimizer.weight_decay"] == 0.01
    assert records[1].satisfies("optimizer.weight_decay", "0.01")
    groups, _ = group_seeds(records)
    assert [len(group.runs) for group in groups] == [1, 1]
    assert {group.distinction for group in groups} == {" (optimizer.weight_decay=0)", " (optimizer.weight_decay=0.01)"}


def test_an_option_that_is_newer_than_the_run(tmp_path: Path) -> None:
    """A run whose config lacks it is the same run while the option is off, also in a report's groups."""
    assert run_train(tmp_path, *IN_R).returncode == 0
    results = read(tmp_path / "r/results.json")
    group = RunRecord(Path(), "finished", "", results).group_key()
    for section, key in (("trainer", "mirror_eval"), ("model", "layer_scale"), ("model", "stochastic_depth")):
        assert not results["config"][section].pop(key)
    assert RunRecord(Path(), "finished", "", results).group_key() == group
    (tmp_path / "r/results.json").write_text(json.dumps(results))
    before = (tmp_path / "r/checkpoint.pt").read_bytes()
    again = run_train(tmp_path, *IN_R)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "r/checkpoint.pt").read_bytes() == before
    on = run_train(tmp_path, *IN_R, "trainer.mirror_eval=true")
    assert on.returncode
    assert "trainer.mirror_eval was None and is True" in last_error(on.stderr)


@pytest.mark.parametrize(
    "files",
    [
        {"results.json": '{"status": "finished", # a note'},
        {"metrics.csv": "mine"},
        {"results.json": json.dumps({"status": "interrupted", "epochs": 3, "config": {}}), "metrics.csv": "epoch"},
        {"results.json": json.dumps({"status": "failed", "config": {}}), "metrics.csv": "mine"},
    ],
)
def test_what_nothing_can_continue_is_moved_aside(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    run = RunDirectory(tmp_path, {}, {"trainer": {}})
    assert run.prepare(False, "auto", lambda: None) is None
    assert "epochs" not in run.results
    assert {path.name: path.read_text() for path in (tmp_path / "previous-1").iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["previous-1"]


def test_a_damaged_checkpoint_never_replaces_the_previous_one(
    compose_config: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the next one cannot be written, such as on a full disk."""
    fit(compose_config(*TINY), tmp_path)
    path, previous = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.previous.pt"
    path.write_bytes(path.read_bytes()[:1000])
    good = previous.read_bytes()
    run = RunDirectory(tmp_path, {}, {})
    state = run.read_newest_checkpoint()
    assert state

    def full(*_: Any) -> None:
        raise UserError("full")

    with monkeypatch.context() as patched:
        patched.setattr("vix.runs.run.write_tensors", full)
        with pytest.raises(UserError, match="full"):
            run.save_checkpoint(state)
    assert previous.read_bytes() == good
    run.save_checkpoint(state)
    assert previous.read_bytes() == good
    written = path.read_bytes()
    run.save_checkpoint(state)
    assert previous.read_bytes() == written  # from then on as always


def test_a_run_stopped_before_its_first_epoch_starts_in_place(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"status": "interrupted", "epochs": 0, "config": {}}))
    RunDirectory(tmp_path, {}, {"trainer": {}}).prepare(False, "auto", lambda: None)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("source", [".", "checkpoint.pt"])
def test_a_rerun_does_not_move_the_weights_it_starts_from(tmp_path: Path, source: str) -> None:
    (tmp_path / "checkpoint.pt").touch()
    run = RunDirectory(tmp_path, {}, {"trainer": {"init_from": str(tmp_path / source)}})
    with pytest.raises(
        ConfigError, match=r"rerun=true moves the files of that run; choose another directory for this one with"
    ):
        run.prepare(True, "auto", lambda: None)
    assert (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(("source", "reason"), [("", "contains no weights"), ("nowhere", "there is no such run or file")])
def test_initial_weights_that_are_none(tmp_path: Path, source: str, reason: str) -> None:
    """Other weights than those of the earlier run are not the cause."""
    run = RunDirectory(tmp_path, {}, {"trainer": {"init_from": str(tmp_path / source)}})
    with pytest.raises(ConfigError, match=rf"^trainer\.init_from=.*: {reason}; pass the directory of a run"):
        run.check_same_run({"trainer": {}}, {}, "auto")


@pytest.mark.parametrize("source", ["weights.pt", "previous-1", "previous-1/checkpoint.pt"])
def test_a_rerun_starts_from_weights_that_it_does_not_move(tmp_path: Path, source: str) -> None:
    (tmp_path / "previous-1").mkdir()
    files = [tmp_path / name for name in ("weights.pt", "previous-1/checkpoint.pt", "results.json")]
    for file in files:
        file.touch()
    run = RunDirectory(tmp_path, {}, {"trainer": {"init_from": str(tmp_path / source)}})
    assert run.prepare(True, "auto", lambda: None) is None
    assert [file.exists() for file in files] == [True, True, False]


@pytest.mark.parametrize(
    "earlier",
    [
        "not a run's",
        {"status": "finished"},  # without the fields of a finished run
        {"status": "interrupted", "started_by_rerun": "t", "epochs": 3, "history": [{"epoch": 1}], "config": {"seed": 1}},
        None,
    ],
)
def test_a_start_that_fails_early_keeps_what_is_there(tmp_path: Path, earlier: Any) -> None:
    """Before it has continued or archived the earlier run, such as for a folder without images."""
    path = tmp_path / "results.json"
    if earlier:
        path.write_text(json.dumps(earlier))
    RunDirectory(tmp_path, {"name": "x"}, {"trainer": {}}).write_failure(status="failed", error="e")
    if earlier is None:
        assert read(path) == {"status": "failed", "name": "x", "config": {"trainer": {}}, "error": "e"}
    elif "config" in earlier:
        assert read(path) == {**earlier, "status": "failed", "error": "e"}
    else:
        assert read(path) == earlier


def test_options_that_are_off_and_were_removed_are_no_change() -> None:
    then, now = {"data.flip": False, "data.crop": 4, "model.dim": 8}, {"model.dim": 8, "augment.flip": None}
    assert changed_keys(then, now, ()) == {"data.crop": (4, None)}


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    atomic_write(pipe, b"contents")
    reader.join()
    assert read == [b"contents"]
    assert pipe.is_fifo()
    for name in (str(tmp_path), "/", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is not the name of a file"):
            out_file(name)
    with pytest.raises(UserError, match="File name too long"):
        atomic_write(out_file("x" * 300), b"contents")


def test_standard_output_is_not_replaced_where_it_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for /dev, which a failure of this test would damage."""
    monkeypatch.setattr("vix.system.files.DEVICES", (tmp_path / "dev",))
    (tmp_path / "dev").mkdir()
    link, target = tmp_path / "dev/stdout", tmp_path / "file"
    target.write_bytes(b"what was there")
    link.symlink_to(target)
    atomic_write(link, b"contents")
    assert link.is_symlink()
    assert target.read_bytes() == b"contents"


def test_only_a_checkpoint_can_be_continued_under_another_config(tmp_path: Path) -> None:
    config = {"trainer": {"epochs": 2}, "optimizer": {"lr": 1.0}}
    run = RunDirectory(tmp_path, {}, {**config, "optimizer": {"lr": 2.0}})
    with pytest.raises(ConfigError, match=r"start over with rerun=true, or choose another directory with hydra.run.dir=DIR$"):
        run.check_same_run(config, {}, "auto")
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(ConfigError, match=r"or continue under the new config with trainer\.resume=force$"):
        run.check_same_run(config, {"epochs": 1}, "auto")
    assert run.check_same_run(config, {"epochs": 1}, "force") == {"optimizer.lr": (1.0, 2.0)}
    for resume in ("auto", "force"):
        with pytest.raises(
            ConfigError, match=r"whose epochs are all done; .* more epochs .* trainer.epochs=N trainer\.resume=force$"
        ):
            run.check_same_run(config, {"epochs": 2}, resume)
    longer = RunDirectory(tmp_path, {}, {"trainer": {"epochs": 3}, "optimizer": {"lr": 1.0}})
    assert longer.check_same_run(config, {"epochs": 2}, "force") == {"trainer.epochs": (2, 3)}
    shorter = RunDirectory(tmp_path, {}, {"trainer": {"epochs": 1}, "optimizer": {"lr": 1.0}})  # ends an interrupted run
    assert shorter.check_same_run(config, {"epochs": 1}, "force") == {"trainer.epochs": (2, 1)}
