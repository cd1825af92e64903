"""Files that are whole or absent, whatever stops the program, and directories that one process at a time writes."""

import fcntl
import json
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vix.checks import UserError


def expand_home(text: str) -> str:
    """``text`` with a leading ``~`` or ``~user`` replaced by that home directory, in configs, variables and arguments."""
    return os.path.expanduser(text)


def user_path(text: str) -> Path:
    """The type of a path that a user writes as an argument."""
    return Path(expand_home(text))


def write_whole(path: Path, contents: bytes | memoryview) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it over ``path``.

    Raises UserError where the disk is full or not writable; what ``path`` held before is then still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path} ({error.strerror}); what it held before is kept. Mend that and run the same command again"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all, with null for numbers that are not finite. Raises UserError."""
    text = json.dumps(finite(value), indent=2, allow_nan=False) + "\n"
    write_whole(path, text.encode())


def finite(value: Any) -> Any:
    """``value`` with None for every NaN and infinity in it: JSON has no words for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Hold ``directory`` against other processes; the lock goes with the process, however that ends.

    Raises UserError, naming the holder, where another process has it.
    """
    with open(directory / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{directory} is being written by {holder}; wait for it, or change the run (another seed, say)"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
