"""Files that are whole or absent, whatever stops the program, and directories that one process at a time writes."""

import fcntl
import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vix.checks import UserError


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


def walk(top: Path, enters: Callable[[os.DirEntry[str]], bool]) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Every directory below ``top``, itself included, with its entries that are no directories; links are followed.

    Each directory comes once, however many links lead to it and even if they form a circle, and under its own name where it
    has one below ``top``. Broken links are entries. ``enters``: whether to go into a directory.

    Raises OSError where a directory cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    directories, links = [str(top)], list[str]()
    while directories or links:
        directory = directories.pop() if directories else links.pop(0)
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(directory) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        inner = [entry for entry in found if is_directory(entry)]
        yield directory, [entry for entry in found if not is_directory(entry)]
        for entry in inner:
            if enters(entry):
                (links if entry.is_symlink() else directories).append(entry.path)


def is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


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
