"""Linear attention: Katharopoulos et al., "Transformers are RNNs", 2020, and three other kernels."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from vix.layers.attend import linear_attention
from vix.layers.heads import MultiHeadMixer
from vix.layers.precision import no_autocast, upcast_fp32
from vix.layers.tokens import TokenGrid
from vix.types import Positive


class LinearAttention(MultiHeadMixer):
    """Attention by a kernel of queries and keys, linear in the number of tokens.

    heads, dim_head: number of heads H and width E of one; ``dim_head`` None means dim / heads.
    kernel: ``elu``: φ(q)(φ(k)ᵀv) / φ(q)Σφ(k) with φ = elu + 1. ``relu``: the same with φ = relu, and 1e-5 added to the
        denominator (Cai et al., "EfficientViT", 2022). ``softmax``: softmax of q over its E channels, divided by √E, times
        (softmax of k over the tokens)ᵀv (Shen et al., "Efficient Attention", 2018). ``cosine``: q ⊙ Σ k ⊙ v with q and k of
        length 1 (those shorter than 1e-3 are divided by 1e-3, so that gradients are bounded), which is attention with as many
        heads as channels, so ``heads`` has an effect only on the frequencies of rotary positions and, with ``dim_head``, on the
        width (Bolya et al., "Hydra Attention", 2022).

    Raises ValueError where ``heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        tokens: TokenGrid,
        rotary: Callable[[int], nn.Module] | None = None,
        *,
        heads: Positive = 4,
        dim_head: Positive | None = None,
        kernel: Literal["elu", "relu", "softmax", "cosine"] = "elu",
    ) -> None:
        super().__init__(dim, rotary, heads, dim_head)
        self.kernel = kernel
        self.has_attention_weights = kernel != "cosine"  # which weighs channels, not tokens

    def attend(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
        """Linear attention: queries, keys and values (B, H, N, E) → (B, H, N, E), in at least float32."""
        with no_autocast(q_BHNE):
            q_BHNE, k_BHNE, values_BHNE = upcast_fp32(q_BHNE, k_BHNE, v_BHNE)
            if self.kernel == "elu":
                out_BHNE = linear_attention(elu_plus_1(q_BHNE), elu_plus_1(k_BHNE), values_BHNE)
            elif self.kernel == "relu":
                out_BHNE = linear_attention(q_BHNE.relu(), k_BHNE.relu(), values_BHNE, eps=1e-5)
            elif self.kernel == "softmax":
                context_BHEE = k_BHNE.softmax(dim=-2).mT @ values_BHNE
                out_BHNE = q_BHNE.softmax(dim=-1) @ (context_BHEE * q_BHNE.shape[-1] ** -0.5)
            else:
                # A channel is a head, so the length is that over all heads' channels.
                q_BHNE, k_BHNE = (
                    t / torch.linalg.vector_norm(t, dim=(1, 3), keepdim=True).clamp_min(1e-3) for t in (q_BHNE, k_BHNE)
                )
                out_BHNE = q_BHNE * (k_BHNE * values_BHNE).sum(dim=-2, keepdim=True)
        return out_BHNE.to(v_BHNE.dtype)


def elu_plus_1(x: Tensor) -> Tensor:
    """elu(x) + 1, as eˣ for x ≤ 0: always positive, unlike expm1(x) + 1 in float32, and on a CPU ten times as fast."""
    positive = x.relu()
    return positive + (x - positive).exp()  # clamp(max=0) has gradient 0 at 0
