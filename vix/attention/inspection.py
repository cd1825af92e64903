"""Attention weights of mixers, and the error of approximate mixers relative to softmax attention.

Everything is computed in eval mode and without autocast. The modules' training modes are restored, and no random numbers are
drawn. Only mixers with the methods ``qkv`` and ``attend`` (:mod:`vix.attention`) can be inspected.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix.layers.attend import ScaledDotProduct
from vix.layers.precision import no_autocast

Result = TypeVar("Result")


def attention_weights(mixer: Any, x_BND: Tensor) -> Tensor:
    """Attention weights (B, H, N, M) of a mixer, whether or not it ever computes them explicitly.

    They are the mixer's output for the identity matrix as values. Those of an approximate mixer need not be positive or sum to
    1. Images are processed one by one, because the weights take N times the memory of the tokens.

    mixer: mixer with ``qkv`` and ``attend``.
    x_BND: its input tokens (B, N, D).
    """
    with inspecting(mixer, x_BND):
        weights = []
        for x_1ND in x_BND.split(1):
            q_BHNE, k_BGME, _ = mixer.qkv(x_1ND)
            identity_MM = torch.eye(k_BGME.shape[2], dtype=k_BGME.dtype, device=k_BGME.device)
            weights.append(mixer.attend(q_BHNE, k_BGME, identity_MM.expand(*k_BGME.shape[:2], -1, -1)))
        return torch.cat(weights)


def class_token_weights(mixer: Any, x_BND: Tensor) -> Tensor:
    """Attention weights of the class token (row 0), averaged over the heads: (B, M).

    The output is linear in the values, so the row is the gradient of the class token's output with respect to them. This takes
    one backward pass and no N×M matrix.

    mixer: mixer with ``qkv`` and ``attend``.
    x_BND: its input tokens (B, N, D), the class token first.
    """
    with inspecting(mixer, x_BND):
        q_BHNE, k_BGME, v_BGME = mixer.qkv(x_BND)
        with torch.enable_grad():
            values_BGME = torch.zeros_like(v_BGME, requires_grad=True)
            out_BHNE = mixer.attend(q_BHNE, k_BGME, values_BGME)
            (row_BGME,) = torch.autograd.grad(out_BHNE[:, :, 0, 0].sum(), values_BGME)
        return row_BGME[..., 0].sum(dim=1) / q_BHNE.shape[1]


def class_token_maps(model: nn.Module, images_BCYX: Tensor) -> list[Tensor]:
    """Per layer, the class token's attention weights on the token map, averaged over the heads: (B, Y, X).

    model: a model of :mod:`vix.models`.
    images_BCYX: images (B, C, Y, X) in [−1, 1].
    Returns an empty list where the model has no class token or its mixers have no attention weights (FNet, MLP-Mixer).
    """
    if getattr(model, "class_token", None) is None:
        return []
    rows = [row_BM[:, 1:] for row_BM in map_mixers(model, images_BCYX, class_token_weights)]
    return [row_BM.unflatten(1, (side := round(row_BM.shape[1] ** 0.5), side)) for row_BM in rows]


def softmax_error(model: nn.Module, images_BCYX: Tensor) -> list[float]:
    """Per layer, the relative error of the mixer compared with softmax attention on the same queries, keys and values.

    ‖attend(q, k, v) − softmax(q·kᵀ/√E)·v‖ / ‖softmax(q·kᵀ/√E)·v‖, Frobenius norms over all images, heads and tokens.

    model: a model of :mod:`vix.models`.
    images_BCYX: images (B, C, Y, X) in [−1, 1].
    Returns an empty list for mixers that are exact softmax attention, or have no queries and keys.
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
    function: Callable[[Any, Tensor], Result],
    of: Callable[[Any], bool] = lambda mixer: True,
) -> list[Result]:
    """Call ``function`` with each mixer and its input tokens, in the order of the layers, and return the results.

    model: module whose mixers are inspected.
    images_BCYX: images (B, C, Y, X) of the forward pass that provides the tokens.
    function: called with a mixer and its input tokens (B, N, D).
    of: which of the mixers to inspect.
    """
    results: list[Result] = []

    def hook(mixer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        results.append(function(mixer, arguments[0]))

    mixers = [m for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "attend") and of(m)]
    hooks = [mixer.register_forward_pre_hook(hook) for mixer in mixers]
    try:
        if mixers:
            with inspecting(model, images_BCYX):
                model(images_BCYX)
    finally:
        for handle in hooks:
            handle.remove()
    return results


@contextmanager
def inspecting(module: nn.Module, x: Tensor) -> Iterator[None]:
    """Context with the module in eval mode, without gradients and autocast; the training modes are restored afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), no_autocast(x):
            yield
    finally:
        for m, training in modes:
            m.training = training
