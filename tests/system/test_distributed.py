"""One run in two processes, started by torchrun with gloo: the same numbers as in one, and one set of files."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HANGS, ROOT, TINY, run_train
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vix
from vix.__main__ import main
from vix.build import parse
from vix.cli.launch import launch
from vix.errors import UserError
from vix.system.distributed import check_environment, local_rank, local_world_size, rank, world_size
from vix.training.evaluate import accuracy

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
        (
            *("trainer.micro_batch=3", "trainer.clip_norm=0.1", "trainer.activation_checkpointing=full"),
            *("attention=performer", "attention.redraw_every=2"),
        ),
    ],
    ids=["whole", "micro-batches"],
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


# train.py, with SIGTERM to torchrun when the third epoch's results are written; the run waits until torchrun passes it on. The
# largest number of images that each process evaluates at once is written to a file.
STOPPED = f"""
import os, runpy, select, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import vix.training.evaluate
from forked import before_each_change

largest = 0
logits = vix.training.evaluate.evaluated_logits

def record_size(model, images, *options):
    global largest
    largest = max(largest, len(images))
    open("evaluated-" + os.environ["RANK"], "w").write(str(largest))
    return logits(model, images, *options)

vix.training.evaluate.evaluated_logits = record_size
arrived, wakeup = os.pipe()
os.set_blocking(wakeup, False)
# results.json is written at the run's start, before the first epoch, and after each epoch. Only the first start is stopped.
left = [0 if os.path.exists("evaluated-0") else 5]

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
    """SIGTERM to torchrun, as a scheduler sends it: both processes stop at the same step, and end as if undisturbed.

    With dropout, whose numbers differ between the processes, and with BatchNorm, whose running statistics do. The accuracy is
    that of the saved model.
    """
    settings = (*UNEVEN, "trainer.epochs=8", "attention=levit", "model.dropout=0.2", "trainer.eval_batch_size=21")
    program = tmp_path / "stopped.py"
    program.write_text(STOPPED)
    process = start(tmp_path, *settings, program=program)
    _, errors = process.communicate(timeout=HANGS)
    stopped = results_of(tmp_path)
    assert stopped["status"] == "interrupted", errors
    assert stopped["epochs"] == 3
    again, undisturbed = start(tmp_path, *settings, program=program), start(tmp_path / "undisturbed", *settings)
    output, errors = again.communicate(timeout=HANGS)
    assert again.returncode == 0, errors
    assert "Continuing after 3 epochs" in output
    assert undisturbed.wait(HANGS) == 0
    results = results_of(tmp_path)
    for name in ("train_loss", "test_loss", "top1"):
        expected = [row[name] for row in results_of(tmp_path / "undisturbed")["history"]]
        assert [row[name] for row in results["history"]] == expected
    (run,) = tmp_path.glob("outputs/*/*")
    test = parse(OmegaConf.create(results["config"])).data.load_evaluated(torch.device("cpu"))
    scores = accuracy(vix.load_model(run), test.eval_batches(50), torch.autocast("cpu", enabled=False), test.classes)
    assert scores["test_loss"] == pytest.approx(results["test_loss"], rel=1e-5)
    assert [(tmp_path / f"evaluated-{rank}").read_text() for rank in range(2)] == ["11", "10"]  # halves of 21


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"WORLD_SIZE": "2"}, "without RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "without MASTER_ADDR"),
        (dict.fromkeys(("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"), "x"), "which is no number"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "with RANK=x, which is none"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "with RANK=2, which is none"),
        ({"WORLD_SIZE": ""}, ""),
        ({"WORLD_SIZE": "1"}, ""),
    ],
)
def test_variables_that_torchrun_did_not_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], reason: str
) -> None:
    """Such as those of a cluster."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not reason:
        check_environment()
        assert world_size() == 1
        return
    with pytest.raises(UserError, match=f"^WORLD_SIZE=.* is set in the environment, {reason}"):
        check_environment()
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert launch(lambda: None) == 2
    monkeypatch.setattr(sys, "argv", ["vix", "plan"])
    with pytest.raises(SystemExit, match=r"^error: WORLD_SIZE="):
        main()
    assert capsys.readouterr().err.startswith("error: WORLD_SIZE=")
    monkeypatch.setattr(sys, "argv", ["vix", "report", str(ROOT / "results" / "full_size"), "--no-files"])
    main()  # only reads files
    assert "mixer" in capsys.readouterr().out


def test_processes_that_another_launcher_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """LOCAL_RANK and LOCAL_WORLD_SIZE are torchrun's; training on a CPU needs neither."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    check_environment()
    assert (world_size(), rank(), local_world_size(), local_rank()) == (4, 3, 4, None)


@pytest.mark.slow
def test_a_process_that_is_refused_alone_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    """Without torchrun, which would end them. The device of the second process does not exist on this machine."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *TINY, "hydra.run.dir=run", f"trainer.device={device}"],
            cwd=tmp_path,
            env=os.environ | variables | {"RANK": str(number)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, device in enumerate(("cpu", "xpu:9"))
    ]
    first, second = (process.communicate(timeout=HANGS)[1] for process in processes)
    assert second.startswith("error: trainer.device=xpu:9")
    assert "another process of this run was lost" in first
    assert json.loads((tmp_path / "run/results.json").read_text())["status"] == "interrupted"


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
