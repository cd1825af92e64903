"""A process of its own for every measurement: no cache, allocator or peak of one that is left to the next."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from vix.system.memory import gpu_out_of_memory, out_of_memory

# They come out of a server that has imported everything and touched no device, so that starting one takes no time.
# torch._dynamo is what an optimizer imports in its first step.
PRELOAD = ("torch", "torch._dynamo", "vix.cli.summary", "vix.layers.posenc", "benchmarks.steps", "benchmarks.measure")


class Refused(Exception):
    """A measurement that could not be made; its message is the reason."""


def processes(*preload: str) -> multiprocessing.context.ForkServerContext:
    """What starts them; ``preload``: further modules that they need."""
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
    """``function(*arguments)`` in a new process with so many threads, ended after ``limit`` seconds.

    Raises Refused with the reason where it is out of memory or time, and RuntimeError with the child's error otherwise.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, threads, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            raise Refused(f"took more than {limit:.0f} s")
        kind, value = receiver.recv()
        process.join(10)  # the compiler's helpers end with it, unless it is killed
    except EOFError:
        process.join()
        reason = (
            "killed, as the system does when memory ends"
            if process.exitcode == -signal.SIGKILL
            else f"ended with {process.exitcode}"
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
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for a loader's workers
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
