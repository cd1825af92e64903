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

from vix.layers.precision import upcast_fp32

ActivationCheckpointing = Literal["selective", "full"] | None

aten = torch.ops.aten
SAVED_OPS = {
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
# Matrix products with an inner dimension of at least this are saved, as those of linear layers are; those of feature maps,
# whose inner dimension is a head's width, are recomputed.
MIN_INNER_DIM = 64


def selective_policy(context: SelectiveCheckpointContext, operation: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
    """Whether an operation's output is saved for the backward pass where activation checkpointing is selective."""
    product = operation in (aten.mm.default, aten.addmm.default)
    saved = arguments[-2].shape[1] >= MIN_INNER_DIM if product else operation in SAVED_OPS
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """Base of the blocks that a family repeats: (B, N, D) → (B, N, D), by the subclass's ``forward_once``.

    The residual stream is float32 under any autocast (float64 in a float64 model). A block upcasts its input for all families:
    its first norm then sums in float32 in its backward pass, which PyTorch's LayerNorm does not do for bfloat16 input on a CPU
    (17 to 99 % of its weights' gradients were lost, tests/training/test_gradients.py).

    activation_checkpointing: what a training step recomputes in the backward pass instead of storing it:
        None: nothing.
        full: the whole block; only its input is stored.
        selective: in compiled steps norms, activations, feature maps and the like, but not linear layers, convolutions and
            fused attention. In eager steps it is the same as full, because selecting operations there takes longer than
            recomputing all of them.
        Gradients are the same in all three, and random numbers, such as dropout's, are drawn once.
    """

    activation_checkpointing: ActivationCheckpointing = None

    def forward_once(self, x_BND: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x_BND: Tensor) -> Tensor:
        (x_BND,) = upcast_fp32(x_BND)
        if self.activation_checkpointing is None or not torch.is_grad_enabled():
            return self.forward_once(x_BND)
        options: dict[str, Any] = {}
        # Fake tensors are those of a memory estimate, which is about compiled steps.
        if self.activation_checkpointing == "selective" and (torch.compiler.is_compiling() or isinstance(x_BND, FakeTensor)):
            options["context_fn"] = partial(create_selective_checkpoint_contexts, selective_policy)
        return checkpoint(self.forward_once, x_BND, use_reentrant=False, **options)


def set_activation_checkpointing(model: nn.Module, mode: ActivationCheckpointing) -> None:
    """Set the mode of the model's blocks, except of those with a BatchNorm: it would count every batch twice."""
    for block in model.modules():
        if isinstance(block, Block):
            has_batch_norm = any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in block.modules())
            block.activation_checkpointing = None if has_batch_norm else mode
