"""Errors whose message is one line for the user, and helpers to write such messages."""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can fix; its message is one line with the cause and the fix."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(UserError, ValueError):
    """An invalid config; the message names the key."""


class DataError(UserError):
    """Missing or invalid data; the message names the file and the fix."""


def one_line(text: str) -> str:
    """The text with what a terminal cannot print, such as line ends and control characters, as in Python's literals."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Context manager that begins the message of a UserError with ``KEY=``."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{key}={error}") from error


@contextmanager
def permission_errors(kind: type[UserError] = UserError) -> Iterator[None]:
    """Context manager and decorator that raises a UserError for a PermissionError.

    ``Path.is_file`` raises one below a directory that the user may not enter.

    kind: of the UserError.
    """
    try:
        yield
    except PermissionError as error:
        raise kind(f"{error.filename}: no permission to read it") from error


def nearest_divisors(number: int, near: int) -> str:
    """The one or two divisors of ``number`` nearest to ``near``, separated by commas, for an error message."""
    divisors = (n for n in range(1, number + 1) if number % n == 0)
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda n: abs(n - near))[:2])))


def nearest(name: str, valid: Iterable[str], prefix: str = "") -> str:
    """Part of an error message: up to three valid names similar to ``name``, or all of them where none is similar.

    prefix: written before each name.
    """
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(prefix + c for c in close)
    return "valid: " + ", ".join(prefix + v for v in valid) if valid else "it has no options"


def first_paragraph(error: Exception) -> str:
    """The first paragraph of an error's message on one line, without Hydra's links and OmegaConf's internal fields."""
    text = re.sub(r"\n\s*(See https|full_key|object_type|reference_type).*", "", str(error).strip()).split("\n\n")[0]
    text = re.sub(r"^(User|Config|Data)Error raised while resolving interpolation: ", "", text)
    return " ".join(text.split()) or type(error).__name__
