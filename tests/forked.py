"""Starts real ``train.py`` processes without importing PyTorch anew: they are forked from a server that has imported it.

It saves the seconds that every start of a Python interpreter with PyTorch takes. Everything of this project (``vix``,
``train.py``) is imported in the new process.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parents[1] / "train.py"
LIBRARIES = [
    *("torch", "torch._dynamo", "torch.distributed", "torch.nn.parallel", "torch.utils.tensorboard", "torch.profiler"),
    *("torchvision", "torchvision.transforms.v2", "matplotlib.figure"),
    *("matplotlib.backends.backend_agg", "hydra", "hydra.utils", "hydra._internal.hydra", "hydra._internal.config_loader_impl"),
    *("hydra.core.plugins", "hydra._internal.core_plugins.basic_launcher", "hydra._internal.core_plugins.basic_sweeper"),
    *("omegaconf", "pydantic", "rich.console", "rich.logging", "rich.progress", "rich.table", "einops"),
]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(LIBRARIES)


class Forked:
    """Processes of ``train.py`` by their numbers, which are those of the operating system."""

    def __init__(self) -> None:
        self.processes: dict[int, ForkServerProcess] = {}

    def start(
        self,
        directory: Path,
        *arguments: str,
        program: Path = PROGRAM,
        before: Callable[[], None] | None = None,
        stdout: Path | None = None,
        stderr: Path | None = None,
        **env: str,
    ) -> int:
        """Start a process in ``directory`` and return its number.

        program: train.py, or a copy of it in a folder with its own ``vix`` and ``conf``.
        before: called in the process before the program begins; of a module, or a partial of such a function.
        stdout, stderr: files that its output is appended to; both are ``directory / "out"`` by default.
        """
        directory.mkdir(exist_ok=True)
        files = tuple(str(file or directory / "out") for file in (stdout, stderr))
        settings = (program, str(directory), arguments, {**os.environ, **env}, before, *files)
        process = context.Process(target=become_train, args=settings)
        process.start()
        assert process.pid
        self.processes[process.pid] = process
        return process.pid

    def wait(self, process: int, timeout: float | None = None) -> int:
        """The exit status of a process (minus the signal that killed it). Raises TimeoutError."""
        self.processes[process].join(timeout)
        status = self.processes[process].exitcode
        if status is None:
            raise TimeoutError(f"process {process} did not end within {timeout} s")
        del self.processes[process]
        return status

    def kill(self, process: int) -> int:
        """kill -9, unless it has ended; its exit status."""
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        return self.wait(process)

    def is_running(self, process: int) -> bool:
        return self.processes[process].is_alive()

    def kill_all(self) -> None:
        """End all processes that were not waited for."""
        for process in list(self.processes):
            self.kill(process)

    def run(self, directory: Path, *arguments: str, before: Callable[[], None] | None = None, **env: str) -> tuple[int, str]:
        """Run a process to its end; its exit status and all that processes have printed in ``directory``."""
        process = self.start(directory, *arguments, before=before, **env)
        return self.wait(process), (directory / "out").read_text()


def become_train(
    program: Path,
    directory: str,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    before: Callable[[], None] | None,
    stdout: str,
    stderr: str,
) -> None:
    """What ``python train.py ARGUMENTS`` does, in this process, which ends with it."""
    gc.freeze()  # or every collection would go through the objects of all libraries
    os.chdir(directory)
    for number, name in ((1, stdout), (2, stderr)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(program), *arguments]
    sys.path.insert(0, str(program.parent))
    status = 0
    try:
        if before:
            before()
        runpy.run_path(str(program), run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        if not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    # As Python's own end of a program.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# A moment in a run's life that does not depend on the machine's speed: before one of its changes to its files.

Change = Callable[[str, str], None]


def before_each_change(act: Change) -> None:
    """Call ``act(EVENT, PATH)`` before this process changes anything below ``outputs/``.

    Events are Python's audit events: open for writing, os.link, os.mkdir, os.remove, os.rename and os.rmdir. Of two paths it is
    the new one.
    """
    outputs = os.path.abspath("outputs")
    target = {"open": 0, "os.link": 1, "os.mkdir": 0, "os.remove": 0, "os.rename": 1, "os.rmdir": 0}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in target or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = arguments[target[event]]
        if isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(outputs):
            act(event, os.path.abspath(path))

    sys.addaudithook(hook)


def log_changes(file: str) -> None:
    """Write a line to ``file`` for each change below ``outputs/``."""

    def log(event: str, path: str) -> None:
        with suppress(ValueError), open(file, "a") as lines:
            lines.write(f"{event} {path}\n")

    before_each_change(log)


def kill_at_change(number: int, half_written: bool = False) -> None:
    """kill -9 before the change of that number (from 0), and after a half of its contents where it renames a file."""
    left = [number]

    def count(event: str, path: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            temporary = Path(path).with_name(f".{Path(path).name}.tmp")
            # A hard link shares its contents with the file that it was made from: it is never half-written.
            if half_written and temporary.exists() and temporary.stat().st_nlink == 1:
                os.truncate(temporary, temporary.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    before_each_change(count)


def signal_at_file(number: int, name: str, times: int) -> None:
    """Send this process the signal before it puts a file of that name in place for the time of that number (from 1)."""
    left = [times]

    def count(event: str, path: str) -> None:
        if event == "os.rename" and Path(path).name == name:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)

    before_each_change(count)


def shift_clock(seconds: float) -> None:
    """Let this process read another time."""
    now = time.time
    time.time = lambda: now() + seconds
