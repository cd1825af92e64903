"""What mixers attend to, and how far the approximate ones are from softmax attention.

All in eval mode and float32; the model's modes and the random generators are left as they were. Only mixers that have the
methods ``qkv`` and ``attend`` (:mod:`vix.attention`) can be looked at.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix.layers.attend import ScaledDotProduct
from vix.layers.precision import no_autocast

Seen = TypeVar("Seen")


def attention_weights(mixer: Any, x_BND: Tensor) -> Tensor:
    """The attention weights (B, H, N, M) that a mixer of tokens x_BND implies, whether or not it ever computes them.

    They are what it makes of the identity matrix as values. An approximate mixer's need not be positive or add up to 1.
    One image at a time, as they are N times as large as its tokens.
    """
    with inspecting(mixer, x_BND):
        weights = []
        for x_1ND in x_BND.split(1):
            q_BHNE, k_BGME, _ = mixer.qkv(x_1ND)
            identity_MM = torch.eye(k_BGME.shape[2], dtype=k_BGME.dtype, device=k_BGME.device)
            weights.append(mixer.attend(q_BHNE, k_BGME, identity_MM.expand(*k_BGME.shape[:2], -1, -1)))
        return torch.cat(weights)


def class_token_weights(mixer: Any, x_BND: Tensor) -> Tensor:
    """Row 0 of the attention weights, the mean of the heads: (B, M).

    As the output is linear in the values, the row is the gradient of the class token's output by them: one backward pass and
    no N×M matrix.
    """
    with inspecting(mixer, x_BND):
        q_BHNE, k_BGME, v_BGME = mixer.qkv(x_BND)
        with torch.enable_grad():
            values_BGME = torch.zeros_like(v_BGME, requires_grad=True)
            out_BHNE = mixer.attend(q_BHNE, k_BGME, values_BGME)
            (row_BGME,) = torch.autograd.grad(out_BHNE[:, :, 0, 0].sum(), values_BGME)
        return row_BGME[..., 0].sum(dim=1) / q_BHNE.shape[1]


def class_token_maps(model: nn.Module, images_BCYX: Tensor) -> list[Tensor]:
    """For each layer the class token's attention weights on the token map, (B, Y, X), the mean of the heads.

    Empty where the model has no class token or its mixers have no weights (FNet, MLP-Mixer).
    """
    if getattr(model, "class_token", None) is None:
        return []
    rows = [row_BM[:, 1:] for row_BM in map_mixers(model, images_BCYX, class_token_weights)]
    return [row_BM.unflatten(1, (side := round(row_BM.shape[1] ** 0.5), side)) for row_BM in rows]


def softmax_error(model: nn.Module, images_BCYX: Tensor) -> list[float]:
    """For each layer, how far its mixing is from softmax attention with the same queries, keys and values.

    ‖attend(q, k, v) − softmax(q·kᵀ/√E)·v‖ / ‖softmax(q·kᵀ/√E)·v‖, the Frobenius norms over all images, heads and tokens.
    Empty for mixers that are softmax attention themselves, or have neither queries nor keys.
    """

    def error(mixer: Any, x_BND: Tensor) -> float:
        q_BHNE, k_BGME, v_BGME = mixer.qkv(x_BND)
        shared = q_BHNE.shape[1] // k_BGME.shape[1]
        k_BHME, v_BHME = (t.repeat_interleave(shared, dim=1) for t in (k_BGME, v_BGME))
        exact_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME)
        return ((mixer.attend(q_BHNE, k_BGME, v_BGME) - exact_BHNE).norm() / exact_BHNE.norm()).item()

    return map_mixers(model, images_BCYX, error, of=lambda mixer: not isinstance(mixer.attend, ScaledDotProduct))


def map_mixers(
    model: nn.Module,
    images_BCYX: Tensor,
    look: Callable[[Any, Tensor], Seen],
    of: Callable[[Any], bool] = lambda mixer: True,
) -> list[Seen]:
    """What ``look`` makes of each mixer and the tokens that it gets from these images, in the order of the layers."""
    seen: list[Seen] = []

    def hook(mixer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(look(mixer, arguments[0]))

    mixers = [m for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "attend") and of(m)]
    hooks = [mixer.register_forward_pre_hook(hook) for mixer in mixers]
    try:
        if mixers:
            with inspecting(model, images_BCYX):
                model(images_BCYX)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


@contextmanager
def inspecting(module: nn.Module, x: Tensor) -> Iterator[None]:
    """Eval mode without gradients or autocast, and the modes as they were afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), no_autocast(x):
            yield
    finally:
        for m, training in modes:
            m.training = training
