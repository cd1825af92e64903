"""Console output that never raises: unencodable characters are replaced, and a closed pipe or a full disk is ignored."""

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
# Typographic characters of this program's messages and tables, with their ASCII replacements.
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
    """A console on standard output without markup: ``[brackets]`` and ``:colons:`` are printed as they are."""
    return Console(markup=False, emoji=False, highlight=False)


def replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: replaces typographic characters by ASCII, and other unencodable ones by escapes (``\\u732b``)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    plain = error.object[error.start : error.end].translate(ASCII)
    return plain.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(ERRORS, replace_unencodable)


def encodable(text: str) -> str:
    """The text as valid Unicode. File names need not be UTF-8; Python represents their other bytes as lone surrogates."""
    return text.encode(errors="backslashreplace").decode()


class LossyFile(io.FileIO):
    """The file descriptor of a standard stream. After a failed write, all further output is dropped.

    The descriptor is redirected to the null device, so that C libraries and child processes do not fail either. A closed pipe
    (``| head``) is not reported; any other cause is reported once on standard error.
    """

    def write(self, data: Any, /) -> int:
        """Write all bytes, or drop them after an error; returns their number in both cases."""
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
            while written is None:  # the descriptor is non-blocking
                select.select([], [self.fileno()], [])
                written = super().write(data)
            return written
        except OSError as error:
            redirect_to_null(self.fileno())
            if error.errno != errno.EPIPE and self.fileno() == 1:
                with suppress(OSError):
                    os.write(2, f"warning: further standard output is lost ({error.strerror})\n".encode())
            return size


def redirect_to_null(descriptor: int) -> None:
    """Redirect a file descriptor to the null device."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def protect_output() -> None:
    """Replace standard output and standard error by streams to which writing never raises.

    Called by every command, and by every job of a sweep, because a launcher may have started its process. A stream without a
    file descriptor (in a notebook or a test) is unchanged, and so is a stream that is already protected.
    """
    sys.stdout = protect_stream(sys.stdout, 1)
    sys.stderr = protect_stream(sys.stderr, 2)


def protect_stream(stream: "TextIO | None", descriptor: int) -> TextIO:
    """A stream that never raises, in place of ``stream``; logging handlers of ``stream`` are switched to it."""
    if stream is None:  # closed by the parent process (``>&-``)
        try:
            os.fstat(descriptor)
        except OSError:
            redirect_to_null(descriptor)  # otherwise the next opened file would receive the output of C libraries
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
