"""Errors of the commands that analyze runs, in one line."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vix.composition.command import Flags
from vix.composition.compose import format_error, is_hydra_error
from vix.errors import UserError
from vix.system.memory import out_of_memory


@contextmanager
def one_line_errors(
    overrides: Sequence[str], flags: Flags | None = None, batches: str = "trainer.batch_size"
) -> Iterator[None]:
    """Context manager that exits with a one-line message for errors of usage, invalid overrides, and lack of memory.

    overrides, flags: of the command line.
    batches: the option with which less memory is needed; empty where there is none.

    With HYDRA_FULL_ERROR=1 the errors are raised.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR", "0") != "0":
            raise
        if out_of_memory(error):
            smaller = f"a smaller {batches}, or " if batches else ""
            sys.exit(f"error: out of memory; use {smaller}the CPU (CUDA_VISIBLE_DEVICES='' hides the GPU)")
        if not (isinstance(error, UserError) or is_hydra_error(error)):
            raise
        sys.exit(f"error: {format_error(error, overrides, flags)}")


def error_of_run(run: str, error: UserError) -> str:
    """The message for a run of several that cannot be used, with its directory."""
    return f"error: {error}" if run in str(error) else f"error: {run}: {error}"


@contextmanager
def without_warnings() -> Iterator[None]:
    """Context manager in which warnings of this program, such as that there is no GPU, are not printed."""
    log = logging.getLogger("vix")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
