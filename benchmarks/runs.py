"""Times processes of train.py from outside."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vix.errors import UserError

PROGRAM = Path(__file__).parents[1].resolve() / "train.py"


class TimedProcess(NamedTuple):
    """Times of concurrent processes of train.py, in seconds from their start.

    wall: until the last process ended.
    first_epoch: until a process logged the end of its first epoch.
    results: contents of results.json of all runs.
    """

    wall: float
    first_epoch: float
    results: list[dict[str, Any]]


def run_together(commands: Sequence[Sequence[str]], threads: int, **variables: str) -> TimedProcess:
    """Run ``python train.py ARGUMENTS`` for several commands concurrently, in an empty directory.

    commands: arguments of each process.
    threads: CPU threads per process.
    variables: additional environment variables.

    Raises UserError with the last line of output where a process fails.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        **variables,
        "VIX_DATA": str(Path(os.environ.get("VIX_DATA", "data")).resolve()),  # the runs start elsewhere
    }
    first_epoch = float("nan")
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        processes = [
            subprocess.Popen(
                [sys.executable, str(PROGRAM), *arguments],
                cwd=directory,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for arguments in commands
        ]
        try:
            outputs: list[list[str]] = []
            for process in processes:
                assert process.stdout
                outputs.append([])
                for line in process.stdout:
                    outputs[-1].append(line)
                    if first_epoch != first_epoch and "epoch 1/" in line:
                        first_epoch = time.perf_counter() - started
                process.wait()
        finally:
            for process in processes:
                process.kill()
        wall = time.perf_counter() - started
        for process, lines in zip(processes, outputs, strict=True):
            if process.returncode:
                last = "".join(lines).strip().rpartition("\n")[2]
                raise UserError(f"train.py exited with {process.returncode}: {last.removeprefix('error: ')}")
        results = [json.loads(path.read_text()) for path in sorted(Path(directory).glob("outputs/**/results.json"))]
    return TimedProcess(wall, first_epoch, results)
