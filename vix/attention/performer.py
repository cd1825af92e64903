"""Performer: Choromanski et al., "Rethinking Attention with Performers", 2021 (FAVOR+ and the generalised kernel)."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vix.layers.attend import linear_attention
from vix.layers.heads import MultiHeadMixer
from vix.layers.precision import no_autocast, upcast_fp32
from vix.layers.tokens import TokenGrid
from vix.types import NotNegative, Positive


class Performer(MultiHeadMixer):
    """Kernel attention φ(q)(φ(k)ᵀv) / φ(q)Σφ(k) with random features, linear in the number of tokens.

    heads, dim_head: number of heads H and width E of one; ``dim_head`` None means dim / heads.
    features: number M of orthogonal random features; None means ⌊E·ln E⌋ (110 for heads of 32).
    kernel: ``softmax`` is FAVOR+'s positive estimate of exp(q·k/√E), which the published runs used; ``relu`` is the
        generalised kernel that the paper's text names.
    qkv_bias: biases of the three input projections.
    local_heads, window: so many of the heads use softmax attention within their window of ``window`` tokens and its two
        neighbours instead (the paper's text: 256; the published runs: no such heads).
    redraw_every: draw new features every so many training steps; 0 keeps the first ones, as the published runs did.

    The features are a buffer, saved with the checkpoint: a reloaded model computes what the saved one did.
    Raises ValueError where ``heads`` does not divide ``dim``, or ``local_heads`` exceeds ``heads``.
    """

    def __init__(
        self,
        dim: int,
        tokens: TokenGrid,
        rotary: Callable[[int], nn.Module] | None = None,
        *,
        heads: Positive = 4,
        dim_head: Positive | None = None,
        features: Positive | None = None,
        kernel: Literal["softmax", "relu"] = "softmax",
        qkv_bias: bool = True,
        local_heads: NotNegative = 0,
        window: Positive = 256,
        redraw_every: NotNegative = 0,
    ) -> None:
        super().__init__(dim, rotary, heads, dim_head, qkv_bias)
        if local_heads > heads:
            raise ValueError(f"local_heads={local_heads} is more than heads={heads}; at most {heads}")
        self.kernel, self.local_heads, self.window = kernel, local_heads, window
        self.redraw_every = redraw_every
        self.near_and_far = slice(0, local_heads), slice(local_heads, heads)
        self.features_ME: Tensor
        count = features or max(1, int(self.dim_head * math.log(self.dim_head)))
        self.register_buffer("features_ME", orthogonal_features(count, self.dim_head))

    def on_train_step(self, step: int) -> None:
        """Redraw the features where ``step`` (counted on the host, from 0) is a multiple of ``redraw_every``."""
        if self.redraw_every and step and step % self.redraw_every == 0:
            self.features_ME.copy_(orthogonal_features(*self.features_ME.shape), non_blocking=True)

    def attend(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
        near, far = ([t[:, heads] for t in (q_BHNE, k_BHNE, v_BHNE)] for heads in self.near_and_far)
        parts = []
        if self.local_heads:
            parts.append(window_attention(near[0], near[1], near[2], self.window))
        if self.local_heads < self.heads:
            parts.append(self.kernel_attention(*far))
        return torch.cat([part.to(v_BHNE.dtype) for part in parts], dim=1)

    def kernel_attention(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
        """(B, H, N, E) each → (B, H, N, E); exponentials, sums and the division in float32 under any autocast."""
        with no_autocast(q_BHNE):
            q_BHNE, k_BHNE, v_BHNE = upcast_fp32(q_BHNE, k_BHNE, v_BHNE)
            features = self.feature_map(q_BHNE, (-1,)), self.feature_map(k_BHNE, (-2, -1))
            return linear_attention(*features, v_BHNE, floor=1e-3 if self.kernel == "relu" else 1e-4)

    def feature_map(self, t_BHNE: Tensor, maximum_over: tuple[int, ...]) -> Tensor:
        """φ: (B, H, N, E) → (B, H, N, M), without what is added to all features, nor the factor M^(−1/2), which cancels.

        ``maximum_over``: the axes whose common maximum is taken off the exponents. It cancels too, but for the 1e-4, so
        for keys it must be one number a head: per image here, where common implementations take it over the whole batch
        and let an image's logits depend on its batch-mates.
        """
        scale = t_BHNE.shape[-1] ** -0.25
        dots_BHNM = F.linear(t_BHNE, scale * self.features_ME.to(t_BHNE.dtype))
        # In place: these are the model's largest tensors, and nothing reads them twice.
        if self.kernel == "relu":
            return dots_BHNM.relu_()
        square_BHN1 = t_BHNE.square().sum(dim=-1, keepdim=True) * (scale**2 / 2)
        # The sign is turned here, because the gradient of a subtraction is negated in its own pass over all features.
        offset_BHN1 = -square_BHN1 - dots_BHNM.detach().amax(dim=maximum_over, keepdim=True)
        return dots_BHNM.add_(offset_BHN1).exp_()


def orthogonal_features(count: int, width: int) -> Tensor:
    """Random features (M, E): rows orthogonal within blocks of E, with the lengths of fresh Gaussian rows."""
    factors = [torch.linalg.qr(torch.randn(width, width)) for _ in range(math.ceil(count / width))]
    # LAPACK ties the signs of Q's columns to the matrix. R's give them back; without them no direction is as likely as its
    # opposite, and the estimate keeps an error however many features there are.
    blocks = [(q * r.diagonal().sign()).T for q, r in factors]
    lengths_M1 = torch.randn(count, width).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:count] * lengths_M1


def window_attention(q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, window: int) -> Tensor:
    """Softmax attention of each window of tokens to itself and to the windows on its two sides.

    The sequence need not divide into windows: the filling behind it is masked, so nothing but tokens is attended to.
    """
    heads, count = q_BHNE.shape[1:3]
    windows = math.ceil(count / window)
    filling = windows * window - count
    q_BHNE = F.pad(q_BHNE, (0, 0, 0, filling))
    q_B_W_TE = rearrange(q_BHNE, "b h (w t) e -> (b h) w t e", t=window)
    k_B_W_TE, v_B_W_TE = (
        F.pad(t, (0, 0, window, window + filling)).unfold(2, 3 * window, window).flatten(0, 1).mT for t in (k_BHNE, v_BHNE)
    )
    position_WT = torch.arange(windows, device=q_BHNE.device)[:, None] * window - window
    position_WT = position_WT + torch.arange(3 * window, device=q_BHNE.device)
    is_token_W1T = ((position_WT >= 0) & (position_WT < count)).unsqueeze(1)
    out_B_W_TE = F.scaled_dot_product_attention(q_B_W_TE, k_B_W_TE, v_B_W_TE, attn_mask=is_token_W1T)
    return rearrange(out_B_W_TE, "(b h) w t e -> b h (w t) e", h=heads)[:, :, :count]
