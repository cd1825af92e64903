"""Types with ranges for the annotations of constructors; :mod:`vix.config` checks them with pydantic."""

from typing import Annotated

from pydantic import Field

LARGEST = 2**31 - 1  # products of two sizes must fit into PyTorch's 64-bit integers
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]  # of torch.manual_seed; on a CPU the lower 32 bits count
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
UnitInterval = Annotated[float, Field(gt=0, le=1)]
