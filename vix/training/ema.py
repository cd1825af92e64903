"""An exponential moving average of a model's weights (Tarvainen and Valpola, "Mean teachers", 2017)."""

from copy import deepcopy

import torch
from torch import Tensor, nn


class ModelEMA:
    """A copy of the model, ``module``, whose weights follow the model's: average ← d·average + (1 − d)·weights.

    decay: d; after n updates at most (1 + n) / (10 + n), so that the first weights do not linger.
    updates: n. It is counted on the host: ``torch.optim.swa_utils.AveragedModel`` copies its count to the device at every
        update, and the host waits for that.

    Buffers are copied, not averaged: they are statistics with an average of their own, or random features.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = deepcopy(model), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the averages towards the model's weights; the first update copies them."""
        averages: list[Tensor] = list(self.module.parameters())
        weights: list[Tensor] = list(model.parameters())
        if self.updates:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(averages, weights, 1 - decay)
        else:
            torch._foreach_copy_(averages, weights)
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.updates += 1
