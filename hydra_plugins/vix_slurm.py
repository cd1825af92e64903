"""``hydra/launcher=slurm``: the launcher of hydra-submitit-launcher, for jobs that Slurm may preempt, requeue or kill.

It waits for every job of a sweep, also after one of them was killed; it looks up the states with ``squeue``, which needs no
accounting; Ctrl-C cancels the jobs, which save a checkpoint first; and the tasks of a job train one run together.
"""

import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, filter_overrides
from omegaconf import OmegaConf

from vix.errors import UserError
from vix.runs.sweep import FOLDER, failed_return, record_end
from vix.system.files import warn_once

try:
    from hydra_plugins.hydra_submitit_launcher import submitit_launcher
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
except ImportError:  # optional: Hydra reports the missing option of hydra/launcher
    submitit_launcher = None

log = logging.getLogger(__name__)

# States from which no job returns. NODE_FAIL and PREEMPTED are also passed through by jobs that Slurm requeues; a job that ends
# in them is at its end when squeue no longer lists it, after some minutes.
FINAL = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT")
UNLISTED = "no longer known to Slurm"
# Slurm's messages in a job's output, by control groups and by its accounting (OverMemoryKill).
OUT_OF_MEMORY = re.compile(r"oom.kill event|exceeded (job )?memory limit", re.IGNORECASE)
# Of several processes, only rank 0 writes files and logs.
RANK_OVERRIDES = ("hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")


class Queue:
    """States of this user's jobs. ``squeue`` is asked at most every 2 s, and less often the longer the jobs take.

    Has the methods that submitit's jobs call (``submitit.core.core.InfoWatcher``, which needs accounting).
    """

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.began, self.asked = time.monotonic(), -60.0

    def register_job(self, job_id: str) -> None:
        """Add a job; a job that has just been submitted is listed at once."""
        self.states[job_id] = "PENDING"

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether a job has ended for good."""
        return self.get_state(job_id, mode) in (*FINAL, UNLISTED)

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        """The state of a job."""
        now = time.monotonic()
        if mode == "force" or now - self.asked > min(60.0, max(2.0, (now - self.began) / 10)):
            self.asked = now
            self.ask()
        return self.states[job_id]

    def ask(self) -> None:
        """Update the states, unless Slurm does not answer."""
        command = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i %T"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            warn_once("squeue", "squeue fails, waiting for it: %s", done.stderr.strip())
            return
        listed = dict(line.split() for line in done.stdout.splitlines())
        for job_id, state in self.states.items():
            if state not in FINAL:
                self.states[job_id] = listed.get(job_id, UNLISTED)


if submitit_launcher:

    class SlurmLauncher(submitit_launcher.SlurmLauncher):
        """Submits each run of a sweep as a job of an array, and waits for all of them."""

        def __call__(
            self,
            sweep_overrides: list[str],
            job_dir_key: str,
            job_num: int,
            job_id: str,
            singleton_state: dict[type, Singleton],
        ) -> JobReturn:
            """Run a job, in its Slurm task. After a signal that announces an end, it has saved a checkpoint and is requeued."""
            import submitit

            environment = submitit.JobEnvironment()
            if environment.num_tasks > 1:
                submitit.helpers.TorchDistributedEnvironment().export(overwrite=True, set_cuda_visible_devices=False)
            if environment.global_rank > 0:
                sweep_overrides = [*sweep_overrides, *RANK_OVERRIDES]
                logging.disable(logging.WARNING)
            try:
                return super().__call__(sweep_overrides, job_dir_key, job_num, job_id, singleton_state)
            except SystemExit as stop:
                announced = stop.code == 128 + signal.SIGUSR2
                if announced or (stop.code == 128 + signal.SIGTERM and is_preempted(environment.raw_job_id)):
                    try:
                        signal.raise_signal(signal.SIGUSR2)  # submitit requeues the job, unless it has done so too often
                    except subprocess.CalledProcessError as error:
                        log.error("Slurm does not requeue this job: %s", error)
                raise

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """Submit the jobs and wait for all of them; a job that was killed returns the reason."""
            jobs = self.submit(job_overrides, initial_job_idx)
            try:
                wait_for(jobs)
            except KeyboardInterrupt:
                log.warning("Cancelling the jobs, which save a checkpoint first")
                subprocess.run(["scancel", *(job.job_id for job in jobs)], check=False)
                wait_for(jobs)
                raise
            assert self.config is not None
            folder = Path(self.config.hydra.job.env_set[FOLDER])
            numbered = enumerate(zip(jobs, job_overrides, strict=True), initial_job_idx)
            return [job_return(job, overrides, folder, number) for number, (job, overrides) in numbered]

        def submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
            """Submit an array of jobs."""
            import submitit

            submitit.SlurmJob.watcher = Queue()  # type: ignore[assignment]
            assert self.config is not None
            Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
            params = dict(self.params)
            folder, timeouts = params.pop("submitit_folder"), params.pop("max_num_timeout")
            executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=timeouts)
            shared = set(OmegaConf.structured(BaseQueueConf))
            executor.update_parameters(**{key if key in shared else f"slurm_{key}": params[key] for key in params})
            numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
            for number, overrides in zip(numbers, job_overrides, strict=True):
                log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
            state = Singleton.get_state()
            count = len(job_overrides)
            arguments: list[Any] = [
                list(map(list, job_overrides)),
                ["hydra.sweep.dir"] * count,
                numbers,
                [""] * count,
                [state] * count,
            ]
            try:
                with without_allocation():
                    return executor.map_array(self, *arguments)
            except (RuntimeError, submitit.core.utils.FailedSubmissionError) as error:  # no Slurm; or sbatch refuses
                reason = str(error).strip().splitlines()[-1]
                parts = "; more jobs than Slurm's MaxArraySize need several sweeps" if "array" in reason else ""
                raise UserError(f"hydra/launcher=slurm: the jobs were not submitted ({reason}){parts}") from error


@contextmanager
def without_allocation() -> Iterator[None]:
    """Context manager that hides the variables of the allocation in which the sweep was started: they are not its jobs'."""
    import submitit

    kept = {key: value for key, value in os.environ.items() if key == "SLURM_CONF" or key.startswith("SBATCH_")}
    with submitit.helpers.clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext():
        os.environ.update(kept)
        yield


def wait_for(jobs: Sequence[Any]) -> None:
    """Wait until all jobs have ended for good."""
    while not all(job.done() for job in jobs):
        time.sleep(1)


def job_return(job: Any, overrides: Sequence[str], folder: Path, number: int) -> JobReturn:
    """What a job returned; where it was killed, a failure with the reason, which is also recorded for the sweep and the run.

    job: of submitit.   overrides: of its run.   folder: of the sweep's status files.   number: of the job in the sweep.
    """
    task = job.task(0)
    state = task.state
    reason = f"Slurm job {job.job_id} ended ({state}) without a result; the same command continues it ({task.paths.stderr})"
    if state == "OUT_OF_MEMORY" or OUT_OF_MEMORY.search(task.stderr() or ""):
        reason = (
            f"out of memory: Slurm killed job {job.job_id} at its memory limit; hydra.launcher.mem_gb sets the limit, and "
            "trainer.micro_batch=auto or a smaller trainer.eval_batch_size needs less"
        )
        record_end(folder, number, filter_overrides(overrides), "failed", reason)
    elif state in ("COMPLETED", UNLISTED) or task.paths.result_pickle.exists():
        try:
            return task.result()  # waits for a slow file system
        except Exception as error:  # of submitit: no result, or a job that has reached its time limit too often
            reason = f"{reason}: {str(error).strip().splitlines()[-1]}"
    record_end(folder, number, filter_overrides(overrides), "interrupted", reason)
    return failed_return(overrides, reason)


def is_preempted(job_id: str) -> bool:
    """Whether Slurm is about to preempt a job. It does not requeue a job that ends by itself in its grace time."""
    command = ["scontrol", "show", "job", "--oneliner", job_id]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return "JobState=RUNNING" in shown and bool(re.search(r"PreemptTime=\d", shown))
