"""``hydra/launcher=cores``: runs of a sweep at once on this machine, each in a process of its own.

Ctrl-C and SIGTERM let the runs save a checkpoint first, and a process that is killed ends no other run. (joblib kills all of
its processes in both cases.)
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from vix.errors import UserError, first_paragraph
from vix.runs.sweep import FOLDER, failed_return, record_end
from vix.system.threads import given_threads

log = logging.getLogger(__name__)


class Job(NamedTuple):
    """A job that is running."""

    number: int
    overrides: Sequence[str]
    process: multiprocessing.process.BaseProcess
    returned: Connection


class CoresLauncher(Launcher):
    """Runs each run of a sweep in a new process with its share of the CPU cores.

    n_jobs: number of runs at once; -1: one per core.
    """

    def __init__(self, n_jobs: int = -1) -> None:
        if n_jobs != -1 and n_jobs < 1:
            raise UserError(f"hydra.launcher.n_jobs={n_jobs}: must be at least 1, or -1 for one run per core")
        self.n_jobs = n_jobs
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook. The processes call :func:`vix.cli.launch.run_job`, the program's own task."""
        self.config, self.hydra_context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and wait for all of them; a job whose process was killed returns the reason."""
        setup_globals()
        assert self.config is not None
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        cores = given_threads().number
        at_once = min(len(job_overrides), cores if self.n_jobs == -1 else self.n_jobs)
        threads = max(1, cores // at_once)
        waiting = list(enumerate(job_overrides, initial_job_idx))[::-1]
        running: list[Job] = []
        returns: dict[int, JobReturn] = {}
        with handled(signal.SIGTERM, leave):
            try:
                while waiting or running:
                    while waiting and len(running) < at_once:
                        number, overrides = waiting.pop()
                        log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
                        running.append(self.start(number, overrides, threads))
                    self.collect(running, returns)
            except (KeyboardInterrupt, SystemExit):
                log.warning("Ending the runs, which save a checkpoint first")
                for job in running:
                    job.process.terminate()
                while running:
                    self.collect(running, returns)
                raise
        return [returns[number] for number in sorted(returns)]

    def start(self, number: int, overrides: Sequence[str], threads: int) -> Job:
        """Start the process of a job."""
        context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of PyTorch and of a GPU
        receiver, sender = context.Pipe(duplex=False)
        arguments = sender, number, list(overrides), self.hydra_context, self.config
        process = context.Process(target=run_job, args=arguments)
        # Until the run handles Ctrl-C, the sweep's command does.
        with environment_of_jobs(threads), handled(signal.SIGINT, signal.SIG_IGN):
            process.start()
        sender.close()
        return Job(number, overrides, process, receiver)

    def collect(self, running: list[Job], returns: dict[int, JobReturn]) -> None:
        """Wait until at least one process has ended; move what the ended ones returned to ``returns``."""
        ready = wait([job.returned for job in running])
        for job in [job for job in running if job.returned in ready]:
            try:
                top1, error = job.returned.recv()
            except EOFError:
                top1, error = None, ""
            job.process.join()
            if top1 is not None:
                returns[job.number] = JobReturn(overrides=list(job.overrides), status=JobStatus.COMPLETED, _return_value=top1)
            else:
                returns[job.number] = failed_return(job.overrides, error or self.record_lost(job))
            running.remove(job)

    def record_lost(self, job: Job) -> str:
        """Record for the sweep and the run that a job's process ended without returning anything; returns the reason."""
        assert self.config is not None
        code = job.process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        memory = ", which the system sends when memory is short" if code == -signal.SIGKILL else ""
        reason = f"its process was ended by {how}{memory}; the same command continues it"
        state = "interrupted" if code in (-signal.SIGTERM, -signal.SIGINT) else "failed"
        record_end(Path(self.config.hydra.job.env_set[FOLDER]), job.number, filter_overrides(job.overrides), state, reason)
        return reason


def run_job(returned: Connection, number: int, overrides: list[str], hydra_context: HydraContext, config: DictConfig) -> None:
    """Run a job in this process and send back its top-1 accuracy or, where it did not finish, None and the reason."""
    import vix.cli.launch  # first, since it replaces Hydra's run_job (vix/composition/compose.py)

    import hydra.core.utils  # isort: skip

    setup_globals()
    Plugins.instance()  # registers their config files
    cfg = hydra_context.config_loader.load_sweep_config(config, overrides)
    with open_dict(cfg):
        cfg.hydra.job.id, cfg.hydra.job.num = f"{cfg.hydra.job.name}_{number}", number
    HydraConfig.instance().set_config(cfg)
    try:
        result = hydra.core.utils.run_job(
            hydra_context=hydra_context,
            config=cfg,
            task_function=vix.cli.launch.run_job,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    except (SystemExit, KeyboardInterrupt):  # the run has recorded it
        returned.send((None, "interrupted; the same command continues it"))
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)  # a normal exit would wait for the C++ compilers that a compiled step has started
    # Neither Hydra's configs nor every exception can be pickled.
    finished = result.status == JobStatus.COMPLETED
    returned.send((result._return_value, "") if finished else (None, first_paragraph(result._return_value)))


@contextmanager
def environment_of_jobs(threads: int) -> Iterator[None]:
    """Context manager in which processes are started with this number of threads, unless the user has set one."""
    own = "OMP_NUM_THREADS" in os.environ
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        yield
    finally:
        if not own:
            del os.environ["OMP_NUM_THREADS"]


@contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Context manager in which a signal has this handler. Without effect in other threads, which receive no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def leave(number: int, _: object) -> NoReturn:
    """Handler of a signal: exit with the status of that signal."""
    raise SystemExit(128 + number)
