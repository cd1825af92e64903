"""TensorBoard's own reader sees every epoch of a continued run, whatever the clock said."""

import json
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import TINY
from forked import Forked, signal_at_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ARGUMENTS = (*TINY, "trainer.epochs=4", "trainer.compile=false", "hydra.run.dir=outputs/run")
YEAR = 365 * 24 * 3600.0


def begin(clock: float | None, shift: float, stop_at: int) -> None:
    """Set this process's clock: ``clock`` where it stands still, else shifted. SIGTERM before the checkpoint of that number."""
    now = time.time
    time.time = lambda: now() + shift if clock is None else clock + shift
    if stop_at:
        signal_at_file(signal.SIGTERM, "checkpoint.pt", stop_at)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clock", "shifts"),
    [
        (None, (0.0, -YEAR, -2 * YEAR)),
        (1.7e9, (0.0, 300 * YEAR, YEAR)),  # in between, ahead into years whose seconds have a digit more
    ],
)
def test_every_epoch_is_shown(tmp_path: Path, forked: Forked, clock: float | None, shifts: tuple[float, ...]) -> None:
    contents: dict[str, bytes] = {}
    run = tmp_path / "outputs/run"
    for shift, stop_at in zip(shifts, (3, 1, 0), strict=True):
        status, output = forked.run(tmp_path, *ARGUMENTS, before=partial(begin, clock, shift, stop_at))
        assert status == (128 + signal.SIGTERM if stop_at else 0), output
        for name, earlier in contents.items():
            assert (run / name).read_bytes() == earlier
        contents = {path.name: path.read_bytes() for path in run.glob("events.*")}
    assert len(contents) == 3
    results = json.loads((run / "results.json").read_text())
    assert results["status"] == "finished"
    shown = EventAccumulator(str(run))
    shown.Reload()
    history = results["history"]
    assert [event.step for event in shown.Scalars("loss/train")] == [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert [event.value for event in shown.Scalars("loss/train")] == pytest.approx([row["train_loss"] for row in history])
    assert [event.step for event in shown.Scalars("final/top1")] == [4]
    assert [event.step for event in shown.Images("test/confusion_matrix")] == [4]
    assert "TensorBoard" not in output
