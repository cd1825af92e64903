"""Errors whose message is one line for the user, and words that such messages share."""

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can put right; its message is one line with the cause and the way out."""


class ConfigError(UserError, ValueError):
    """A config that cannot work; the message names the key."""


class DataError(UserError):
    """Data that is missing or not what it should be; the message names the file and what to do."""


def nearest_divisors(number: int, near: int) -> str:
    """The one or two divisors of ``number`` nearest to ``near``, as words for an error message."""
    divisors = (n for n in range(1, number + 1) if number % n == 0)
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda n: abs(n - near))[:2])))


def nearest(name: str, valid: Iterable[str], prefix: str = "") -> str:
    """Words for an error message: the valid names nearest to ``name``, or all of them where none is near."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(prefix + c for c in close)
    return "valid: " + ", ".join(prefix + v for v in valid) if valid else "it has none"


def first_paragraph(error: Exception) -> str:
    """The first paragraph of an error's message on one line, without where Hydra would look things up."""
    text = re.sub(r"\n\s*(See https|full_key|object_type).*", "", str(error).strip()).split("\n\n")[0]
    return " ".join(text.split()) or type(error).__name__
