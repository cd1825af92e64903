"""Linear Transformer: Katharopoulos et al., "Transformers are RNNs", 2020."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from vix.layers.attend import linear_attention
from vix.layers.heads import MultiHeadMixer
from vix.layers.precision import no_autocast, upcast_fp32
from vix.layers.tokens import TokenGrid
from vix.types import Positive


class LinearAttention(MultiHeadMixer):
    """Linear attention φ(q)(φ(k)ᵀv) / φ(q)Σφ(k) with φ = elu + 1; time and memory grow with N (Katharopoulos et al., 2020).

    heads: number H of heads.
    dim_head: width E of one head; None: dim / heads.

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
    ) -> None:
        super().__init__(dim, rotary, heads, dim_head)

    def attend(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
        """Linear attention: queries, keys and values (B, H, N, E) → (B, H, N, E), in at least float32."""
        with no_autocast(q_BHNE):
            q_BHNE, k_BHNE, values_BHNE = upcast_fp32(q_BHNE, k_BHNE, v_BHNE)
            out_BHNE = linear_attention(F.elu(q_BHNE) + 1, F.elu(k_BHNE) + 1, values_BHNE)
        return out_BHNE.to(v_BHNE.dtype)
