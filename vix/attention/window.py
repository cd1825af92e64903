"""Window attention: Liu et al., "Swin Transformer", 2021."""

import torch
from torch import Tensor, nn

from vix.layers.heads import head_width
from vix.layers.maps import MapMixer, merge_windows, split_windows, window_attention, window_options
from vix.layers.tokens import TokenGrid
from vix.types import Positive


class WindowAttention(MapMixer):
    """Softmax attention within windows of the map; in every second layer the windows are shifted by half their side.

    Attention logits get a learned bias per head and offset (Δrow, Δcolumn). Tokens that the shift brings together from
    opposite edges of the map do not attend to one another.

    heads, dim_head: number of heads H and width E of one; ``dim_head`` None means dim / heads.
    window: side of a window in tokens; it divides rows and columns. A window as large as the map is not shifted.
    layer: index of the block, from 0; the model supplies it.

    Raises ValueError where ``heads`` does not divide ``dim``, or ``window`` does not divide the map.
    """

    no_weight_decay = ("table_HYX",)

    def __init__(
        self,
        dim: int,
        tokens: TokenGrid,
        layer: int = 0,
        *,
        heads: Positive = 4,
        dim_head: Positive | None = None,
        window: Positive = 8,
    ) -> None:
        super().__init__(tokens)
        window_options("window", window, tokens)
        self.heads, self.window = heads, window
        inner = heads * head_width(dim, heads, dim_head)
        self.to_qkv = nn.Linear(dim, 3 * inner)
        self.to_out = nn.Linear(inner, dim)
        self.table_HYX = nn.Parameter(torch.zeros(heads, 2 * window - 1, 2 * window - 1))
        nn.init.trunc_normal_(self.table_HYX, std=0.02)
        self.shift = window // 2 if layer % 2 and window < min(tokens.height, tokens.width) else 0
        offset_TT = torch.arange(window)[:, None] - torch.arange(window) + window - 1
        self.offset_TT: Tensor
        self.register_buffer("offset_TT", offset_TT, persistent=False)
        self.mask_WTT: Tensor | None
        self.register_buffer("mask_WTT", self.shifted_mask() if self.shift else None, persistent=False)

    def shifted_mask(self) -> Tensor:
        """(windows, T, T): 0 where two tokens of a window were neighbors before the shift, else −inf."""
        region_Y, region_X = (
            (torch.arange(size) >= size - self.window).long() + (torch.arange(size) >= size - self.shift).long()
            for size in (self.tokens.height, self.tokens.width)
        )
        region_1YX1 = (3 * region_Y[:, None] + region_X)[None, :, :, None]
        region_WT = split_windows(region_1YX1, self.window)[0, :, :, 0]
        return torch.zeros(()).masked_fill(region_WT[:, :, None] != region_WT[:, None, :], float("-inf"))

    def bias(self) -> Tensor:
        """The learned bias of a window's pairs of tokens: (H, T, T)."""
        bias_HYYX = self.table_HYX[:, self.offset_TT]
        return bias_HYYX[..., self.offset_TT].transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def forward_map(self, x_BYXD: Tensor) -> Tensor:
        if self.shift:
            x_BYXD = x_BYXD.roll((-self.shift, -self.shift), dims=(1, 2))
        x_BWTD = split_windows(x_BYXD, self.window)
        q_BWHTE, k_BWHTE, v_BWHTE = (
            t.unflatten(-1, (self.heads, -1)).transpose(2, 3) for t in self.to_qkv(x_BWTD).chunk(3, dim=-1)
        )
        bias_1WHTT = self.bias()[None, None]
        if self.mask_WTT is not None:
            bias_1WHTT = bias_1WHTT + self.mask_WTT[None, :, None]
        out_BWHTE = window_attention(q_BWHTE, k_BWHTE, v_BWHTE, bias_1WHTT)
        out_BWTD = self.to_out(out_BWHTE.transpose(2, 3).flatten(3))
        out_BYXD = merge_windows(out_BWTD, self.tokens.height, self.tokens.width)
        return out_BYXD.roll((self.shift, self.shift), dims=(1, 2)) if self.shift else out_BYXD
