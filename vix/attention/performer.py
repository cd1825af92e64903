"""Performer: Choromanski et al., "Rethinking Attention with Performers", 2021 (FAVOR+ and the generalized kernel)."""

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
    """Linear attention φ(q)(φ(k)ᵀv) / φ(q)Σφ(k) with random features; time and memory grow with N (Choromanski et al., 2021).

    heads: number H of heads.
    dim_head: width E of one head; None: dim / heads.
    features: number M of orthogonal random features; None: ⌊E·ln E⌋ (110 for E = 32).
    kernel: ``softmax`` is FAVOR+'s positive estimate of exp(q·k/√E), used in the published runs; ``relu`` is the generalized
        kernel of the paper's text.
    qkv_bias: whether the projections to queries, keys and values have biases.
    local_heads: number of heads that use softmax attention within windows instead (in the published runs 0).
    window: tokens per window; a token attends to its own window and the two adjacent ones (in the paper's text 256).
    redraw_every: training steps between redraws of the features; 0 keeps the initial ones, as in the published runs.

    The features are a buffer and saved in checkpoints, so that a loaded model computes the same as the saved one.

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
        """Redraw the features where ``step``, the number of steps taken before, is a positive multiple of ``redraw_every``."""
        if self.redraw_every and step and step % self.redraw_every == 0:
            self.features_ME.copy_(orthogonal_features(*self.features_ME.shape), non_blocking=True)

    def attend(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
        """Window attention in the local heads, linear attention in the others: (B, H, N, E) each → (B, H, N, E)."""
        near, far = ([t[:, heads] for t in (q_BHNE, k_BHNE, v_BHNE)] for heads in self.near_and_far)
        parts = []
        if self.local_heads:
            parts.append(window_attention(near[0], near[1], near[2], self.window))
        if self.local_heads < self.heads:
            parts.append(self.kernel_attention(*far))
        return torch.cat([part.to(v_BHNE.dtype) for part in parts], dim=1)

    def kernel_attention(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
        """Linear attention with random features: queries, keys and values (B, H, N, E) → (B, H, N, E), in at least float32."""
        with no_autocast(q_BHNE):
            q_BHNE, k_BHNE, v_BHNE = upcast_fp32(q_BHNE, k_BHNE, v_BHNE)
            features = self.feature_map(q_BHNE, (-1,)), self.feature_map(k_BHNE, (-2, -1))
            return linear_attention(*features, v_BHNE, floor=1e-3 if self.kernel == "relu" else 1e-4)

    def feature_map(self, t_BHNE: Tensor, maximum_over: tuple[int, ...]) -> Tensor:
        """Feature map φ: (B, H, N, E) → (B, H, N, M).

        The constant that is added to all features is left to :func:`vix.layers.attend.linear_attention`; the factor M^(−1/2)
        is omitted because it cancels.

        t_BHNE: queries or keys (B, H, N, E).
        maximum_over: axes whose common maximum is subtracted from the exponents. Apart from the added constant it cancels, if
            for keys it is one number per head. It is taken per image; common implementations take it over the batch, so that
            an image's logits depend on the other images.
        """
        scale = t_BHNE.shape[-1] ** -0.25
        dots_BHNM = F.linear(t_BHNE, scale * self.features_ME.to(t_BHNE.dtype))
        # In place, because these are the model's largest tensors.
        if self.kernel == "relu":
            return dots_BHNM.relu_()
        square_BHN1 = t_BHNE.square().sum(dim=-1, keepdim=True) * (scale**2 / 2)
        # Added with a negative sign, because the gradient of a subtraction takes another pass over all features.
        offset_BHN1 = -square_BHN1 - dots_BHNM.detach().amax(dim=maximum_over, keepdim=True)
        return dots_BHNM.add_(offset_BHN1).exp_()


def orthogonal_features(count: int, width: int) -> Tensor:
    """Orthogonal random features (M, E): rows are orthogonal within blocks of E rows and have the norms of Gaussian vectors.

    count: number M of features.
    width: head width E.
    """
    factors = [torch.linalg.qr(torch.randn(width, width)) for _ in range(math.ceil(count / width))]
    # LAPACK's signs of Q's columns depend on the matrix, so that Q is not uniformly distributed and the kernel estimate is
    # biased. Multiplication by the signs of R's diagonal corrects this (Mezzadri, 2007).
    blocks = [(q * r.diagonal().sign()).T for q, r in factors]
    lengths_M1 = torch.randn(count, width).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:count] * lengths_M1


def window_attention(q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, window: int) -> Tensor:
    """Softmax attention of each window of tokens to itself and the two adjacent windows: (B, H, N, E) → (B, H, N, E).

    A sequence whose length is not a multiple of ``window`` is padded; the padding is masked.

    q_BHNE, k_BHNE, v_BHNE: queries, keys and values (B, H, N, E).
    window: tokens T per window.
    """
    heads, count = q_BHNE.shape[1:3]
    window = min(window, count)
    windows = math.ceil(count / window)
    padding = windows * window - count
    q_BHNE = F.pad(q_BHNE, (0, 0, 0, padding))
    q_B_W_TE = rearrange(q_BHNE, "b h (w t) e -> (b h) w t e", t=window)
    k_B_W_TE, v_B_W_TE = (
        F.pad(t, (0, 0, window, window + padding)).unfold(2, 3 * window, window).flatten(0, 1).mT for t in (k_BHNE, v_BHNE)
    )
    position_WT = torch.arange(windows, device=q_BHNE.device)[:, None] * window - window
    position_WT = position_WT + torch.arange(3 * window, device=q_BHNE.device)
    is_token_1W1T = ((position_WT >= 0) & (position_WT < count))[None, :, None]  # fused kernels take masks of four axes
    out_B_W_TE = F.scaled_dot_product_attention(q_B_W_TE, k_B_W_TE, v_B_W_TE, attn_mask=is_token_1W1T)
    return rearrange(out_B_W_TE, "(b h) w t e -> b h (w t) e", h=heads)[:, :, :count]
