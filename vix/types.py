"""Ranges that options declare in their constructors' annotations; ``vix.config`` checks them with pydantic."""

from typing import Annotated

from pydantic import Field

LARGEST = 2**31 - 1  # sizes and counts are multiplied with one another, and PyTorch holds the products in 64 bits
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]  # what torch.manual_seed takes
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
UnitInterval = Annotated[float, Field(gt=0, le=1)]
