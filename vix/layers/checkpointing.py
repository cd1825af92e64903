"""Activation checkpointing: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from vix.layers import fused_attention
from vix.layers.precision import upcast_fp32

ActivationCheckpointing = Literal["selective", "full"] | None

aten = torch.ops.aten
SAVED_OPS = {
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    fused_attention.OPERATOR,
}
# Matrix products with at least this inner dimension (linear layers) are saved. Those of random features, whose inner dimension
# is the width of a head, are recomputed.
MIN_INNER_DIM = 64


def selective_policy(context: SelectiveCheckpointContext, operation: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
    """Policy of selective activation checkpointing: whether an operation's output is saved for the backward pass."""
    product = operation in (aten.mm.default, aten.addmm.default)
    saved = arguments[-2].shape[1] >= MIN_INNER_DIM if product else operation in SAVED_OPS
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """Base class of the families' blocks, (B, N, D) → (B, N, D). Subclasses implement ``forward_once``.

    The residual stream is float32 under any autocast dtype (float64 in a float64 model). The block upcasts its input, so that
    the backward pass of its first norm accumulates in float32. PyTorch's LayerNorm does not do so for bfloat16 input on a CPU:
    it lost 17 to 99 % of its weights' gradients (tests/training/test_gradients.py).

    activation_checkpointing: what a training step recomputes in the backward pass instead of storing it:
        None: nothing.
        full: the whole block; only its input is stored.
        selective: in compiled steps everything except linear layers, convolutions and fused attention. In eager steps the same
            as full, because selecting operations takes longer there than recomputing all of them.
        Gradients are the same in all three modes; random numbers, such as dropout's, are drawn once.
    """

    activation_checkpointing: ActivationCheckpointing = None

    def forward_once(self, x_BND: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x_BND: Tensor) -> Tensor:
        (x_BND,) = upcast_fp32(x_BND)
        if self.activation_checkpointing is None or not torch.is_grad_enabled():
            return self.forward_once(x_BND)
        options: dict[str, Any] = {}
        # The input is a fake tensor in a memory estimate, which estimates compiled steps.
        if self.activation_checkpointing == "selective" and (torch.compiler.is_compiling() or isinstance(x_BND, FakeTensor)):
            options["context_fn"] = partial(create_selective_checkpoint_contexts, selective_policy)
        return checkpoint(self.forward_once, x_BND, use_reentrant=False, **options)


def set_activation_checkpointing(model: nn.Module, mode: ActivationCheckpointing) -> None:
    """Set the activation checkpointing of all blocks of a model, except those with a BatchNorm.

    Recomputation would update a BatchNorm's running statistics twice per batch.

    model: module whose :class:`Block` submodules are set.
    mode: as in :class:`Block`.
    """
    for block in model.modules():
        if isinstance(block, Block):
            has_batch_norm = any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in block.modules())
            block.activation_checkpointing = None if has_batch_norm else mode
