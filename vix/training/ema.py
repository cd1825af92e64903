"""Exponential moving average (EMA) of a model's weights: Tarvainen and Valpola, "Mean teachers", 2017."""

from copy import deepcopy

import torch
from torch import Tensor, nn


class ModelEMA:
    """Exponential moving average of a model's weights: average ← d·average + (1 − d)·weights.

    ``module`` is a copy of the model with the averaged weights. Buffers are copied, not averaged, because they are running
    statistics or random features.

    ``updates`` is the number n of updates. It is counted on the host, unlike in ``torch.optim.swa_utils.AveragedModel``, which
    copies it to the device at every update, so that the host waits for the device.

    model: the model; it is copied.
    decay: decay d per step, warmed up as min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = deepcopy(model), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the averages with the weights of ``model``; the first update copies them."""
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
