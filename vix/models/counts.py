"""FLOPs and parameter counts. FLOPs are computed from shapes; a multiply-add of a matrix product or convolution counts as 2."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vix.layers.checkpointing import set_activation_checkpointing

Shape = tuple[int, ...]
T = TypeVar("T")


def training_flops(model: nn.Module, image_shape: Shape) -> int:
    """FLOPs of a forward and backward pass for one image, without recomputation by activation checkpointing.

    model: module that maps images (B, C, Y, X) to logits; it is not changed.
    image_shape: (C, Y, X).
    """

    def count(model: nn.Module, device: str) -> int:
        set_activation_checkpointing(model.train(), None)
        counter = flop_counter()
        with counter:  # with two images, because BatchNorm does not train on one value per channel
            model(torch.zeros(2, *image_shape, device=device)).sum().backward()
        return counter.get_total_flops() // 2

    return without_values(count, model)


def without_values(run: Callable[[nn.Module, str], T], model: nn.Module) -> T:
    """``run(copy, device)`` with a copy of the model on the meta device, or where that fails on the CPU.

    It fails for a module of a user's own that reads values, such as the maximum of its input.
    """
    try:
        return run(copy.deepcopy(model).to("meta"), "meta")
    except RuntimeError:
        with torch.random.fork_rng(devices=()):  # on the meta device no random numbers are drawn
            return run(copy.deepcopy(model).cpu(), "cpu")


def flop_counter() -> FlopCounterMode:
    """PyTorch's FLOP counter, with formulas for operations that it lacks or counts incorrectly."""
    aten = torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {
        aten._fft_c2c: partial(fourier_flops, 5),
        aten._fft_r2c: partial(fourier_flops, 2.5),
        aten._fft_c2r: partial(fourier_flops, 2.5),
        aten.convolution_backward: convolution_backward_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
        torch.ops.vix.fused_attention: attention_flops,  # vix/layers/fused_attention.py
        torch.ops.vix.fused_attention_backward: attention_backward_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def fourier_flops(factor: float, shape: Shape, axes: list[int], *_: Any, out_shape: Shape, **__: Any) -> int:
    """FLOPs of an FFT, by the convention of FFT benchmarks: 5 n log₂ n for n complex values, half of it for real values."""
    values = max(shape, out_shape, key=math.prod)  # a real transform's spectrum has about half as many values
    return round(factor * math.prod(values) * math.log2(math.prod(values[axis] for axis in axes)))


def convolution_backward_flops(grad_shape: Shape, input_shape: Shape, weight_shape: Shape, *options: Any, **_: Any) -> int:
    """FLOPs of a convolution's backward pass: each of the two gradients costs as much as the forward pass.

    PyTorch's formula ignores groups: it counts 128 times too many FLOPs for 128 groups.
    """
    transposed, mask = options[4], options[7]
    per_image = math.prod((input_shape if transposed else grad_shape)[2:]) * math.prod(weight_shape)
    return 2 * grad_shape[0] * per_image * (mask[0] + mask[1])


def attention_flops(q_shape: Shape, k_shape: Shape, v_shape: Shape, *_: Any, **__: Any) -> int:
    """FLOPs of the two matrix products of fused attention."""
    return 2 * math.prod(q_shape[:-1]) * k_shape[-2] * (q_shape[-1] + v_shape[-1])


def attention_backward_flops(_: Shape, *shapes: Any, **__: Any) -> int:
    """FLOPs of the backward pass of fused attention, without the product that the kernel recomputes."""
    return 2 * attention_flops(*shapes)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Two parameter counts of a model, by name.

    trainable_params: all parameters that receive a gradient.
    weight_bias_params: the paper's count, of parameters named weight or bias only. It excludes position tables, class tokens
        and Linformer's projections along the tokens.
    """
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    counted = sum(n for name, n in trainable.items() if name.rpartition(".")[2] in ("weight", "bias"))
    return {"trainable_params": sum(trainable.values()), "weight_bias_params": counted}
