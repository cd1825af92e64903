"""The learning rate over the steps of a run."""

import math
from collections.abc import Callable


def lr_lambda(schedule: str, warmup: float, total: int) -> Callable[[int], float]:
    """The rate at a step (from 0) over ``optimizer.lr``.

    warmup: steps over which it rises on a line; total: steps of the run.
    schedule: after the warm-up constant, or down to 0 at ``total`` on a line (linear) or a half cosine (cosine).
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1.0, total - warmup)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]

    return factor
