"""What a training step computes twice rather than keep: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016."""

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

from vix.attention.heads import at_least_float32

Recompute = Literal["cheap", "everything"] | None

aten = torch.ops.aten
DEAR = {
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
LONG = 64  # products over so many numbers, as a linear layer's, are dear; a feature map's, over a head's 32, are not


def cheap(context: SelectiveCheckpointContext, operation: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
    """What becomes of an operation's result where ``recompute`` is cheap."""
    product = operation in (aten.mm.default, aten.addmm.default)
    dear = arguments[-2].shape[1] >= LONG if product else operation in DEAR
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """What a family repeats: (B, N, D) → the same, by the subclass's ``transform``.

    The residual stream, the tokens that pass from block to block, is float32 under any autocast (float64 in a float64 model).
    A block decides that for all families, on entry: its first norm then sums in float32 in its backward pass, which PyTorch's
    LayerNorm does not do for bfloat16 input on a CPU (17 to 99 % of its weights' gradients were lost, tests/test_gradients.py).

    recompute: what of it a training step computes again in the backward pass instead of keeping it from the forward pass:
        None: nothing; everything, so that the block's input alone is kept; or, in compiled steps, what is ``cheap``: norms,
        activations, feature maps and the like, all but linear layers, convolutions and fused attention. To single them out in
        steps that are not compiled would take longer than everything does, and ``cheap`` is everything there. The gradients
        are the same, and random numbers, such as dropout's, are drawn once.
    """

    recompute: Recompute = None

    def transform(self, x_BND: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x_BND: Tensor) -> Tensor:
        (x_BND,) = at_least_float32(x_BND)
        if self.recompute is None or not torch.is_grad_enabled():
            return self.transform(x_BND)
        options: dict[str, Any] = {}
        # Tensors without numbers are those of an estimate, which is about compiled steps.
        if self.recompute == "cheap" and (torch.compiler.is_compiling() or isinstance(x_BND, FakeTensor)):
            options["context_fn"] = partial(create_selective_checkpoint_contexts, cheap)
        return checkpoint(self.transform, x_BND, use_reentrant=False, **options)


def recompute_blocks(model: nn.Module, what: Recompute) -> None:
    """Set ``recompute`` of the model's blocks, except of those with a BatchNorm: it would count every batch twice."""
    for block in model.modules():
        if isinstance(block, Block):
            counts = any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in block.modules())
            block.recompute = None if counts else what
