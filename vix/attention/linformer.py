"""Linformer: Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from vix.layers.attend import softmax_attention
from vix.layers.heads import head_width, merge_heads, split_heads
from vix.layers.precision import cast_to_autocast
from vix.layers.tokens import TokenGrid
from vix.types import Positive


class Linformer(nn.Module):
    """Softmax attention to M learned linear combinations of the N keys and values (Wang et al., 2020).

    Each layer has a learned N×M projection along the tokens, so the number of tokens is fixed.

    heads: number H of heads.
    dim_head: width E of one head; None: dim / heads.
    projected_length: number M of projected keys and values.
    kv_heads: number G of heads of keys and values, each shared by heads / kv_heads query heads (tables 1 and 2: 1; table 5: 4).
    share_kv: whether the values are the keys, projected by the same N×M matrix. Otherwise they have their own projections.

    Raises ValueError where ``heads`` does not divide ``dim``, or ``kv_heads`` does not divide ``heads``.
    """

    def __init__(
        self,
        dim: int,
        tokens: TokenGrid,
        rotary: Callable[[int], nn.Module] | None = None,
        *,
        heads: Positive = 4,
        dim_head: Positive | None = None,
        projected_length: Positive = 64,
        kv_heads: Positive = 1,
        share_kv: bool = True,
    ) -> None:
        super().__init__()
        if heads % kv_heads:
            raise ValueError(f"kv_heads={kv_heads} does not divide heads={heads}; 1 and {heads} do")
        self.heads, self.kv_heads = heads, kv_heads
        width = head_width(dim, heads, dim_head)
        self.to_q = nn.Linear(dim, heads * width, bias=False)
        self.to_k = nn.Linear(dim, kv_heads * width, bias=False)
        self.to_v = None if share_kv else nn.Linear(dim, kv_heads * width, bias=False)
        # Not named weight or bias: the paper's parameter count excludes them.
        bound = projected_length**-0.5
        self.length_k = nn.Parameter(torch.empty(tokens.count, projected_length).uniform_(-bound, bound))
        self.length_v = None if share_kv else nn.Parameter(torch.empty_like(self.length_k).uniform_(-bound, bound))
        self.to_out = nn.Linear(heads * width, dim)
        self.rotate = rotary(width) if rotary else nn.Identity()

    def qkv(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens (B, N, D) to queries (B, H, N, E), and keys and values (B, G, N, E).

        Without rotation, shared values are the same tensor object as the keys.
        """
        x_BND = cast_to_autocast(x_BND)
        q_BHNE = self.rotate(split_heads(self.to_q(x_BND), self.heads))
        k_BHNE = split_heads(self.to_k(x_BND), self.kv_heads)
        v_BHNE = k_BHNE if self.to_v is None else split_heads(self.to_v(x_BND), self.kv_heads)
        return q_BHNE, self.rotate(k_BHNE), v_BHNE

    def attend(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
        """Attention to the projected keys and values: queries (B, H, N, E), keys and values (B, G, N, E) → (B, H, N, E)."""
        k_BHME = self.length_k.T @ k_BHNE
        # Values are never rotated. Without rotation, shared values are the projected keys.
        shared = v_BHNE is k_BHNE and self.length_v is None
        v_BHME = k_BHME if shared else (self.length_k if self.length_v is None else self.length_v).T @ v_BHNE
        # Query heads that share a key head are stacked along the token axis, so that keys and values are not copied. With one
        # key head this reshape copies neither the queries nor the result.
        rows_BHQE = rearrange(q_BHNE, "b (h shared) n e -> b h (n shared) e", h=self.kv_heads)
        out_BHQE = softmax_attention(rows_BHQE, k_BHME, v_BHME)
        return rearrange(out_BHQE, "b h (n shared) e -> b (h shared) n e", n=q_BHNE.shape[2])

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.to_out(merge_heads(self.attend(*self.qkv(x_BND))))
