"""Number of CPU threads of a run, and their wait policy, which must be set before PyTorch is imported.

A process sees all CPUs of its machine, even where a scheduler or a container grants it only some of them. With more threads
than CPUs, the threads wait for each other in every operation.
"""

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Loop iterations, which take some microseconds; chosen by the measurements in docs/performance.md.
SPIN_COUNT = 1_000


class Threads(NamedTuple):
    """A number of threads, and the reason for it, for the log."""

    number: int
    reason: str


def set_wait_policy(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make waiting OpenMP threads spin for microseconds and then sleep, unless the user has set a wait policy.

    environment: modified in place; OpenMP reads the variable when PyTorch is imported.

    By default they spin for milliseconds. On CPUs shared with other processes, a spinning thread can keep the thread that it
    waits for from running (measurements in docs/performance.md).
    """
    if not any(name in environment for name in WAIT_VARIABLES):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def use_given_cpus() -> int:
    """Set PyTorch's number of threads to the number of CPUs available to this process, log it, and return it."""
    import torch

    threads = given_threads()
    torch.set_num_threads(threads.number)
    log.info("CPU threads: %d (%s)", *threads)
    return threads.number


def given_threads(
    environment: Mapping[str, str] = os.environ, root: Path = Path("/"), affinity: int | None = None, parent: int | None = None
) -> Threads:
    """The number of threads for this process: OMP_NUM_THREADS where that is set, else the number of CPUs that it may use.

    The latter is the minimum of its affinity mask, the CPUs of its Slurm task, and the quota of its control groups (rounded
    down), divided by the number of processes of this run on this machine, unless each is a Slurm task; at least 1. The
    launchers ``cores`` and ``ray_gpus`` set OMP_NUM_THREADS.

    environment: environment variables.
    root: of the file system that contains /proc and the control groups.
    affinity: number of CPUs in the affinity mask, which is then the parent's, too; None: read both.
    parent: ID of the parent process; None: read it.
    """
    chosen = chosen_threads(environment, root, os.getppid() if parent is None else parent)
    if chosen:
        return Threads(chosen, "OMP_NUM_THREADS")
    processes = 1 if affinity is None and has_own_mask() else positive(environment.get("LOCAL_WORLD_SIZE")) or 1
    bounds = [divided(Threads(affinity or visible_cpus(), "the CPUs of this process's affinity mask"), processes)]
    slurm = slurm_cpus(environment)
    if slurm:  # of a task, which is the process itself, or torchrun, which started it
        bounds.append(divided(slurm, processes if "TORCHELASTIC_RUN_ID" in environment else 1))
    quota = cpu_quota(root)
    if quota:
        bounds.append(divided(Threads(max(1, math.floor(quota)), f"the control group's quota of {quota:g} CPUs"), processes))
    return min(bounds, key=lambda bound: bound.number)


def divided(threads: Threads, processes: int) -> Threads:
    """The share of each of several processes."""
    if processes == 1:
        return threads
    return Threads(max(1, threads.number // processes), f"{threads.reason}, divided by {processes} processes")


def visible_cpus() -> int:
    """Number of CPUs in this process's affinity mask, or of the machine where there are no masks."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_own_mask() -> bool:
    """Whether this process was bound to fewer CPUs than the one that started it."""
    with suppress(OSError, AttributeError):
        return os.sched_getaffinity(0) < os.sched_getaffinity(os.getppid())
    return False


def positive(text: str | None) -> int | None:
    """The positive integer at the beginning of a variable's value; None where there is none."""
    found = re.match(r"\s*(\d+)", text or "")
    return int(found[1]) or None if found else None


def chosen_threads(environment: Mapping[str, str], root: Path, parent: int) -> int | None:
    """The user's OMP_NUM_THREADS; None where it is unset, or where torchrun set it to 1 as its default."""
    chosen = positive(environment.get("OMP_NUM_THREADS"))
    if chosen == 1 and "TORCHELASTIC_RUN_ID" in environment:
        with suppress(OSError):
            variables = (root / "proc" / str(parent) / "environ").read_bytes().split(b"\0")  # of torchrun
            if variables != [b""] and not any(variable.startswith(b"OMP_NUM_THREADS=") for variable in variables):
                return None
    return chosen


def slurm_cpus(environment: Mapping[str, str]) -> Threads | None:
    """The CPUs of this process's Slurm task; None outside of a Slurm job.

    Where a job does not request CPUs per task, its tasks on a machine share the job's CPUs there.
    """
    per_task = positive(environment.get("SLURM_CPUS_PER_TASK"))
    if per_task:
        return Threads(per_task, "SLURM_CPUS_PER_TASK")
    on_node = positive(environment.get("SLURM_CPUS_ON_NODE"))
    if not on_node:
        return None
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if name in environment:
            tasks = tasks_on_node(environment[name], positive(environment.get("SLURM_NODEID")) or 0)
            return Threads(max(1, on_node // tasks), f"SLURM_CPUS_ON_NODE divided by {tasks} tasks")
    return Threads(on_node, "SLURM_CPUS_ON_NODE")


def tasks_on_node(counts: str, node: int) -> int:
    """The number of tasks on a node; 1 where it cannot be parsed.

    counts: Slurm's list of tasks per node, such as ``2(x3),1``.   node: index of the node.
    """
    expanded: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        expanded += [int(count)] * int(repeats or 1)
    return max(1, expanded[node]) if node < len(expanded) else 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPU quota of this process's control groups and their ancestors, for example in a container; None without a limit."""
    quotas = [quota for folder in control_groups(root) for quota in (quota_v2(folder), quota_v1(folder)) if quota]
    return min(quotas, default=None)


def quota_v2(folder: Path) -> float | None:
    """The CPU quota of a control group, version 2; None without a limit."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    return None


def quota_v1(folder: Path) -> float | None:
    """The CPU quota of a control group, version 1; None without a limit."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return quota / int((folder / "cpu.cfs_period_us").read_text()) if quota > 0 else None
    return None


def control_groups(root: Path) -> Iterator[Path]:
    """Directories of the control groups that limit this process's CPU time, from its own up to the root of the mount."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    paths = {}  # "" (version 2) or "cpu" (version 1) → path of the group
    for group in groups:
        _, controllers, path = group.split(":", 2)
        for controller in controllers.split(","):
            paths[controller] = path
    for mount in mounts:
        fields, _, system = mount.partition(" - ")
        kind, *_, options = system.split()
        controller = "" if kind == "cgroup2" else "cpu"
        if kind not in ("cgroup", "cgroup2") or controller not in paths or (controller and "cpu" not in options.split(",")):
            continue
        mounted, point = fields.split()[3:5]
        folder = root / point.lstrip("/")
        # In a container the mount shows only a part of the tree, and the path may begin above it.
        relative = paths[controller].removeprefix(mounted.rstrip("/")).strip("/")
        inner = folder / relative
        yield from (parent for parent in (inner, *inner.parents) if parent == folder or folder in parent.parents)
