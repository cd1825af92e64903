"""Runs each measurement in a new process, so that caches, allocators and memory peaks do not affect the next one."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from vix.system.memory import gpu_out_of_memory, out_of_memory

# Modules imported by the fork server, which uses no device, so that new processes start fast. An optimizer imports
# torch._dynamo in its first step.
PRELOAD = ("torch", "torch._dynamo", "vix.cli.summary", "vix.layers.posenc", "benchmarks.steps", "vix.analysis.measure")


class Refused(Exception):
    """A measurement failed for lack of memory or time; the message is the reason."""


def gap_kind(error: Exception) -> str:
    """The key of a record for what was not measured: ``errors``, or ``refused`` for lack of memory or time, which stays so."""
    return "refused" if isinstance(error, Refused) else "errors"


def exit_with_errors(errors: Sequence[Mapping[str, Any]]) -> None:
    """Exit with status 1 and one line where something was not measured."""
    if errors:
        missing = dict.fromkeys(" ".join(str(value) for key, value in gap.items() if key != "reason") for gap in errors)
        sys.exit(f"error: not measured: {', '.join(missing)}; the reasons are in the file, the first: {first_line(errors[0])}")


def first_line(gap: Mapping[str, Any]) -> str:
    """The first line of the reason why something was not measured."""
    return (str(gap["reason"]).strip().splitlines() or ["unknown error"])[0]


def processes(*preload: str) -> multiprocessing.context.ForkServerContext:
    """The context that starts the processes; ``preload``: additional modules to import in the fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *preload])
    return context


def isolated(
    context: multiprocessing.context.ForkServerContext,
    threads: int,
    function: Callable[..., Any],
    *arguments: Any,
    limit: float,
) -> Any:
    """Return ``function(*arguments)`` from a new process.

    context: from :func:`processes`.   threads: CPU threads of the process.   limit: timeout in seconds.

    Raises Refused with the reason where memory or time is exceeded, and RuntimeError with the child's error otherwise.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, threads, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            raise Refused(f"took more than {limit:.0f} s")
        kind, value = receiver.recv()
        process.join(10)  # lets the compiler's worker processes exit, which a kill would not
    except EOFError:
        process.join()
        reason = (
            "killed, probably by the system for lack of memory"
            if process.exitcode == -signal.SIGKILL
            else f"exited with {process.exitcode}"
        )
        raise Refused(reason) from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if kind == "refused":
        raise Refused(value)
    if kind == "error":
        raise RuntimeError(value)
    return value


def child(sender: Connection, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The main function of the new process: sends ``(kind, value)``, where kind is value, refused or error."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # inherited by data loader workers
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        sender.send(("value", function(*arguments)))
    except Exception as error:
        if out_of_memory(error):
            where = "GPU memory" if gpu_out_of_memory(error) else "memory"
            sender.send(("refused", f"out of {where}: {str(error).split('. ')[0]}"))
        else:
            sender.send(("error", f"{type(error).__name__}: {error}"))
