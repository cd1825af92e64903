"""Several runs at once on this machine: what ends one of them, or their sweep, loses nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from common import table_after
from conftest import HANGS, ROOT, run_train
from paused import SMALL, end_with_this_process, go_on, paused, pausing, results_in, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cores")]
SWEEP = ("-m", "hydra/launcher=cores", *SMALL)


def start_sweep(directory: Path, *overrides: str) -> subprocess.Popen[str]:
    command, pipe = [sys.executable, str(ROOT / "train.py"), *SWEEP, *overrides], subprocess.PIPE
    return subprocess.Popen(
        command,
        cwd=directory,
        env=pausing(1, COLUMNS="300"),
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_this_process,
    )


@pytest.mark.parametrize(("stop", "status"), [("Ctrl-C", 130), ("SIGTERM", 143)])
def test_what_ends_the_sweep_saves_first(tmp_path: Path, stop: str, status: int) -> None:
    """Ctrl-C in a terminal reaches every process, SIGTERM the command alone. The same command continues."""
    sweep = start_sweep(tmp_path, "hydra.launcher.n_jobs=2", "seed=0,1,2")
    runs = paused(tmp_path, 1, 2)
    if stop == "Ctrl-C":
        os.killpg(sweep.pid, signal.SIGINT)
    else:
        sweep.terminate()
    output, errors = sweep.communicate(timeout=HANGS)
    assert sweep.returncode == status, output + errors
    assert "Traceback" not in output + errors
    assert [row[1] for row in table_after(output, "jobs of this sweep")] == ["interrupted"] * 2
    assert [(r["status"], r["epochs"]) for r in results_in(tmp_path)] == [("interrupted", 1)] * 2
    assert len(runs) == 2
    again = run_train(tmp_path, *SWEEP, "seed=0,1,2", fresh=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("Continuing after 1 epochs") == 2
    assert [r["status"] for r in results_in(tmp_path)] == ["finished"] * 3


def test_a_killed_process_ends_no_other_run(tmp_path: Path) -> None:
    """As where the system's memory is short: the table and the results say so, the others finish, also those that wait."""
    sweep = start_sweep(tmp_path, "hydra.launcher.n_jobs=2", "seed=0,1,2")
    first, second = paused(tmp_path, 1, 2)
    victim = int((first / ".lock").read_text().split()[1])  # process 123 on HOST
    os.kill(victim, signal.SIGKILL)
    third = wait_until(lambda: {*tmp_path.glob("**/paused-1")} - {first / "paused-1", second / "paused-1"}).pop().parent
    for run in (first, second, third):
        go_on(run, 1)
    output, errors = sweep.communicate(timeout=HANGS)
    assert sweep.returncode == 1, output + errors
    rows = table_after(output, "jobs of this sweep")
    assert sorted(row[1] for row in rows) == ["failed", "finished", "finished"]
    (reason,) = [row[-1] for row in rows if row[1] == "failed"]
    assert reason.startswith("its process was ended by signal 9, which the system sends when memory is short")
    (failed,) = [r for r in results_in(tmp_path) if r["status"] == "failed"]
    assert failed["error"] == reason
    again = run_train(tmp_path, *SWEEP, "seed=0,1,2", fresh=True)
    assert again.returncode == 0, again.stdout + again.stderr
    states = [row[1] for row in table_after(again.stdout, "jobs of this sweep")]
    assert sorted(states) == ["finished", "finished before", "finished before"]
