"""Neighborhood attention: Hassani et al., "Neighborhood Attention Transformer" (NAT), 2023."""

import torch
from torch import Tensor, nn

from vix.layers.heads import head_width
from vix.layers.maps import MapMixer, window_attention
from vix.layers.tokens import TokenGrid
from vix.types import Positive

MAX_TILE = 8


class NeighborhoodAttention(MapMixer):
    """Softmax attention of each token to the kernel × kernel tokens nearest to it; at the edges the window stays on the map.

    Computed in tiles of up to 8×8 tokens, each with the keys that its tokens need together, so that no N×N matrix exists: the
    rest of a tile's keys is masked. Unlike the authors', without a learned relative position bias.

    heads, dim_head: number of heads H and width E of one; ``dim_head`` None means dim / heads.
    kernel: side of the neighborhood in tokens; odd, and at most the rows and columns of the map.

    Raises ValueError where ``heads`` does not divide ``dim``, or ``kernel`` is even or larger than the map.
    """

    def __init__(
        self,
        dim: int,
        tokens: TokenGrid,
        *,
        heads: Positive = 4,
        dim_head: Positive | None = None,
        kernel: Positive = 7,
    ) -> None:
        super().__init__(tokens)
        side = min(tokens.height, tokens.width)
        if kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} is even; nearest odd: {kernel - 1}, {kernel + 1}")
        if kernel > side:
            largest = side - (side % 2 == 0)
            raise ValueError(f"kernel={kernel} is more than the {tokens.height}×{tokens.width} tokens; at most {largest}")
        self.heads = heads
        inner = heads * head_width(dim, heads, dim_head)
        self.to_qkv = nn.Linear(dim, 3 * inner)
        self.to_out = nn.Linear(inner, dim)
        self.row_tile, row_YK, row_mask_YTK = tiles(tokens.height, kernel)
        self.column_tile, column_XK, column_mask_XTK = tiles(tokens.width, kernel)
        self.row_YK: Tensor
        self.column_XK: Tensor
        self.mask_WTK: Tensor
        self.register_buffer("row_YK", row_YK, persistent=False)
        self.register_buffer("column_XK", column_XK, persistent=False)
        # (tiles, tokens of a tile, keys of a tile)
        mask_YXTTKK = row_mask_YTK[:, None, :, None, :, None] & column_mask_XTK[None, :, None, :, None, :]
        mask_WTK = mask_YXTTKK.flatten(4, 5).flatten(2, 3).flatten(0, 1)
        self.register_buffer("mask_WTK", torch.zeros(()).masked_fill(~mask_WTK, float("-inf")), persistent=False)

    def forward_map(self, x_BYXD: Tensor) -> Tensor:
        q_BYXF, kv_BYXF = self.to_qkv(x_BYXD).tensor_split([self.to_out.in_features], dim=-1)
        rows, columns = q_BYXF.shape[1] // self.row_tile, q_BYXF.shape[2] // self.column_tile
        q_BYTXTF = q_BYXF.unflatten(2, (columns, self.column_tile)).unflatten(1, (rows, self.row_tile))
        q_BWTF = q_BYTXTF.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        kv_BYKXKF = kv_BYXF[:, self.row_YK][:, :, :, self.column_XK]
        kv_BWKF = kv_BYKXKF.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        q_BWHTE, k_BWHKE, v_BWHKE = (
            t.unflatten(-1, (self.heads, -1)).transpose(2, 3) for t in (q_BWTF, *kv_BWKF.chunk(2, dim=-1))
        )
        mask_1W1TK = self.mask_WTK[None, :, None]
        out_BWTF = window_attention(q_BWHTE, k_BWHKE, v_BWHKE, mask_1W1TK).transpose(2, 3).flatten(3)
        out_BYXTTF = out_BWTF.unflatten(2, (self.row_tile, self.column_tile)).unflatten(1, (rows, columns))
        return self.to_out(out_BYXTTF.transpose(2, 3).flatten(3, 4).flatten(1, 2))


def tiles(size: int, kernel: int) -> tuple[int, Tensor, Tensor]:
    """One axis cut into tiles: their length T, the keys (tiles, K) of each, and which of them each token sees (tiles, T, K)."""
    length = max(t for t in range(1, min(MAX_TILE, size) + 1) if size % t == 0)
    keys = min(size, length + kernel - 1)
    first = torch.arange(0, size, length)
    key_WK = (first - kernel // 2).clamp(0, size - keys)[:, None] + torch.arange(keys)
    token_WT = first[:, None] + torch.arange(length)
    start_WT1 = (token_WT - kernel // 2).clamp(0, size - kernel)[:, :, None]
    seen_WTK = (key_WK[:, None, :] >= start_WT1) & (key_WK[:, None, :] < start_WT1 + kernel)
    return length, key_WK, seen_WTK
