"""Linear Transformer: Katharopoulos et al., "Transformers are RNNs", 2020."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from vix.attention.heads import at_least_float32, head_width, kernel_average, merge_heads, no_autocast, split_heads
from vix.checks import Positive
from vix.tokens import TokenGrid


class LinearAttention(nn.Module):
    """Kernel attention φ(q)(φ(k)ᵀv) / φ(q)Σφ(k) with φ = elu + 1, linear in the number of tokens.

    heads, dim_head: number of heads H and width E of one; ``dim_head`` None means dim / heads.

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
        super().__init__()
        self.heads = heads
        width = head_width(dim, heads, dim_head)
        self.to_qkv = nn.Linear(dim, 3 * heads * width, bias=False)
        self.to_out = nn.Linear(heads * width, dim)
        self.rotate = rotary(width) if rotary else nn.Identity()

    def qkv(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BHNE, k_BHNE, v_BHNE = (split_heads(t, self.heads) for t in self.to_qkv(x_BND).chunk(3, dim=-1))
        return self.rotate(q_BHNE), self.rotate(k_BHNE), v_BHNE

    def attend(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
        with no_autocast(q_BHNE):
            q_BHNE, k_BHNE, values_BHNE = at_least_float32(q_BHNE, k_BHNE, v_BHNE)
            out_BHNE = kernel_average(F.elu(q_BHNE) + 1, F.elu(k_BHNE) + 1, values_BHNE)
        return out_BHNE.to(v_BHNE.dtype)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.to_out(merge_heads(self.attend(*self.qkv(x_BND))))
