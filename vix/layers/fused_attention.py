"""PyTorch's fused attention on a CPU, with its matrix products by MKL whatever computes other float32 products."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

aten = torch.ops.aten


def fused_attention(q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor) -> Tensor:
    """Scaled dot-product attention on a CPU: queries (B, H, N, E), keys and values (B, H, M, E) → (B, H, N, E).

    The kernel multiplies small blocks. With oneDNN (``vix.system.device.set_float32_precision``), it takes twice the time.
    """
    # ONNX has no such operator, and memory estimates have their own replacement of PyTorch's function.
    if torch.compiler.is_exporting() or isinstance(q_BHNE, FakeTensor):
        return F.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME)
    # The kernel reads the channels of a head as neighbours in memory.
    out_BHNE, _ = forward(*(t if t.stride(-1) == 1 else t.contiguous() for t in (q_BHNE, k_BHME, v_BHME)))
    return out_BHNE


def same_heads(q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor) -> bool:
    """Whether :func:`fused_attention` takes these: four axes, and the same images, heads and head widths, none broadcast."""
    sizes = {(*t.shape[:2], t.shape[-1]) for t in (q_BHNE, k_BHME, v_BHME)}
    return q_BHNE.ndim == 4 and len(sizes) == 1 and k_BHME.shape == v_BHME.shape


@contextmanager
def products_by_mkl() -> Iterator[None]:
    """Context in which oneDNN computes no float32 matrix products."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.library.custom_op("vix::fused_attention", mutates_args=(), device_types="cpu")
def forward(q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor) -> tuple[Tensor, Tensor]:
    """The output (B, H, N, E), and the logarithm of the softmax's denominator (B, H, N)."""
    with products_by_mkl():
        return aten._scaled_dot_product_flash_attention_for_cpu(q_BHNE, k_BHME, v_BHME)


@torch.library.custom_op("vix::fused_attention_backward", mutates_args=(), device_types="cpu")
def backward(
    gradient_BHNE: Tensor, q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, out_BHNE: Tensor, normalizer_BHN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    saved = (q_BHNE, k_BHME, v_BHME, out_BHNE, normalizer_BHN)
    with products_by_mkl():
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(gradient_BHNE, *saved, 0.0, False)


@forward.register_fake
def _(q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q_BHNE, k_BHME, v_BHME)


@backward.register_fake
def _(gradient_BHNE: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(gradient_BHNE, *saved, 0.0, False)


def save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save what the backward pass needs."""
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx: Any, gradient_BHNE: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass."""
    return backward(gradient_BHNE, *ctx.saved_tensors)


forward.register_autograd(differentiate, setup_context=save)
OPERATOR = torch.ops.vix.fused_attention.default
