"""One run in two processes, started by torchrun with gloo: the same numbers as in one, and one set of files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import HANGS, ROOT, TINY, run_train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# 41 images in batches of 20: the last batch has one, so the second process has a share of none.
UNEVEN = (*TINY, "data.train_size=41", "model.dropout=0", "trainer.epochs=3", "optimizer.lr=1e-2")


def start(directory: Path, *overrides: str, program: Path = ROOT / "train.py") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    directory.mkdir(exist_ok=True)
    output = subprocess.PIPE
    return subprocess.Popen([*command, *overrides], cwd=directory, env=environment, stdout=output, stderr=output, text=True)


def results_of(directory: Path) -> dict[str, Any]:
    (path,) = directory.glob("outputs/*/*/results.json")
    results: dict[str, Any] = json.loads(path.read_text())
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("trainer.micro_batch=3", "trainer.clip_norm=0.1", "trainer.activation_checkpointing=full"),
        ("attention=performer", "attention.redraw_every=2"),
    ],
    ids=["whole", "micro-batches", "performer"],
)
def test_two_processes_train_as_one(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    process = start(tmp_path / "two", *UNEVEN, *overrides)
    output, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 0, errors
    assert output.count("epoch 3/3") == 1
    assert run_train(tmp_path, *UNEVEN, *overrides).returncode == 0
    one, two = results_of(tmp_path), results_of(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["command"].startswith("python train.py experiment=quickstart ")
    assert two["command"] == one["command"].replace("python ", "torchrun --standalone --nproc-per-node=2 ", 1)
    assert [row["train_loss"] for row in two["history"]] == pytest.approx(
        [row["train_loss"] for row in one["history"]], abs=1e-4
    )
    assert (two["top1"], two["top5"], two["test_images"]) == (one["top1"], one["top5"], one["test_images"])
    (directory,) = (tmp_path / "two").glob("outputs/*/*")
    assert len(list(directory.glob("events.*"))) == 1
    assert len(EventAccumulator(str(directory)).Reload().Scalars("loss/train")) == 3


# train.py, with SIGTERM to torchrun when the third epoch's results are written; the run waits until torchrun passes it on.
STOPPED = f"""
import os, runpy, select, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from forked import before_each_change

arrived, wakeup = os.pipe()
os.set_blocking(wakeup, False)
left = [5]  # results.json is written at the run's start, before the first epoch, and after each epoch

def stop(event, path):
    if event == "os.rename" and path.endswith("results.json"):
        left[0] -= 1
        if left[0] == 0:
            signal.set_wakeup_fd(wakeup)
            os.kill(os.getppid(), signal.SIGTERM)
            select.select([arrived], [], [])

before_each_change(stop)
sys.argv[0] = {str(ROOT / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_stops_and_continues(tmp_path: Path) -> None:
    """SIGTERM to torchrun, as a scheduler sends it: both processes stop at the same step, and continue from there."""
    settings = (*UNEVEN, "trainer.epochs=8", "trainer.resume=force")
    program = tmp_path / "stopped.py"
    program.write_text(STOPPED)
    process = start(tmp_path, *settings, program=program)
    _, errors = process.communicate(timeout=HANGS)
    stopped = results_of(tmp_path)
    assert stopped["status"] == "interrupted", errors
    assert stopped["epochs"] == 3
    again = start(tmp_path, *settings)
    output, errors = again.communicate(timeout=HANGS)
    assert again.returncode == 0, errors
    assert "Continuing after 3 epochs" in output
    assert len(results_of(tmp_path)["history"]) == 8


@pytest.mark.slow
def test_what_it_refuses(tmp_path: Path) -> None:
    sweep = start(tmp_path, "-m", *TINY, "seed=0,1")
    _, errors = sweep.communicate(timeout=HANGS)
    assert sweep.returncode != 0
    assert "error: -m: torchrun starts one run in several processes" in errors
    wrong = start(tmp_path, *TINY, "model.dimm=3")
    _, errors = wrong.communicate(timeout=HANGS)
    assert wrong.returncode != 0
    assert errors.count("model.dimm") == 1
