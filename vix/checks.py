"""Ranges that options declare in their constructors' annotations, and the error that says an option cannot work.

``vix.config`` reads the annotations with pydantic, so a value out of range is refused with the key's name before anything
is built.
"""

from typing import Annotated

from pydantic import Field

LARGEST = 2**31 - 1  # sizes and counts are multiplied with one another, and PyTorch holds the products in 64 bits
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]  # what torch.manual_seed takes
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Portion = Annotated[float, Field(gt=0, le=1)]


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
