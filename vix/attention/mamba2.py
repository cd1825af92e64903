"""Mamba-2: Dao and Gu, "Transformers are SSMs", 2024; in both directions as in Vision Mamba (Zhu et al., 2024)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix.errors import nearest_divisors
from vix.layers.precision import no_autocast, round_to, upcast_fp32
from vix.layers.tokens import TokenGrid
from vix.types import Positive, PositiveFloat

CHUNK = 64  # tokens whose mixing is one matrix product; between chunks a state is handed on


class Mamba2(nn.Module):
    """A selective state space over the token sequence, read forwards and backwards with weights of their own, added.

    Computed in chunks, by matrix products: no kernel of its own has to be built. Linear in the number of tokens but for the
    states between chunks, whose share of the operations grows from 2 % at 1,024 tokens to 28 % at 16,384 (width 128). Vision
    Mamba's two directions share the projections and the gate; here each has its own.

    heads: number h of heads of the inner width, each with one decay per token.
    state: size S of the state.
    expand: inner width over ``dim``.
    conv_kernel: taps of the causal depthwise convolution along the tokens.
    bidirectional: whether the sequence is read backwards as well; forwards only, a token sees those before it alone.

    Raises ValueError where ``heads`` does not divide the inner width, or where nothing is passed to the class token.
    """

    def __init__(
        self,
        dim: int,
        tokens: TokenGrid,
        *,
        heads: Positive = 8,
        state: Positive = 64,
        expand: PositiveFloat = 2.0,
        conv_kernel: Positive = 4,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        if tokens.prefix and not bidirectional:
            raise ValueError(
                "bidirectional=false: the class token is the first and would never see the image; use true, or model.pool=mean"
            )
        inner = max(1, round(expand * dim))
        if inner % heads:
            near = nearest_divisors(inner, heads)
            raise ValueError(f"heads={heads} does not divide the inner width {inner}; nearest that do: {near}")
        self.forwards = StateSpace(dim, inner, heads, state, conv_kernel)
        self.backwards = StateSpace(dim, inner, heads, state, conv_kernel) if bidirectional else None

    def forward(self, x_BND: Tensor) -> Tensor:
        out_BND = self.forwards(x_BND)
        return out_BND if self.backwards is None else out_BND + self.backwards(x_BND.flip(1)).flip(1)


class StateSpace(nn.Module):
    """One direction: (B, N, D) → (B, N, D); each token sees itself and those before it.

    y_t = Σ_{s≤t} C_t·B_s exp(Σ_{s<r≤t} a_r) dt_s x_s + skip·x_t with a = −exp(log_decay)·dt, gated by SiLU(z) and normalized.
    """

    def __init__(self, dim: int, inner: int, heads: int, state: int, conv_kernel: int) -> None:
        super().__init__()
        self.inner, self.heads, self.state = inner, heads, state
        self.in_proj = nn.Linear(dim, 2 * inner + 2 * state + heads, bias=False)
        self.conv = CausalConv((inner, 2 * state), conv_kernel)
        # Bare parameters, called neither weight nor bias. The time steps start between 0.001 and 0.1.
        step_H = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)))
        self.step_offset_H = nn.Parameter(step_H + torch.log(-torch.expm1(-step_H)))  # the inverse of softplus
        self.log_decay_H = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.skip_H = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        z_BNF, xbc_BNW, step_BNH = self.in_proj(x_BND).split([self.inner, self.inner + 2 * self.state, self.heads], dim=-1)
        # Of the scan's products; float16 could not hold large ones.
        dtype = torch.float32 if z_BNF.dtype is torch.float16 else z_BNF.dtype
        x_BNF, bc_BNU = self.conv(xbc_BNW)
        # Heads apart from here on: the loop of a compiled gradient over both together would divide integers for each element.
        x_BNHE, bc_BNU = F.silu(x_BNF.unflatten(-1, (self.heads, -1))), F.silu(bc_BNU)
        with no_autocast(x_BND):
            z_BNF, x_BNHE, bc_BNU, step_BNH = upcast_fp32(z_BNF, x_BNHE, bc_BNU, step_BNH)
            b_BNS, c_BNS = bc_BNU.chunk(2, dim=-1)
            step_BNH = F.softplus(step_BNH + self.step_offset_H)
            log_decay_BNH = -self.log_decay_H.exp() * step_BNH
            y_BNHE = scan(step_BNH[..., None] * x_BNHE, log_decay_BNH, b_BNS, c_BNS, dtype) + self.skip_H[:, None] * x_BNHE
            y_BNF = self.norm(y_BNHE.flatten(2) * F.silu(z_BNF))
        return self.out_proj(y_BNF.to(x_BND.dtype))


class CausalConv(nn.Conv1d):
    """Depthwise convolution along the tokens: (B, N, W) → parts of (B, N, W); each token sees itself and those before it.

    In code compiled for a CPU it is a sum of shifted products (:class:`ShiftedProducts`), as in
    :class:`vix.layers.maps.DepthwiseConv`: PyTorch's backward pass is slow there.

    widths: number of channels of each part; W is their sum.   kernel: number of taps.
    """

    bias: nn.Parameter

    def __init__(self, widths: tuple[int, ...], kernel: int) -> None:
        width = sum(widths)
        super().__init__(width, width, kernel, padding=kernel - 1, groups=width)
        self.widths = widths

    def forward(self, x_BNW: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        if x_BNW.is_cpu and torch.compiler.is_compiling() and torch.is_grad_enabled():
            parts = (x_BNW.split(self.widths, dim=-1), self.weight.squeeze(1).split(self.widths), self.bias.split(self.widths))
            return tuple(ShiftedProducts.apply(*part) for part in zip(*parts, strict=True))
        return super().forward(x_BNW.mT)[..., : x_BNW.shape[1]].mT.split(self.widths, dim=-1)


class ShiftedProducts(torch.autograd.Function):
    """out[n] = bias + Σ_k taps[k]·x[n − K + 1 + k], in at least float32, rounded to the dtype of ``x``."""

    @staticmethod
    def forward(ctx: Any, x_BNW: Tensor, taps_WK: Tensor, bias_W: Tensor) -> Tensor:
        ctx.save_for_backward(x_BNW, taps_WK)
        taps_KW = taps_first(taps_WK)
        margin, count = len(taps_KW) - 1, x_BNW.shape[1]
        padded_BMW = F.pad(x_BNW, (0, 0, margin, 0))
        out_BNW = sum(padded_BMW[:, k : k + count] * tap_W for k, tap_W in enumerate(taps_KW)) + bias_W
        return round_to(out_BNW, x_BNW.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_BNW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BNW, taps_WK = ctx.saved_tensors
        taps_KW = taps_first(taps_WK)
        margin, count, dtype = len(taps_KW) - 1, x_BNW.shape[1], x_BNW.dtype
        padded_BMW = F.pad(gradient_BNW, (0, 0, 0, margin))
        shifted = [upcast_fp32(padded_BMW[:, shift : shift + count])[0] for shift in reversed(range(margin + 1))]
        of_x_BNW = sum(part_BNW * tap_W for part_BNW, tap_W in zip(shifted, taps_KW, strict=True))
        x_BNW, gradient_BNW = upcast_fp32(x_BNW, gradient_BNW)
        of_taps = [(x_BNW * part_BNW).sum(1).sum(0) for part_BNW in shifted]
        return of_x_BNW.to(dtype), torch.stack(of_taps, dim=1), gradient_BNW.sum(1).sum(0)


def taps_first(taps_WK: Tensor) -> Tensor:
    """(W, K) → (K, W), by a product: a transposed view would be read with gaps, which Inductor does not vectorize."""
    with no_autocast(taps_WK):
        return torch.eye(taps_WK.shape[1], dtype=taps_WK.dtype) @ taps_WK.T


def scan(x_BNHE: Tensor, log_decay_BNH: Tensor, b_BNS: Tensor, c_BNS: Tensor, dtype: torch.dtype) -> Tensor:
    """y_t = Σ_{s≤t} C_t·B_s exp(Σ_{s<r≤t} log_decay_r) x_s, in chunks: → (B, N, H, E).

    dtype: that of the large products, whose operands are rounded to it.
    """
    count, heads = x_BNHE.shape[1:3]
    length = min(CHUNK, count)
    chunks = math.ceil(count / length)
    filling = chunks * length - count
    x_BNHE, log_decay_BNH = F.pad(x_BNHE, (0, 0, 0, 0, 0, filling)), F.pad(log_decay_BNH, (0, 0, 0, filling))
    b_BNS, c_BNS = (F.pad(t, (0, 0, 0, filling)) for t in (b_BNS, c_BNS))
    x_BCHLE = x_BNHE.unflatten(1, (chunks, length)).transpose(2, 3)
    b_BCLS, c_BCLS = (t.unflatten(1, (chunks, length)).to(dtype) for t in (b_BNS, c_BNS))
    sums_BCHL = log_decay_BNH.unflatten(1, (chunks, length)).transpose(2, 3).cumsum(dim=-1)
    # Within a chunk: exp of a difference of sums, of which only those with s ≤ t are wanted.
    before_LL = torch.ones(length, length, dtype=torch.bool, device=x_BNHE.device).tril()
    decay_BCHLL = (sums_BCHL[..., :, None] - sums_BCHL[..., None, :]).masked_fill(~before_LL, float("-inf")).exp()
    weights_BCHLL = decay_BCHLL * (c_BCLS @ b_BCLS.mT)[:, :, None]
    y_BCLHE = (weights_BCHLL.to(dtype) @ x_BCHLE.to(dtype)).to(x_BNHE.dtype).transpose(2, 3)
    if chunks > 1:
        # The state that each chunk adds, decayed to its end; then what all chunks before one have left for it. The heads have
        # the same B and C, so that one product serves all of them (F: heads and their channels).
        to_end_BCHL1 = (sums_BCHL[..., -1:] - sums_BCHL).exp()[..., None]
        decayed_BCLF = (to_end_BCHL1 * x_BCHLE).to(dtype).transpose(2, 3).flatten(3)
        state_BCSHE = (b_BCLS.mT @ decayed_BCLF).unflatten(-1, (heads, -1)).to(x_BNHE.dtype)
        total_BHC = sums_BCHL[..., -1].transpose(1, 2)
        # From the end of chunk j to the beginning of chunk i, of which only those with j < i are wanted.
        until_BHC = total_BHC.cumsum(dim=-1)
        earlier_CC = torch.ones(chunks, chunks, dtype=torch.bool, device=x_BNHE.device).tril(-1)
        between_BHCC = (until_BHC - total_BHC)[..., :, None] - until_BHC[..., None, :]
        between_BHCC = between_BHCC.masked_fill(~earlier_CC, float("-inf")).exp()
        carried_BCSHE = torch.einsum("bhij,bjshe->bishe", between_BHCC, state_BCSHE)
        from_before_BCLF = (c_BCLS @ carried_BCSHE.to(dtype).flatten(3)).to(x_BNHE.dtype)
        y_BCLHE = y_BCLHE + from_before_BCLF.unflatten(-1, (heads, -1)) * sums_BCHL.exp().transpose(2, 3)[..., None]
    return y_BCLHE.flatten(1, 2)[:, :count]
