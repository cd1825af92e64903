"""Signals that arrive at the moments in which one is easily lost, or in which what is saved would be wrong."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from common import fit
from conftest import ROOT, TINY
from omegaconf import DictConfig

from vix.runs.run import RunDirectory, read_results
from vix.system import signals
from vix.system.signals import SignalHandler
from vix.training import trainer

Compose = Callable[..., DictConfig]
STOPPED = 128 + signal.SIGTERM


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_one_that_arrives_during_the_communication_is_communicated_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes agree on the signal that each had when the communication began."""

    def all_reduce_max(number: int) -> int:
        if not handler.signal:
            stop()
        return number

    monkeypatch.setattr(signals, "world_size", lambda: 2)
    monkeypatch.setattr(signals, "all_reduce_max", all_reduce_max)
    with SignalHandler() as handler:
        assert handler.received(communicate=True) is None
        assert handler.received(communicate=False) is None
        assert handler.received(communicate=True) == signal.SIGTERM


def test_one_before_a_long_operation_interrupts_it() -> None:
    left: list[str] = []
    with SignalHandler() as handler:
        stop()
        with pytest.raises(SystemExit) as exited, handler.interruptible(lambda: left.append("once")):
            left.append("the operation")
    assert exited.value.code == STOPPED
    assert left == ["once"]


def test_nothing_is_saved_during_compilation(compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dry runs may not have been undone, so the run continues from what was saved before."""

    def compile_step(*_: Any) -> float:
        torch.rand(7)
        stop()
        return 0.0

    monkeypatch.setattr(trainer, "compile_step", compile_step)
    cfg = compose_config(*TINY)
    with pytest.raises(SystemExit) as exited:
        fit(cfg, tmp_path / "stopped")
    assert exited.value.code == STOPPED
    assert read_results(tmp_path / "stopped" / "results.json")["status"] == "interrupted"
    monkeypatch.undo()
    continued, whole = fit(cfg, tmp_path / "stopped")[1], fit(cfg, tmp_path / "whole")[1]
    saved = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("stopped", "whole")]
    assert torch.equal(*(state["rng"]["torch"] for state in saved))
    for a, b in zip(continued.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_while_a_step_is_located(compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch's steps may be repeated for that, which takes long; the checkpoint stays as it is."""
    located, begun = trainer.locate_step, list[bytes]()

    def locate_step(*arguments: Any) -> Any:
        begun.append((tmp_path / "checkpoint.pt").read_bytes())
        stop()
        return located(*arguments)

    monkeypatch.setattr(trainer, "locate_step", locate_step)
    with pytest.raises(SystemExit) as exited:
        fit(compose_config(*TINY, "optimizer.lr=1e30"), tmp_path)
    assert exited.value.code == STOPPED
    assert read_results(tmp_path / "results.json")["status"] == "interrupted"
    assert begun == [(tmp_path / "checkpoint.pt").read_bytes()]


def test_a_run_whose_epochs_are_done_is_not_compiled(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example one that was interrupted in its final evaluation."""

    def compile_step(*_: Any) -> NoReturn:
        raise AssertionError("compiled")

    cfg = compose_config(*TINY)
    first, _ = fit(cfg, tmp_path)
    RunDirectory(tmp_path, {}, first["config"]).write_results(**(first | {"status": "interrupted"}))
    monkeypatch.setattr(trainer, "compile_step", compile_step)
    again, _ = fit(cfg, tmp_path)
    assert again["status"] == "finished"
    assert again["history"] == first["history"]


@pytest.mark.parametrize(("ignored", "status"), [(False, -signal.SIGINT), (True, 7)], ids=["in a terminal", "ignored"])
def test_ctrl_c_while_libraries_are_imported(tmp_path: Path, ignored: bool, status: int) -> None:
    """It ends the process without a traceback, unless whoever started it lets it ignore Ctrl-C, as ``nohup … &`` does."""
    (tmp_path / "hydra.py").write_text("import os, signal, sys\nos.kill(os.getpid(), signal.SIGINT)\nsys.exit(7)\n")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py")],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
