"""FLOPs of a model, worked out from its shapes: two for every multiply-add of a matrix product or convolution."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vix.layers.checkpointing import set_activation_checkpointing

Shape = tuple[int, ...]


def training_flops(model: nn.Module, image_shape: Shape) -> int:
    """FLOPs of forward and backward for one image (C, Y, X), without what is computed twice."""
    shapes_only = copy.deepcopy(model).to("meta").train()
    set_activation_checkpointing(shapes_only, None)
    counter = flop_counter()
    with counter:  # of two images, because a batch norm refuses to train on one value
        shapes_only(torch.empty(2, *image_shape, device="meta")).sum().backward()
    return counter.get_total_flops() // 2


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter of FLOPs, with the formulas that it lacks or has wrong."""
    aten = torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {
        aten._fft_c2c: partial(fourier_flops, 5),
        aten._fft_r2c: partial(fourier_flops, 2.5),
        aten._fft_c2r: partial(fourier_flops, 2.5),
        aten.convolution_backward: convolution_backward_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def fourier_flops(factor: float, shape: Shape, axes: list[int], *_: Any, out_shape: Shape, **__: Any) -> int:
    """5 n log₂ n for a transform of n complex values and half of it for real ones, as benchmarks count; PyTorch counts none."""
    values = max(shape, out_shape, key=math.prod)  # of real values and their half of a spectrum, the values
    return round(factor * math.prod(values) * math.log2(math.prod(values[axis] for axis in axes)))


def convolution_backward_flops(grad_shape: Shape, input_shape: Shape, weight_shape: Shape, *options: Any, **_: Any) -> int:
    """Each of the two gradients costs what the forward pass does.

    PyTorch's own formula takes a grouped convolution's weight for a full one: 128 times too many FLOPs at 128 groups.
    """
    transposed, mask = options[4], options[7]
    per_image = math.prod((input_shape if transposed else grad_shape)[2:]) * math.prod(weight_shape)
    return 2 * grad_shape[0] * per_image * (mask[0] + mask[1])


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """``trainable_params``: all that receive a gradient; ``weight_bias_params``: the paper's count, which takes only
    parameters called weight or bias (position tables, class tokens and Linformer's projections are none)."""
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    counted = sum(n for name, n in trainable.items() if name.rpartition(".")[2] in ("weight", "bias"))
    return {"trainable_params": sum(trainable.values()), "weight_bias_params": counted}
