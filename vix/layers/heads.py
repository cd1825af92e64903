"""Splitting the width into heads, and the base class of multi-head mixers."""

from collections.abc import Callable

from einops import rearrange
from torch import Tensor, nn

from vix.errors import nearest_divisors


def head_width(dim: int, heads: int, dim_head: int | None) -> int:
    """Width E of one head: ``dim_head``, or dim / heads where that is None.

    dim: width D of the tokens.
    heads: number H of heads.
    dim_head: requested width E of one head, or None.

    Raises ValueError where ``heads`` does not divide ``dim`` and no ``dim_head`` is given.
    """
    if dim_head is not None:
        return dim_head
    if dim % heads:
        raise ValueError(f"heads={heads} does not divide the width {dim}; nearest that do: {nearest_divisors(dim, heads)}")
    return dim // heads


def split_heads(x_BNF: Tensor, heads: int) -> Tensor:
    """Split the width into ``heads`` heads: (B, N, H·E) → (B, H, N, E)."""
    return rearrange(x_BNF, "b n (h e) -> b h n e", h=heads)


def merge_heads(x_BHNE: Tensor) -> Tensor:
    """Concatenate the heads: (B, H, N, E) → (B, N, H·E)."""
    return rearrange(x_BHNE, "b h n e -> b n (h e)")


class MultiHeadMixer(nn.Module):
    """Base class of multi-head mixers with queries, keys and values: (B, N, D) → (B, N, D).

    A subclass provides ``attend``, a method or module that maps queries, keys and values (B, H, N, E) to (B, H, N, E).

    dim: width D of the tokens.
    rotary: function from the head width E to a module that rotates (B, H, N, E) by position; None: no rotation.
    heads: number H of heads.
    dim_head: width E of one head; None: dim / heads.
    qkv_bias, out_bias: whether the projections to queries, keys and values, and back to ``dim``, have a bias.

    Raises ValueError where ``heads`` does not divide ``dim`` and no ``dim_head`` is given.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __init__(
        self,
        dim: int,
        rotary: Callable[[int], nn.Module] | None,
        heads: int,
        dim_head: int | None,
        qkv_bias: bool = False,
        out_bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.dim_head = heads, head_width(dim, heads, dim_head)
        inner = heads * self.dim_head
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        self.to_out = nn.Linear(inner, dim, bias=out_bias)
        self.rotate = rotary(self.dim_head) if rotary else nn.Identity()

    def qkv(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens (B, N, D) to queries, keys and values (B, H, N, E); queries and keys are rotated."""
        return self.rotated(self.to_qkv(x_BND))

    def normalized(self, q_BHNE: Tensor, k_BHNE: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys before their rotation; a subclass may normalize them."""
        return q_BHNE, k_BHNE

    def rotated(self, qkv_BNF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split (B, N, 3·H·E) into queries, keys and values (B, H, N, E); queries and keys are rotated."""
        q_BHNE, k_BHNE, v_BHNE = (split_heads(t, self.heads) for t in qkv_BNF.chunk(3, dim=-1))
        q_BHNE, k_BHNE = self.normalized(q_BHNE, k_BHNE)
        return self.rotate(q_BHNE), self.rotate(k_BHNE), v_BHNE

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.to_out(merge_heads(self.attend(*self.qkv(x_BND))))
