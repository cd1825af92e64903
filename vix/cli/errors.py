"""One-line messages for the errors of commands that compute with a run's model."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vix.composition.compose import format_error, is_hydra_error
from vix.errors import UserError
from vix.system.memory import out_of_memory


@contextmanager
def one_line_errors(overrides: Sequence[str]) -> Iterator[None]:
    """Context manager that exits with a one-line message for errors of usage, invalid overrides, and lack of memory.

    overrides: of the command line.

    With HYDRA_FULL_ERROR=1 the errors are raised. Warnings of this program, such as that there is no GPU, are not printed.
    """
    logging.getLogger("vix").setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR", "0") != "0":
            raise
        if out_of_memory(error):
            sys.exit("error: out of memory; use a smaller trainer.eval_batch_size, or trainer.device=cpu")
        if not (isinstance(error, UserError) or is_hydra_error(error)):
            raise
        sys.exit(f"error: {format_error(error, overrides)}")
