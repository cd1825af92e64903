"""Status of the jobs of a sweep: each job writes a file, so that any launcher, process and machine is supported.

A sweep with ``rerun=true`` also keeps a token of its rerun in a file until all of its jobs have finished. The same command then
continues the rerun instead of starting its finished jobs over.
"""

import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import hydra.core.utils
from hydra.core.utils import JobReturn

from vix.errors import ConfigError, UserError
from vix.overrides import quote, settings
from vix.runs.results import UNFINISHED
from vix.runs.run import read_results
from vix.system.distributed import PeerLostError, rank
from vix.system.files import atomic_write, exclusive_lock, write_json

FOLDER = "VIX_SWEEP"  # environment variable of every job of a sweep: the folder of the status files
RERUN = "VIX_RERUN"  # environment variable of every job of a sweep with rerun=true: the token of the rerun


class NotRunError(UserError):
    """A job that is not run, since an earlier one of its sweep has failed."""


class JobStatus:
    """Context manager of one job, which records its status for the sweep's table; outside of a sweep it records nothing.

    parts: of the run's name.
    number: index of the job in its sweep.
    fail_fast: do not start where an earlier job has failed.
    outputs: the directory below which the sweep's runs are.
    directory: of the job's run.

    Of several processes, only rank 0 writes.

    Raises NotRunError on entry where ``fail_fast`` is set and an earlier job has failed.
    """

    def __init__(
        self, parts: Sequence[str], number: int, fail_fast: bool, outputs: str = "", directory: Path | None = None
    ) -> None:
        self.folder = Path(os.environ[FOLDER]) if FOLDER in os.environ and rank() == 0 else None
        self.number, self.fail_fast = number, fail_fast
        self.began = time.time()
        self.state: dict[str, Any] = {
            "parts": list(parts),
            "outputs": outputs,
            "directory": str(directory.absolute()) if directory else None,
            "state": "lost",
            "error": "its process ended without reporting a status",
            "results": {},
        }

    def __enter__(self) -> Self:
        if self.fail_fast and self.folder and any(job["state"] in ("failed", "refused") for job in read_jobs(self.folder)):
            self.update(state="not run", error="fail_fast=true, and an earlier job failed")
            raise NotRunError(f"not run: {self.state['error']}")
        self.update()
        return self

    def finished(self, results: dict[str, Any], before: bool) -> None:
        """Record the results of the run; ``before``: whether an earlier start had already finished it."""
        self.state |= {"state": "finished before" if before else "finished", "top1": results["top1"], "error": ""}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, SystemExit | KeyboardInterrupt | PeerLostError):
            message = str(error) if isinstance(error, PeerLostError) else "the same command continues it"
            self.state |= {"state": "interrupted", "error": message}
        elif error is not None:
            state = "refused" if isinstance(error, ConfigError) else "failed"
            self.state |= {"state": state, "error": str(error) or type(error).__name__}
        self.update(seconds=time.time() - self.began)

    def update(self, **fields: Any) -> None:
        """Set fields of the status and write it."""
        self.state |= fields
        if self.folder and self.folder.is_dir():
            with suppress(UserError):  # the run itself reports a full disk
                write_json(self.folder / f"{self.number:06d}.json", self.state)


class Sweep:
    """Context manager of a sweep in the process that starts it: creates and removes the folder of the jobs' status files.

    arguments: of the command line; extended by an override that passes the folder to every job.
    outputs: the directory below which the sweep's runs are, as far as it is known before the jobs start.
    rerun: the file of the rerun's token; None without ``rerun=true``.
    """

    def __init__(self, arguments: list[str], outputs: Path, rerun: Path | None = None) -> None:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}"
        self.outputs, self.rerun, self.token = [str(outputs)], rerun, read_token(rerun) or name
        self.folder = outputs.resolve() / ".sweeps" / name  # shared by all machines that share ``outputs``
        arguments.append(f"++hydra.job.env_set.{FOLDER}={quote(str(self.folder))}")
        if rerun:
            arguments.append(f"++hydra.job.env_set.{RERUN}={quote(self.token)}")

    def __enter__(self) -> Self:
        self.made = [path for path in self.folder.parents if not os.path.lexists(path)]
        continues = self.rerun is not None and os.path.exists(self.rerun)
        try:
            with suppress(FileNotFoundError):
                self.folder.mkdir(parents=True)
            self.folder.mkdir(parents=True, exist_ok=True)  # where a sweep that ended has just removed .sweeps
            if self.rerun and not continues:
                atomic_write(self.rerun, self.token.encode())
        except (OSError, UserError) as error:
            self.__exit__()
            cause = error if isinstance(error, OSError) else error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) else error
            outputs = self.folder.parents[1]
            sys.exit(f"error: {outputs}: {reason}; fix the cause, or choose another directory with hydra.sweep.dir=DIR")
        if continues:
            print(f"Continuing the rerun of {self.token[:15]}; to start all of its runs over, delete {self.rerun}")
        return self

    def end_rerun(self) -> None:
        """All jobs have finished: the same command is then a new rerun."""
        if self.rerun:
            self.rerun.unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # not empty: another sweep's folder, or runs
            for path in dict.fromkeys([self.folder.parent, *self.made]):
                path.rmdir()

    def jobs(self) -> list[dict[str, Any]]:
        """The status of each job so far, in the order of the jobs."""
        return read_jobs(self.folder)


def record_end(folder: Path, number: int, parts: Sequence[str], state: str, error: str) -> None:
    """Record the end of a job whose process could not do so, in the sweep's folder and in the run's results.json.

    folder: of the status files.
    number, parts: of the job; the latter is used where it ended before its start.
    state: ``failed`` or ``interrupted``, unless the job itself has recorded its end.
    error: the reason.
    """
    path = folder / f"{number:06d}.json"
    job: dict[str, Any] = {"parts": list(parts), "outputs": str(folder.parents[1]), "state": "lost", "results": {}}
    if path.exists():
        job = json.loads(path.read_text())
    if job["state"] != "lost":
        return
    with suppress(UserError):  # the disk may be full, which is then the reason
        write_json(path, job | {"state": state, "error": error})
    directory = Path(job.get("directory") or folder / "none")
    with suppress(OSError, UserError), exclusive_lock(directory):
        results = read_results(directory / "results.json") or job["results"]
        if results.get("status") in UNFINISHED:
            write_json(directory / "results.json", results | {"status": state, "error": error})


def failed_return(overrides: Sequence[str], error: str | Exception) -> JobReturn:
    """What a launcher returns to Hydra for a job that did not finish; ``error``: a UserError, or its message."""
    failed = JobReturn(overrides=list(overrides), status=hydra.core.utils.JobStatus.FAILED)
    failed.return_value = UserError(error) if isinstance(error, str) else error
    return failed


def rerun_file(outputs: Path, overrides: Sequence[str], flags: Sequence[str | None]) -> Path | None:
    """The file of the token of a sweep's rerun, which is that of its command; None without ``rerun=true``.

    outputs: the directory below which the sweep's runs are.   overrides, flags: of the command line.
    """
    given = settings(overrides)
    if given.get("rerun") != "rerun=true":
        return None
    digest = hashlib.sha256(json.dumps([sorted(given.values()), *flags]).encode()).hexdigest()[:12]
    return outputs.resolve() / ".sweeps" / f"rerun-{digest}"


def read_token(rerun: Path | None) -> str:
    """The token of a rerun that has not ended; empty where there is none."""
    with suppress(OSError):
        return rerun.read_text() if rerun else ""
    return ""


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """The status of each job, in the order of the jobs."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*.json"))]
