"""Runs that wait at an epoch (at_start/sitecustomize.py), so that a test kills, signals or moves them there."""

import ctypes
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from conftest import HANGS, ROOT, TINY

AT_START = Path(__file__).with_name("at_start")
# The engines run without dropout, whose random numbers differ between processes, so that losses can be compared.
SMALL = (*TINY, "model.dropout=0", "trainer.epochs=3", "optimizer.lr=1e-2")

T = TypeVar("T")


def pausing(*epochs: int, **env: str) -> dict[str, str]:
    """The environment of a program whose runs wait at these epochs."""
    path = os.pathsep.join((str(AT_START), str(ROOT)))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "VIX_TEST_PAUSE": ",".join(map(str, epochs)), **env}


def wait_until(holds: Callable[[], T], fails: Callable[[], str] = lambda: "") -> T:
    """The first true value of ``holds()``. Fails after an hour, or as soon as ``fails()`` has a reason."""
    end = time.monotonic() + HANGS
    while not (value := holds()):
        reason = fails()
        assert not reason, reason
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def paused(directory: Path, epoch: int, count: int = 1, fails: Callable[[], str] = lambda: "") -> list[Path]:
    """The directories of ``count`` runs below ``directory`` that have come to the pause at this epoch."""
    found = wait_until(lambda: len(files := sorted(directory.glob(f"**/paused-{epoch}"))) == count and files, fails)
    assert found
    return [file.parent for file in found]


def go_on(run: Path, epoch: int) -> None:
    (run / f"go-on-{epoch}").touch()


def results_in(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("outputs/*/*/results.json"))]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports: list[int] = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def end_with_this_process() -> None:
    """In a new process: it ends when the tests do, even if they are killed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it, and their children
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
