"""Latent attention: Lee et al., "Set Transformer" (ISAB), 2019; the read-process-write pattern of Perceiver."""

import torch
from torch import Tensor, nn

from vix.layers.attend import softmax_attention
from vix.layers.heads import head_width, merge_heads, split_heads
from vix.layers.precision import cast_to_autocast
from vix.layers.tokens import TokenGrid
from vix.types import Positive


class LatentAttention(nn.Module):
    """Learned latents attend to the tokens, then the tokens attend to the result: linear in the number of tokens.

    These are ISAB's two attentions without its residual connection of the latents, feed-forward layers and norms.

    heads, dim_head: number of heads H and width E of one; ``dim_head`` None means dim / heads.
    latents: number M of them.

    Raises ValueError where ``heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        tokens: TokenGrid,
        *,
        heads: Positive = 4,
        dim_head: Positive | None = None,
        latents: Positive = 64,
    ) -> None:
        super().__init__()
        self.read = CrossAttention(dim, heads, dim_head, latents)
        self.write = CrossAttention(dim, heads, dim_head)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = cast_to_autocast(x_BND)
        return self.write(self.read(x_BND), x_BND)


class CrossAttention(nn.Module):
    """Softmax attention of queries (B, N, D) to a context (B, M, D), without biases: → (B, N, D).

    latents: number of learned queries, used where no others are given; None: none.
    """

    no_weight_decay = ("latents_ND",)

    def __init__(self, dim: int, heads: int, dim_head: int | None, latents: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_width(dim, heads, dim_head)
        # A bare parameter, called neither weight nor bias, like a table of positions.
        self.latents_ND = nn.Parameter(torch.randn(latents, dim)) if latents else None
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, context_BMD: Tensor, x_BND: Tensor | None = None) -> Tensor:
        q_BNF = self.to_q(x_BND) if x_BND is not None else self.to_q(self.latents_ND).expand(context_BMD.shape[0], -1, -1)
        q_BHNE = split_heads(q_BNF, self.heads)
        k_BHME, v_BHME = (split_heads(t, self.heads) for t in self.to_kv(context_BMD).chunk(2, dim=-1))
        return self.to_out(merge_heads(softmax_attention(q_BHNE, k_BHME, v_BHME)))
