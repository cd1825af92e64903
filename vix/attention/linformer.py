"""Linformer: Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from vix.layers.attend import softmax_attention
from vix.layers.heads import head_width, merge_heads, split_heads
from vix.layers.tokens import TokenGrid
from vix.types import Positive


class Linformer(nn.Module):
    """Softmax attention to ``projected_length`` learned mixtures of the keys and values instead of to all N of them.

    A learned N×M matrix per layer compresses the sequence, so the model fits one token count only.

    heads, dim_head: number of heads H and width E of one; ``dim_head`` None means dim / heads.
    projected_length: M, the length that keys and values are compressed to.
    kv_heads: heads of the keys and values, each serving heads / kv_heads query heads (tables 1 and 2: 1; table 5: 4).
    share_kv: values *are* the keys, compressed by the same matrix; otherwise they have a projection and a matrix of
        their own.

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
        # Bare parameters, called neither weight nor bias: the paper's count leaves them out.
        bound = projected_length**-0.5
        self.length_k = nn.Parameter(torch.empty(tokens.count, projected_length).uniform_(-bound, bound))
        self.length_v = None if share_kv else nn.Parameter(torch.empty_like(self.length_k).uniform_(-bound, bound))
        self.to_out = nn.Linear(heads * width, dim)
        self.rotate = rotary(width) if rotary else nn.Identity()

    def qkv(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values have ``kv_heads`` heads. Without rotation, shared values are the very tensor of the keys."""
        q_BHNE = self.rotate(split_heads(self.to_q(x_BND), self.heads))
        k_BHNE = split_heads(self.to_k(x_BND), self.kv_heads)
        v_BHNE = k_BHNE if self.to_v is None else split_heads(self.to_v(x_BND), self.kv_heads)
        return q_BHNE, self.rotate(k_BHNE), v_BHNE

    def attend(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
        k_BHME = self.length_k.T @ k_BHNE
        # Values are never rotated, so without rotation (and with shared weights) they are the compressed keys themselves.
        same = v_BHNE is k_BHNE and self.length_v is None
        v_BHME = k_BHME if same else (self.length_k if self.length_v is None else self.length_v).T @ v_BHNE
        # The query heads of a key head stand below one another: it is read, not copied, for them, and with one key head
        # neither the queries nor the result move in memory.
        rows_BHQE = rearrange(q_BHNE, "b (h shared) n e -> b h (n shared) e", h=self.kv_heads)
        out_BHQE = softmax_attention(rows_BHQE, k_BHME, v_BHME)
        return rearrange(out_BHQE, "b h (n shared) e -> b (h shared) n e", n=q_BHNE.shape[2])

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.to_out(merge_heads(self.attend(*self.qkv(x_BND))))
