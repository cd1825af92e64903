"""Sweeps on a real Slurm of two nodes, which the tests start on this machine."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from common import table_after
from conftest import HANGS, ROOT, run_train
from paused import SMALL, end_with_this_process, go_on, paused, pausing, results_in, wait_until
from slurm_cluster import NODES, Cluster, cluster

from vix.system.threads import visible_cpus

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]

LAUNCHER = (
    "-m",
    "hydra/launcher=slurm",
    "hydra.launcher.partition=cpu",
    "hydra.launcher.gpus_per_node=null",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=2",
)


def need_the_launcher() -> None:
    if not find_spec("hydra_plugins") or not find_spec("hydra_plugins.hydra_submitit_launcher"):
        pytest.skip("hydra-submitit-launcher is not installed: pip install -r requirements-launchers.txt")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    need_the_launcher()
    with cluster() as running:
        yield running


@pytest.fixture(scope="module")
def limited(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "Sweep"]:
    """A sweep that takes minutes, since Slurm looks at time limits every half a minute. Other tests run meanwhile."""
    directory = tmp_path_factory.mktemp("limited")
    launcher = ("hydra.launcher.partition=alone", "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=30")
    return directory, Sweep(slurm, directory, *launcher, "seed=7", pauses=(1, 2))


class Sweep:
    """A command that waits for its jobs."""

    def __init__(self, slurm: Cluster, directory: Path, *overrides: str, pauses: tuple[int, ...] = (), **env: str) -> None:
        environment = pausing(*pauses, COLUMNS="400", **slurm.env, **env)
        del environment["OMP_NUM_THREADS"]  # Slurm says how many CPUs a job has
        command = [sys.executable, str(ROOT / "train.py"), *LAUNCHER, *SMALL, *overrides]
        pipe, prepare = subprocess.PIPE, end_with_this_process
        self.process = subprocess.Popen(
            command, cwd=directory, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=prepare
        )

    def paused(self, directory: Path, epoch: int, count: int = 1) -> list[Path]:
        return paused(directory, epoch, count, self.ended)

    def ended(self) -> str:
        """The output of a command that has ended."""
        return "" if self.process.poll() is None else "\n".join(map(str, self.process.communicate()))

    def wait(self) -> tuple[int, str, str]:
        """Exit status and output; no warning is printed twice."""
        output, errors = self.process.communicate(timeout=HANGS)
        lines = [re.sub(r"\d+", "N", line) for line in (output + errors).splitlines() if re.search("warn|error", line.lower())]
        assert len(lines) == len(set(lines)), lines
        return self.process.returncode, output, errors


def undisturbed(directory: Path, *overrides: str) -> Path:
    alone = directory / "alone"
    alone.mkdir(exist_ok=True)
    assert run_train(alone, *SMALL, *overrides).returncode == 0
    return alone


def comparable(directory: Path) -> list[dict[str, object]]:
    """Results of the runs below a directory, without times and the number of starts."""
    results = results_in(directory)
    for row in [row for result in results for row in (result, *result["history"])]:
        row.pop("images_per_second")
    return [{k: v for k, v in result.items() if k in ("status", "history", "top1", "epochs", "config")} for result in results]


@pytest.mark.usefixtures("limited")
def test_four_jobs_two_at_a_time(tmp_path: Path, slurm: Cluster) -> None:
    """Each in a directory of its own, with the one CPU that it was given; from within an allocation with another memory."""
    allocation = {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_CPU": "500"}  # srun refuses that next to the jobs' own
    sweep = Sweep(slurm, tmp_path, "hydra.launcher.array_parallelism=2", "seed=0,1,2,3", pauses=(1,), **allocation)
    first = sweep.paused(tmp_path, 1, 2)
    assert sorted(state for (state,) in slurm.jobs("%T")) == ["PENDING", "PENDING", "RUNNING", "RUNNING"]
    for run in first:
        go_on(run, 1)
    for run in sweep.paused(tmp_path, 1, 4):
        go_on(run, 1)
    status, output, errors = sweep.wait()
    assert status == 0, output + errors
    assert [(r["seed"], r["status"], r["threads"]) for r in results_in(tmp_path)] == [(n, "finished", 1) for n in range(4)]
    assert [row[:2] for row in table_after(output, "jobs of this sweep")] == [[f"seed={n}", "finished"] for n in range(4)]


def test_requeued_or_sent_sigterm(tmp_path: Path, slurm: Cluster) -> None:
    """A job that was requeued ends by itself; one that was sent SIGTERM is continued by the same command."""
    sweep = Sweep(slurm, tmp_path, "seed=0,1", pauses=(1,))
    sweep.paused(tmp_path, 1, 2)
    requeued, ended = sorted(job for (job,) in slurm.jobs())
    slurm.command("scontrol", "requeue", requeued)
    slurm.command("scancel", "--signal=TERM", ended)
    status, output, errors = sweep.wait()
    assert status == 1, output + errors
    states = [row[:2] for row in table_after(output, "jobs of this sweep")]
    assert states == [["seed=0", "finished"], ["seed=1", "interrupted"]]
    assert results_in(tmp_path)[1]["status"] == "interrupted"
    status, output, errors = Sweep(slurm, tmp_path, "seed=0,1").wait()
    assert status == 0, output + errors
    states = [row[:2] for row in table_after(output, "jobs of this sweep")]
    assert states == [["seed=0", "finished before"], ["seed=1", "finished"]]
    for seed in range(2):
        expected = comparable(undisturbed(tmp_path, f"seed={seed}"))
    assert comparable(tmp_path) == expected


def test_preempted(tmp_path: Path, slurm: Cluster) -> None:
    """A job of a partition with a grace time saves, is queued again, and ends as if it had never been stopped."""
    sweep = Sweep(slurm, tmp_path, "hydra.launcher.partition=graced", "seed=7", pauses=(1,))
    sweep.paused(tmp_path, 1)
    slurm.submit("--partition=urgent", "--exclusive", "--mem=1G")
    status, output, errors = sweep.wait()
    assert status == 0, output + errors
    assert comparable(tmp_path) == comparable(undisturbed(tmp_path, "seed=7"))


def test_killed_by_the_memory_limit(tmp_path: Path, slurm: Cluster) -> None:
    """The job says so in its results and in the table; the other one finishes."""
    sweep = Sweep(slurm, tmp_path, "hydra.launcher.mem_gb=1", "model.depth=1,2000", "model.dim=128")
    status, output, errors = sweep.wait()
    assert status == 1, output + errors
    (small, killed) = table_after(output, "jobs of this sweep")
    assert (small[1], killed[1]) == ("finished", "failed"), output
    assert killed[-1].startswith("out of memory: Slurm killed job")
    assert "hydra.launcher.mem_gb" in killed[-1]
    failed = [results for results in results_in(tmp_path) if results["status"] == "failed"]
    assert [results["config"]["model"]["depth"] for results in failed] == [2000]
    assert failed[0]["error"].startswith("out of memory: Slurm killed job")


def test_two_nodes_and_two_processes_per_job(tmp_path: Path, slurm: Cluster) -> None:
    """Each job has a node to itself, for two processes; together they write outputs/, with the losses of one process."""
    settings = ("data.train_size=41", "seed=0,1")
    launcher = ("hydra.launcher.partition=both", "hydra.launcher.tasks_per_node=2", "hydra.launcher.cpus_per_task=2")
    sweep = Sweep(slurm, tmp_path, *launcher, *settings, pauses=(1,))
    runs = sweep.paused(tmp_path, 1, 2)
    assert sorted(slurm.jobs("%N %T")) == [[node, "RUNNING"] for node in NODES[:2]]
    for run in runs:
        go_on(run, 1)
    status, output, errors = sweep.wait()
    assert status == 0, output + errors
    assert [row[:2] for row in table_after(output, "jobs of this sweep")] == [[f"seed={n}", "finished"] for n in range(2)]
    results = results_in(tmp_path)
    threads = min(2, max(1, visible_cpus() // 2))
    assert [(r["processes"], r["threads"]) for r in results] == [(2, threads)] * 2
    for seed, two in enumerate(results):
        alone = undisturbed(tmp_path, "data.train_size=41", f"seed={seed}")
        one = json.loads(next(alone.glob(f"outputs/*/seed={seed}/results.json")).read_text())
        losses = [[row["train_loss"] for row in result["history"]] for result in (one, two)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_job_of_two_processes_that_is_not_run(tmp_path: Path, slurm: Cluster) -> None:
    """The first of them says so, and the other one, which waits for it, ends as well."""
    launcher = ("hydra.launcher.tasks_per_node=2", "hydra.launcher.array_parallelism=1")
    status, output, errors = Sweep(slurm, tmp_path, *launcher, "attention.landmarks=1000,8", "fail_fast=true").wait()
    assert status == 1, output + errors
    assert [row[1] for row in table_after(output, "jobs of this sweep")] == ["refused", "not run"]


def test_an_array_that_slurm_refuses(tmp_path: Path, slurm: Cluster) -> None:
    status, output, errors = Sweep(slurm, tmp_path, "hydra.launcher.partition=nosuch", "seed=0,1").wait()
    assert status == 1, output
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "the jobs were not submitted (sbatch: error:" in line
    assert "Traceback" not in errors


def test_ctrl_c_cancels_the_jobs(tmp_path: Path, slurm: Cluster) -> None:
    """They save first."""
    sweep = Sweep(slurm, tmp_path, "seed=0", pauses=(1,))
    sweep.paused(tmp_path, 1)
    sweep.process.send_signal(2)
    status, output, errors = sweep.wait()
    assert status == 130, output + errors
    assert "the same command continues" in errors
    assert results_in(tmp_path)[0]["status"] == "interrupted"
    wait_until(lambda: not slurm.jobs())


def test_with_accounting(tmp_path: Path) -> None:
    """In a database, as most clusters have it."""
    need_the_launcher()
    with cluster(accounting=True) as slurm:
        status, output, errors = Sweep(slurm, tmp_path, "seed=0").wait()
        assert status == 0, output + errors
        # The records arrive a little later than the job's end.
        wait_until(lambda: "COMPLETED" in slurm.command("sacct", "-n", "-o", "state"))


def test_a_job_that_reaches_its_time_limit_gets_further_each_time(limited: tuple[Path, Sweep]) -> None:
    """It is queued again twice, on a slow machine more often, and ends as if it had never been stopped."""
    directory, sweep = limited
    status, output, errors = sweep.wait()
    assert status == 0, output + errors
    (log,) = directory.glob("outputs/*/*/train.log")
    assert log.read_text().count("Stopped by signal 12") >= 2
    assert comparable(directory) == comparable(undisturbed(directory, "seed=7"))
