"""Learning-rate schedules."""

import math
from collections.abc import Callable


def lr_lambda(schedule: str, warmup: float, total: int) -> Callable[[int], float]:
    """Function from the number of a step, from 0, to the factor of ``optimizer.lr``, for ``LambdaLR``.

    schedule: after the warmup ``constant``, or decreasing to 0 at ``total`` linearly (``linear``) or as a half cosine
        (``cosine``; Loshchilov and Hutter, "SGDR", 2017).
    warmup: steps over which the learning rate increases linearly.
    total: steps of the run.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1.0, total - warmup)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]

    return factor
