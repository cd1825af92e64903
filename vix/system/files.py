"""Files that are whole or absent, whatever stops the program, and directories that one process at a time writes.

Locks and hard links are conveniences: where a file system lacks them, as some network file systems do, a run goes on without
the lock and with a plain copy, after one warning per process.
"""

import errno
import fcntl
import json
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from vix.errors import UserError

log = logging.getLogger(__name__)
NOT_SUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
warned: set[str] = set()  # of what this process has warned already


class LockedError(UserError):
    """A directory that another process writes at this moment."""


def warn_once(about: str, message: str, *values: object) -> None:
    """Log a warning, but only the first one ``about`` this in this process."""
    if about not in warned:
        warned.add(about)
        log.warning(message, *values)


def try_lock(file: IO[Any], operation: int) -> bool:
    """Apply ``fcntl.flock``; False, after a warning, where the file system has no locks.

    Raises BlockingIOError where ``operation`` does not wait and another process holds the lock.
    """
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno == errno.EACCES:  # how some network file systems say that another process holds it
            raise BlockingIOError(error.errno, error.strerror) from error
        reason = error.strerror or error
        warn_once("lock", "%s cannot be locked (%s): two processes that write there at once go unnoticed", file.name, reason)
        return False
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """Give ``source`` a second name, or where hard links are not supported a copy; ``target`` is whole at every moment.

    Raises UserError where the copy cannot be written.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(source, temporary)
        temporary.replace(target)
        temporary.unlink(missing_ok=True)  # still there if both names were one file already, after a kill at this very place
    except OSError as error:
        warn_once("link", "%s cannot be hard-linked (%s): it is copied instead", source, error.strerror or error)
        atomic_write(target, source.read_bytes())


def flush_to_disk(descriptor: int) -> None:
    """``os.fsync``, where the file system has it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        warn_once("fsync", "files cannot be flushed to the disk (%s): a power failure may lose the last ones", error.strerror)


def expand_home(text: str) -> str:
    """``text`` with a leading ``~`` or ``~user`` replaced by that home directory, in configs, variables and arguments."""
    return os.path.expanduser(text)


def user_path(text: str) -> Path:
    """The type of a path that a user writes as an argument."""
    return Path(expand_home(text))


def atomic_write(path: Path, contents: bytes | memoryview) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it over ``path``.

    Raises UserError where the disk is full or not writable; what ``path`` held before is then still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(contents)
            file.flush()
            flush_to_disk(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path} ({error.strerror}); what it held before is kept. Fix that and run the same command again"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all, with null for numbers that are not finite. Raises UserError."""
    text = json.dumps(nan_to_none(value), indent=2, allow_nan=False) + "\n"
    atomic_write(path, text.encode())


def nan_to_none(value: Any) -> Any:
    """``value`` with None for every NaN and infinity in it: JSON has no words for them."""
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(item) for item in value]
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
def exclusive_lock(directory: Path) -> Iterator[None]:
    """Hold ``directory`` against other processes; the lock goes with the process, however that ends.

    Raises LockedError, naming the holder, where another process has it.
    """
    with open(directory / ".lock", "a+") as file:
        try:
            try_lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(locked_message(directory, file)) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def check_unlocked(directory: Path) -> None:
    """Raises LockedError, naming the holder, where another process writes ``directory`` at this moment; writes nothing."""
    try:
        file = open(directory / ".lock")  # noqa: SIM115  (what goes wrong later is not what is caught here)
    except OSError:
        return
    with file:
        try:
            try_lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(locked_message(directory, file)) from None


def locked_message(directory: Path, file: IO[str]) -> str:
    """The error that names the process which wrote its name into a lock's file."""
    file.seek(0)
    holder = file.read().strip() or "another process"
    return f"{directory} is being written by {holder}; wait for it, or change the run (another seed, say)"
