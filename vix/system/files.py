"""Atomic file writes, and locks that let only one process write to a directory.

Some network file systems support neither locks nor hard links. There, a run continues without the lock and copies the file,
with one warning per process.
"""

import argparse
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
DEVICES = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))
warned: set[str] = set()  # topics of the warnings that this process has logged


class LockedError(UserError):
    """Another process is writing to the directory."""


def warn_once(about: str, message: str, *values: object) -> None:
    """Log a warning once per process and topic.

    about: the topic.   message, values: as for ``log.warning``.
    """
    if about not in warned:
        warned.add(about)
        log.warning(message, *values)


def try_lock(file: IO[Any], operation: int) -> bool:
    """Apply ``fcntl.flock``; log a warning and return False where the file system does not support locks.

    operation: of ``fcntl.flock``.

    Raises BlockingIOError where ``operation`` is non-blocking and another process holds the lock.
    """
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno == errno.EACCES:  # some network file systems report a held lock this way
            raise BlockingIOError(error.errno, error.strerror) from error
        reason = error.strerror or error
        warn_once("lock", "%s cannot be locked (%s): concurrent writes by two processes are not detected", file.name, reason)
        return False
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """Replace ``target`` by a hard link to ``source``, or by a copy where hard links are not supported; atomic in both cases.

    Raises UserError where the copy cannot be written.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(source, temporary)
        temporary.replace(target)
        temporary.unlink(missing_ok=True)  # remains if both names were already the same file, after an earlier kill here
    except OSError as error:
        warn_once("link", "%s cannot be hard-linked (%s): copying it instead", source, error.strerror or error)
        atomic_write(target, source.read_bytes())


def flush_to_disk(descriptor: int) -> None:
    """``os.fsync``; logs a warning where the file system does not support it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        warn_once("fsync", "files cannot be flushed to the disk (%s): a power failure may lose the last ones", error.strerror)


def expand_home(text: str) -> str:
    """``text`` with a leading ``~`` or ``~user`` replaced by the home directory. Raises UserError where there is none."""
    expanded = os.path.expanduser(text)
    if not expanded.startswith("~"):
        return expanded
    user = text.partition("/")[0][1:]
    reason = f"there is no user {user}" if user else "the home directory is unknown; set the environment variable HOME"
    raise UserError(f"{text}: {reason}; a directory of that name is ./{text}")


def user_path(text: str) -> Path:
    """The ``type`` of an argparse argument that is a path: expands a leading ``~``."""
    return Path(expand_home(text))


def run_directory_name(directory: Path) -> str:
    """The last two parts of a run's directory, such as ``vin/seed=0``, by which it is listed."""
    return "/".join(Path(os.path.normpath(directory.absolute())).parts[-2:])


def out_file(text: str) -> Path:
    """The ``type`` of an argparse argument that is a file to write: as ``user_path``, but refuses a directory."""
    path = user_path(text)
    if not path.name or os.path.isdir(path):  # unlike Path.is_dir, False where a directory above is not accessible
        raise argparse.ArgumentTypeError(f"{text or 'an empty name'} is not the name of a file")
    return path


def atomic_write(path: Path, contents: bytes | memoryview) -> None:
    """Write a temporary file, flush it to disk, and rename it to ``path``. A device, a pipe, or what stands in for one, such as
    /dev/stdout redirected to a file, is written to in place.

    Raises UserError where the disk is full or not writable; the previous contents of ``path`` are then kept.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if os.path.exists(path) and (not path.is_file() or path.parent in DEVICES):
            with open(path, "wb") as device:
                device.write(contents)
            return
        with open(temporary, "wb") as file:
            file.write(contents)
            file.flush()
            flush_to_disk(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path} ({error.strerror}); its previous contents are kept. Fix the cause and run the command again"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON atomically, with null for numbers that are not finite. Raises UserError as ``atomic_write``."""
    text = json.dumps(nan_to_none(value), indent=2, allow_nan=False) + "\n"
    atomic_write(path, text.encode())


def nan_to_none(value: Any) -> Any:
    """``value`` with every NaN and infinity replaced by None, because JSON cannot represent them."""
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def walk(top: Path, enters: Callable[[os.DirEntry[str]], bool]) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Yield ``top`` and every directory below it, each with its entries that are not directories. Links are followed.

    enters: whether to descend into a directory.

    Each directory is yielded once, even if several links or a cycle of links lead to it, and under its real path where that
    is below ``top``. Broken links are entries.

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
    """Whether an entry is a directory or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Context manager that locks the file ``path``, which is created, and waits for other processes that hold the lock."""
    with open(path, "w") as file:
        lock_or_wait(file, fcntl.LOCK_EX)
        yield


def wait_for_lock(path: Path) -> None:
    """Wait for other processes that hold :func:`waiting_lock` of the file ``path``. Writes nothing."""
    with suppress(OSError), open(path) as file:
        lock_or_wait(file, fcntl.LOCK_SH)


def lock_or_wait(file: IO[Any], operation: int) -> None:
    """:func:`try_lock`, with a line in the log where another process holds the lock and this one waits for it."""
    try:
        try_lock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("Waiting for another process that has locked %s", file.name)
        try_lock(file, operation)


@contextmanager
def exclusive_lock(directory: Path) -> Iterator[None]:
    """Context manager that locks ``directory`` against other processes; the lock is released when the process ends.

    Raises LockedError, which names the owner, where another process holds the lock.
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
    """Raises LockedError, which names the owner, where another process is writing to ``directory``. Writes nothing."""
    try:
        file = open(directory / ".lock")  # noqa: SIM115  (later errors must not be caught here)
    except OSError:
        return
    with file:
        try:
            try_lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(locked_message(directory, file)) from None


def locked_message(directory: Path, file: IO[str]) -> str:
    """The error message, with the owner that the lock file names."""
    file.seek(0)
    owner = file.read().strip() or "another process"
    return f"{directory} is being written by {owner}; wait for it, or change the run (for example, its seed)"
