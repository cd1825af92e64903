"""Output that never fails a job: characters that the terminal lacks are replaced, and a closed pipe or full disk is ignored."""

import codecs
import errno
import io
import logging
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console

ERRORS = "vix.replace"  # name of the codec error handler below
# The signs of this program's own messages and tables, as ASCII of the same width where there is one.
SIGNS = {
    "–": "-",
    "−": "-",
    "×": "x",
    "·": "*",
    "“": '"',
    "”": '"',
    "’": "'",
    "±": "+/-",
    "→": "->",
    "…": "...",
    "²": "^2",
    "⁹": "^9",
}
ASCII = str.maketrans(SIGNS)


def console() -> Console:
    """A console on standard output that prints texts as they are: ``[brackets]`` and ``:colons:`` in names are not markup."""
    return Console(markup=False, emoji=False, highlight=False)


def replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: plain signs for typographic ones, and ``\\u732b`` for every other character that is missing."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    plain = error.object[error.start : error.end].translate(ASCII)
    return plain.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(ERRORS, replace_unencodable)


def encodable(text: str) -> str:
    """The text as valid Unicode: a file's name need not be UTF-8, and Python keeps its other bytes as lone surrogates."""
    return text.encode(errors="backslashreplace").decode()


class LossyFile(io.FileIO):
    """A standard stream's file descriptor. What cannot be written is dropped, with all that follows.

    The descriptor is then that of the null device, so that C libraries and child processes do not fail either. A reader that
    has left (``| head``) is no fault; any other cause is reported once on standard error.
    """

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
            while written is None:  # a descriptor that somebody made non-blocking
                select.select([], [self.fileno()], [])
                written = super().write(data)
            return written
        except OSError as error:
            redirect_to_null(self.fileno())
            if error.errno != errno.EPIPE and self.fileno() == 1:
                with suppress(OSError):
                    os.write(2, f"warning: standard output is lost from here on ({error.strerror})\n".encode())
            return size


def redirect_to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def protect_output() -> None:
    """Make standard output and error of this process such that writing to them never raises.

    Called by every command, and by every job of a sweep, as a launcher may have started its process. A stream that is not on
    a file descriptor (a notebook's, a test's) is left as it is, and so is one that is protected already.
    """
    sys.stdout = protect_stream(sys.stdout, 1)
    sys.stderr = protect_stream(sys.stderr, 2)


def protect_stream(stream: "TextIO | None", descriptor: int) -> TextIO:
    """A stream that never raises in place of one that may; logging handlers that write to the old one get the new one."""
    if stream is None:  # closed by whoever started the program (``>&-``)
        try:
            os.fstat(descriptor)
        except OSError:
            redirect_to_null(descriptor)  # else the next file that is opened would get all that C libraries print
        return open(os.devnull, "w")
    if not isinstance(stream, io.TextIOWrapper) or isinstance(getattr(stream.buffer, "raw", None), LossyFile):
        return stream
    try:
        file = LossyFile(stream.fileno(), "wb", closefd=False)
    except (OSError, ValueError):  # not a file, or closed
        return stream
    try:
        stream.flush()
    except OSError:
        redirect_to_null(stream.fileno())
    lines = stream.line_buffering or stream.write_through
    safe = io.TextIOWrapper(io.BufferedWriter(file), stream.encoding, ERRORS, newline="\n", line_buffering=lines)
    loggers = (logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger))
    for logger in (logging.root, *loggers):
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                handler.setStream(safe)
    return safe
