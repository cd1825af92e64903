"""The real program, as its users start it: what a run leaves behind, that it repeats, continues and sweeps."""

import csv
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from common import table_after
from conftest import HANGS, ROOT, TINY, run_train
from forked import Forked, signal_at_file
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vix
from vix.data.digits import Digits
from vix.training.evaluate import accuracy

REQUIRED = {
    *("status", "experiment", "model", "attention", "embedding", "posenc", "seed", "epochs", "top1", "top5"),
    *("best_top1", "best_top5", "best_epoch", "train_loss", "trainable_params", "weight_bias_params", "checkpoint_mb"),
    *("peak_gpu_allocated_gb", "peak_gpu_reserved_gb", "resident_data_gb", "images_per_second", "seconds"),
    *("precision", "device", "torch", "git_commit"),
}


def results_of(directory: Path) -> dict[str, Any]:
    (path,) = directory.glob("outputs/*/*/results.json")
    return json.loads(path.read_text())


def check_artefacts(directory: Path, epochs: int) -> dict[str, Any]:
    """Everything that a finished run must leave in its directory; returns its results."""
    results = json.loads((directory / "results.json").read_text())
    assert set(results) >= REQUIRED
    assert results["status"] == "finished"
    assert results["epochs"] == len(results["history"]) == epochs
    assert 0 <= results["top1"] <= results["top5"] <= 100
    assert results["best_top1"] == max(row["top1"] for row in results["history"])
    best = results["history"][results["best_epoch"] - 1]
    for key in ("top1", "top5", "test_loss", "class_accuracy"):
        assert results[f"best_{key}"] == best[key]
        assert results[key] == results["history"][-1][key]
    with open(directory / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, epoch in zip(rows, results["history"], strict=True):
        assert float(row["test_loss"]) == epoch["test_loss"] > 0
        assert [float(row[f"class_accuracy/{name}"]) for name in results["class_names"]] == epoch["class_accuracy"]
    assert (results["peak_gpu_allocated_gb"] is None) == (not torch.cuda.is_available())

    checkpoint = torch.load(directory / "checkpoint.pt", weights_only=True)
    assert {"model", "best_model", "optimizer", "lr_scheduler", "scaler", "rng", "config"} <= set(checkpoint)
    torch.save(checkpoint["model"], directory / "weights_alone.pt")
    assert results["checkpoint_mb"] == pytest.approx((directory / "weights_alone.pt").stat().st_size / 1e6, rel=0.01)

    overrides = OmegaConf.load(directory / ".hydra" / "overrides.yaml")
    assert list(overrides) == results["overrides"]  # type: ignore[call-overload]
    assert f"epoch {epochs}/{epochs}" in (directory / "train.log").read_text()

    # TensorBoard's own reader; one run, not a nested one for the hparams.
    assert {path.parent for path in directory.rglob("events.out.*")} == {directory}
    events = EventAccumulator(str(directory)).Reload()
    tags = events.Tags()["scalars"]
    for tag, key in (("loss/train", "train_loss"), ("accuracy/top1", "top1"), ("accuracy/top5", "top5"), ("train/lr", "lr")):
        assert [e.step for e in events.Scalars(tag)] == list(range(1, epochs + 1))
        assert [e.value for e in events.Scalars(tag)] == pytest.approx([row[key] for row in results["history"]], rel=1e-6)
    assert {"train/images_per_second", "memory/process_peak_gb"} <= set(tags)
    assert events.Scalars("final/top1")[0].value == pytest.approx(results["top1"])
    plugins = events.PluginTagToContent("hparams")
    assert {"_hparams_/session_start_info", "_hparams_/session_end_info"} <= set(plugins)
    assert b"optimizer.lr" in plugins["_hparams_/session_start_info"]
    (config,) = events.Tensors("config/text_summary")
    assert '"optimizer"' in config.tensor_proto.string_val[0].decode()
    return results


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    """The README's first command learns to 90 % and says so; what it wrote is what it printed and what it reloads to."""
    done = run_train(tmp_path, "experiment=quickstart", fresh=True)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "outputs" / "quickstart" / "seed=0"
    results = check_artefacts(directory, epochs=10)
    assert results["top1"] >= 90
    assert (results["experiment"], results["attention"], results["embedding"]) == ("quickstart", "nystrom", "linear")
    assert f"{results['top1']:.2f} %" in done.stdout.split("top-1, last epoch")[1]
    # Piped output is plain lines: one an epoch, no control sequences.
    assert sum("images/s  " in line for line in done.stdout.splitlines()) == 10
    assert "\x1b" not in done.stdout

    _, test = Digits().load(torch.device("cpu"))
    scores = accuracy(vix.load_model(directory), test.eval_batches(360), torch.autocast("cpu", enabled=False), 10)
    assert scores["top1"] == pytest.approx(results["top1"], abs=0.6)  # the run tested in its own precision


@pytest.mark.slow  # unpacking takes half a minute
@pytest.mark.xdist_group("cifar10")  # and is done once for each process
def test_real_cifar10(tmp_path: Path, cifar10_root: Path) -> None:
    """The main job on real images at full resolution: Hybrid ViN, 200 training images, one epoch, every artefact."""
    done = run_train(
        tmp_path,
        "data.train_size=200",
        "data.test_size=50",
        "trainer.batch_size=20",
        "trainer.epochs=1",
        VIX_DATA=str(cifar10_root),
    )
    assert done.returncode == 0, done.stderr
    (directory,) = tmp_path.glob("outputs/*/seed=0")
    assert (
        directory.parent.name
        == "vit-nystrom-conv-learned,data.test_size=50,data.train_size=200,trainer.batch_size=20,trainer.epochs=1"
    )
    results = check_artefacts(directory, epochs=1)
    assert (results["train_images"], results["test_images"]) == (200, 50)
    assert (results["trainable_params"], results["weight_bias_params"]) == (755034, 623706)
    assert results["train_loss"] < math.log(10) + 0.15


def test_runs_repeat_to_the_bit(tmp_path: Path) -> None:
    """The same seed gives the same numbers and weights in another process; another seed does not."""
    runs = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        # bf16 and augmentation are part of what must repeat.
        extra = (f"seed={seed}", "trainer.precision=bf16", "augment.flip=true", "augment.crop_padding=1", "model.dropout=0.1")
        assert run_train(tmp_path / name, *TINY, *extra).returncode == 0
        (path,) = (tmp_path / name).glob("outputs/*/*/checkpoint.pt")
        runs[name] = results_of(tmp_path / name)["train_loss"], torch.load(path, weights_only=True)["model"]
    assert runs["first"][0] == runs["again"][0] != runs["other"][0]
    for name, tensor in runs["first"][1].items():
        assert torch.equal(tensor, runs["again"][1][name])


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_is_obeyed_at_once(tmp_path: Path, number: signal.Signals) -> None:
    """Within 10 s, or on a slow machine the time that the run took to begin, everything is saved and the program ends."""
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "trainer.epochs=100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 3/" in line:
            break
    patience = max(10, time.monotonic() - began)
    asked = time.monotonic()
    process.send_signal(number)
    process.stdout.read()
    assert process.wait(HANGS) == 128 + number
    assert time.monotonic() - asked < patience
    results = results_of(tmp_path)
    assert results["status"] == "interrupted"
    assert 3 <= results["epochs"] == len(results["history"])


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_interrupted_run_continues_exactly(tmp_path: Path, forked: Forked, number: signal.Signals) -> None:
    """Stopped in the middle of an epoch, twice, and continued: weights and results of a run never stopped, bit-identical."""
    arguments = (*TINY, "trainer.epochs=6", "model.dropout=0.1", "augment.flip=true", "trainer.checkpoint_every=2")
    assert forked.run(tmp_path / "whole", *arguments)[0] == 0
    for _ in range(2):
        # Checkpoints are of the start, and of two steps and the end of each epoch.
        stop = partial(signal_at_file, number, "checkpoint.pt", 5)
        assert forked.wait(forked.start(tmp_path / "parts", *arguments, before=stop)) == 128 + number
        assert results_of(tmp_path / "parts")["status"] == "interrupted"
    status, output = forked.run(tmp_path / "parts", *arguments)
    assert status == 0, output
    assert "Continuing after" in output

    timings = {"seconds", "images_per_second", "overrides", "name"}
    whole, parts = (results_of(tmp_path / name) for name in ("whole", "parts"))
    for row in (*whole["history"], *parts["history"]):
        del row["images_per_second"]
    for results, name in ((whole, "whole"), (parts, "parts")):
        (metrics,) = (tmp_path / name).glob("outputs/*/*/metrics.csv")
        with open(metrics, newline="") as file:
            rows = [(int(row["epoch"]), float(row["test_loss"])) for row in csv.DictReader(file)]
        assert rows == [(row["epoch"], row["test_loss"]) for row in results["history"]]
    assert {k: v for k, v in whole.items() if k not in timings} == {k: v for k, v in parts.items() if k not in timings}
    states = [torch.load(next((tmp_path / n).glob("outputs/*/*/checkpoint.pt")), weights_only=True) for n in ("whole", "parts")]
    for kind in ("model", "best_model"):
        for name, tensor in states[0][kind].items():
            assert torch.equal(tensor, states[1][kind][name]), name


def test_the_same_command_again(tmp_path: Path) -> None:
    """A finished run is not run again, nor overwritten by another config; ``rerun=true`` moves it aside."""
    assert run_train(tmp_path, *TINY).returncode == 0
    (directory,) = tmp_path.glob("outputs/*/seed=0")
    before = (directory / "results.json").read_bytes()
    again = run_train(tmp_path, *TINY)
    assert again.returncode == 0
    assert "Already finished, skipping" in again.stdout
    assert (directory / "results.json").read_bytes() == before

    # The same name with another meaning: a user edits YAML.
    results = json.loads(before)
    results["config"]["optimizer"]["lr"] = 0.5
    (directory / "results.json").write_text(json.dumps(results))
    refused = run_train(tmp_path, *TINY)
    assert refused.returncode == 1
    assert "optimizer.lr was 0.5 and is 0.001" in refused.stderr
    assert "rerun=true" in refused.stderr
    assert json.loads((directory / "results.json").read_text()) == results

    rerun = run_train(tmp_path, *TINY, "rerun=true")
    assert rerun.returncode == 0, rerun.stderr
    assert json.loads((directory / "results.json").read_text())["train_loss"] == results["train_loss"]
    assert json.loads((directory / "previous-1" / "results.json").read_text()) == results
    assert (directory / "previous-1" / "checkpoint.pt").is_file()
    assert all(len((directory / name / "metrics.csv").read_text().splitlines()) == 3 for name in (".", "previous-1"))


def test_the_error_of_a_second_process_names_the_first(tmp_path: Path, forked: Forked) -> None:
    arguments = (*TINY, "trainer.epochs=100000")
    process = forked.start(tmp_path, *arguments)
    while not list(tmp_path.glob("outputs/*/*/results.json")):
        assert forked.is_running(process)
        time.sleep(0.01)
    second = run_train(tmp_path, *arguments)
    assert second.returncode == 1
    assert f"process {process} on {os.uname().nodename}" in second.stderr
    assert forked.kill(process) == -signal.SIGKILL


def test_multirun(tmp_path: Path) -> None:
    """Jobs get directories of their own; one that is refused or fails is recorded there and the others still run."""
    jobs = ("seed=0,1", "attention.landmarks=8,1000")
    done = run_train(tmp_path, "-m", *TINY, *jobs, COLUMNS="200")
    assert done.returncode == 1
    results = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/*/*/results.json")]
    states = sorted((r["status"], r["seed"], r["config"]["attention"]["landmarks"]) for r in results)
    assert states == [("finished", 0, 8), ("finished", 1, 8), ("refused", 0, 1000), ("refused", 1, 1000)]
    assert all("attention.landmarks=1000" in r["error"] for r in results if r["status"] == "refused")
    assert done.stderr.splitlines()[-1] == "error: 2 of this sweep's jobs did not finish"
    rows = table_after(done.stdout, "jobs of this sweep")
    assert [row[:3] for row in rows] == [
        ["attention.landmarks=8 seed=0", "finished", f"{top1_of(results, 0):.2f}"],
        ["attention.landmarks=1000 seed=0", "refused", ""],
        ["attention.landmarks=8 seed=1", "finished", f"{top1_of(results, 1):.2f}"],
        ["attention.landmarks=1000 seed=1", "refused", ""],
    ]
    assert all("attention.landmarks=1000 is more than the 65 tokens" in row[4] for row in rows if row[1] == "refused")
    assert not list(tmp_path.glob("outputs/.sweeps*"))
    assert len({r["train_loss"] for r in results if r["status"] == "finished"}) == 2
    good = run_train(tmp_path, "-m", *TINY, "seed=0,1", "attention.landmarks=8")
    assert good.returncode == 0
    assert good.stdout.count("Already finished, skipping") == 2
    assert [row[1] for row in table_after(good.stdout, "jobs of this sweep")] == ["finished before"] * 2


def top1_of(results: list[dict[str, Any]], seed: int) -> float:
    (top1,) = (r["top1"] for r in results if r["seed"] == seed and r["status"] == "finished")
    return float(top1)


def test_fail_fast(tmp_path: Path) -> None:
    """The first failure keeps the jobs after it from beginning, and they are listed all the same."""
    done = run_train(tmp_path, "-m", *TINY, "attention.landmarks=8,1000,16", "fail_fast=true", COLUMNS="200")
    assert done.returncode == 1
    assert [row[1] for row in table_after(done.stdout, "jobs of this sweep")] == ["finished", "refused", "not run"]
    assert len(list(tmp_path.glob("outputs/*/*/results.json"))) == 2
    last = ("-m", *TINY, "attention.landmarks=16")
    assert run_train(tmp_path, *last).returncode == 0
    (hydra,) = tmp_path.glob("outputs/*landmarks=16*/*/.hydra/hydra.yaml")
    kept = hydra.read_text()
    again = run_train(tmp_path, "-m", *TINY, "attention.landmarks=1000,16", "fail_fast=true", COLUMNS="200")
    assert [row[1] for row in table_after(again.stdout, "jobs of this sweep")] == ["refused", "not run"]
    assert hydra.read_text() == kept  # what an earlier sweep has recorded about its run


def test_the_command_that_a_run_prints_repeats_it(tmp_path: Path) -> None:
    first = run_train(tmp_path, *TINY, "optimizer.lr=3e-4", "seed=3", "trainer.resume=force")
    results = json.loads(next(tmp_path.glob("outputs/*/*/results.json")).read_text())
    assert f"To reproduce: {results['command']}" in first.stdout
    command = shlex.split(results["command"])
    assert command[:2] == ["python", "train.py"]
    (tmp_path / "elsewhere").mkdir()
    assert run_train(tmp_path / "elsewhere", *command[2:]).returncode == 0
    again = json.loads(next(tmp_path.glob("elsewhere/outputs/*/*/results.json")).read_text())
    same = ("name", "top1", "train_loss", "best_epoch", "command")
    assert {k: again[k] for k in same} == {k: results[k] for k in same}


def test_a_failed_run_keeps_its_traceback(tmp_path: Path) -> None:
    done = run_train(tmp_path, "data.root=nowhere", "trainer.epochs=1")
    assert done.returncode == 1
    results = results_of(tmp_path)
    assert results["status"] == "failed"
    assert "cifar-10-batches-py" in results["error"]
    assert "DataError" in results["traceback"]
    assert "experiment=quickstart" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    """Epoch, loss, accuracy, images/s and time left, on a terminal."""
    import pty

    primary, secondary = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    # Many small steps, so that an epoch outlasts the half second between two updates of the bar on any processor.
    many_steps = ("experiment=quickstart", "trainer.epochs=2", "trainer.batch_size=2", "model.depth=1")
    command = [sys.executable, str(ROOT / "train.py"), *many_steps]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=secondary, stderr=secondary, env=environment)
    os.close(secondary)
    shown = b""
    while True:
        try:
            chunk = os.read(primary, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait(HANGS) == 0
    text = shown.decode()
    assert "epoch 2/2" in text
    bars = [
        part for part in text.split("\r") if "epoch 2/2" in part and "loss" in part and "images/s" in part and "top-1" in part
    ]
    assert any(re.search(r"\d:\d\d:\d\d", bar) for bar in bars), bars[:3]
