"""The CPUs that a run was given, and the threads that it then uses: by fake files and variables, and with real launchers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import HANGS, ROOT, TINY

from vix.system.threads import cpu_quota, given_threads, set_wait_policy

SHORT = (*TINY, "trainer.epochs=1")
# Variables that say how many threads a process has, which the tests themselves are started with.
OURS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a user who has chosen no threads, with these variables."""
    return {name: value for name, value in os.environ.items() if name not in OURS} | variables


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {
    "proc/self/cgroup": "0::/machine/pod/container\n",
    "proc/self/mountinfo": "30 20 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
}
V1 = {
    "proc/self/cgroup": "12:memory:/other\n4:cpu,cpuacct:/docker/abc\n0::/\n",
    "proc/self/mountinfo": (
        "30 20 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "31 20 0:27 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
        "32 20 0:28 / /sys/fs/cgroup/cpuset ro - cgroup cgroup rw,cpuset\n"
    ),
}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        (V2, None),
        (V2 | {"sys/fs/cgroup/machine/pod/container/cpu.max": "max 100000\n"}, None),
        (V2 | {"sys/fs/cgroup/machine/pod/container/cpu.max": "250000 100000\n"}, 2.5),
        # The limit of a group holds for those in it.
        (
            V2
            | {
                "sys/fs/cgroup/machine/pod/container/cpu.max": "max 100000",
                "sys/fs/cgroup/machine/pod/cpu.max": "300000 100000",
                "sys/fs/cgroup/machine/cpu.max": "800000 100000",
            },
            3,
        ),
        # In a container's own view the group's path is the root, or begins above what is mounted.
        (V2 | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
        (V2 | {"proc/self/cgroup": "0::/../elsewhere\n", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        (V2 | {"sys/fs/cgroup/cpu.max": "broken"}, None),
        (V1, None),
        (
            V1 | {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000"},
            None,
        ),
        (
            V1
            | {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000"},
            4,
        ),
        # The controller of a memory limit is another.
        (V1 | {"sys/fs/cgroup/memory/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/memory/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_quota_of_a_container(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(write(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("variables", "number", "reason"),
    [
        ({}, 16, "affinity mask"),
        ({"OMP_NUM_THREADS": "32"}, 32, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "3,2"}, 3, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "many"}, 16, "affinity mask"),
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "8"}, 4, "SLURM_CPUS_PER_TASK"),
        ({"SLURM_CPUS_PER_TASK": "1"}, 1, "SLURM_CPUS_PER_TASK"),
        ({"SLURM_CPUS_PER_TASK": "64"}, 16, "affinity mask"),
        ({"SLURM_CPUS_ON_NODE": "8"}, 8, "SLURM_CPUS_ON_NODE"),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "4"}, 2, "divided by 4 tasks"),
        ({"SLURM_CPUS_ON_NODE": "6", "SLURM_TASKS_PER_NODE": "2(x2),3", "SLURM_NODEID": "2"}, 2, "divided by 3 tasks"),
        ({"SLURM_CPUS_ON_NODE": "2", "SLURM_TASKS_PER_NODE": "8"}, 1, "divided by 8 tasks"),
        ({"SLURM_CPUS_PER_TASK": "2", "OMP_NUM_THREADS": "5"}, 5, "OMP_NUM_THREADS"),
        ({"LOCAL_WORLD_SIZE": "3"}, 5, "divided by 3 processes"),
        ({"LOCAL_WORLD_SIZE": "32"}, 1, "divided by 32 processes"),
        (
            {"LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "8", "TORCHELASTIC_RUN_ID": "none"},
            4,
            "SLURM_CPUS_PER_TASK, divided by 2 processes",
        ),
        ({"LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "6"}, 6, "SLURM_CPUS_PER_TASK"),
    ],
)
def test_number_and_reason(tmp_path: Path, variables: dict[str, str], number: int, reason: str) -> None:
    """On a machine that lets this process use 16 CPUs."""
    threads = given_threads(variables, tmp_path, affinity=16)
    assert threads.number == number
    assert reason in threads.reason


def test_a_quota_is_rounded_down(tmp_path: Path) -> None:
    """One thread more than it allows would be suspended, and waited for, in every period."""
    root = write(tmp_path, V2 | {"sys/fs/cgroup/machine/pod/cpu.max": "270000 100000"})
    assert given_threads({}, root, affinity=16) == (2, "the control group's quota of 2.7 CPUs")
    write(tmp_path, {"sys/fs/cgroup/machine/cpu.max": "20000 100000"})
    assert given_threads({}, root, affinity=16).number == 1


@pytest.mark.parametrize(("begun_with", "number"), [("PATH=/bin\0", 8), ("OMP_NUM_THREADS=1\0PATH=/bin\0", 1)])
def test_torchruns_own_number_is_no_choice(tmp_path: Path, begun_with: str, number: int) -> None:
    """It sets OMP_NUM_THREADS=1 for its processes where the user did not."""
    write(tmp_path, {"proc/7/environ": begun_with})
    variables = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}
    assert given_threads(variables, tmp_path, affinity=16, parent=7).number == number
    assert given_threads(variables, tmp_path, affinity=16, parent=8).number == 1  # unknown: as it stands there


@pytest.mark.parametrize("chosen", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "0"}])
def test_a_wait_policy_that_the_user_chose_stays(chosen: dict[str, str]) -> None:
    variables = dict(chosen)
    set_wait_policy(variables)
    assert variables == chosen


IMPORTED = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch is imported with", os.environ.get("GOMP_SPINCOUNT"), "spins")
sys.meta_path.insert(0, Finder())
sys.argv = {arguments}
import runpy
start = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
start(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["train.py", "--help"], ["vix", "plan", "--help"], ["vix", "replay", "--help"], ["benchmarks", "--help"]],
)
def test_the_policy_is_set_before_pytorch_is_imported(arguments: list[str]) -> None:
    """OpenMP reads it when it is loaded, and never again."""
    command = [sys.executable, "-c", IMPORTED.format(arguments=arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=HANGS, check=False)
    assert "torch is imported with 1000 spins" in done.stdout, done.stderr


def run(directory: Path, command: list[str], *arguments: str, **variables: str) -> tuple[list[dict[str, Any]], str]:
    """The results of all runs, and the output, of ``COMMAND train.py ARGUMENTS`` of a user who has chosen no threads."""
    done = subprocess.run(
        [*command, str(ROOT / "train.py"), *arguments],
        cwd=directory,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(path.read_text()) for path in directory.glob("outputs/*/*/results.json")], done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("taskset"), reason="taskset (util-linux) is absent")
def test_a_run_uses_what_it_was_given(tmp_path: Path) -> None:
    """One CPU of the machine: one thread, in the results and the log."""
    ((results),), output = run(tmp_path, ["taskset", "-c", str(CPUS[0]), sys.executable], *SHORT)
    assert results["threads"] == 1
    assert "CPU threads: 1 (the CPUs of this process's affinity mask)" in output


@pytest.mark.slow
def test_variables_reach_a_run(tmp_path: Path) -> None:
    """Slurm's, and an explicit number, which wins."""
    (results,), output = run(tmp_path, [sys.executable], *SHORT, SLURM_CPUS_PER_TASK="1")
    assert results["threads"] == 1
    assert len(CPUS) == 1 or "CPU threads: 1 (SLURM_CPUS_PER_TASK)" in output
    (results,), output = run(tmp_path, [sys.executable], *SHORT, "rerun=true", SLURM_CPUS_PER_TASK="1", OMP_NUM_THREADS="3")
    assert results["threads"] == 3
    assert "CPU threads: 3 (OMP_NUM_THREADS)" in output


@pytest.mark.slow
def test_processes_of_torchrun_share_the_cpus(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    (results,), output = run(tmp_path, command, *SHORT)
    assert (results["processes"], results["threads"]) == (2, max(1, len(CPUS) // 2))
    assert "divided by 2 processes" in output


@pytest.mark.slow
def test_jobs_at_once_share_the_cpus(tmp_path: Path) -> None:
    sweep = ("-m", "hydra/launcher=cores", "hydra.launcher.n_jobs=2", "seed=0,1")
    results, _ = run(tmp_path, [sys.executable], *sweep, *SHORT)
    assert [found["threads"] for found in results] == [max(1, len(CPUS) // 2)] * 2
