"""Nyströmformer: Xiong et al., "Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention", 2021."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix.layers.attend import softmax_attention
from vix.layers.heads import MultiHeadMixer, merge_heads, split_heads
from vix.layers.precision import no_autocast, upcast_fp32
from vix.layers.tokens import TokenGrid
from vix.types import NotNegative, Positive


class Nystrom(MultiHeadMixer):
    """Nyström attention softmax(q·k̃ᵀ) · softmax(q̃·k̃ᵀ)⁺ · softmax(q̃·kᵀ) · v (Xiong et al., 2021).

    The landmarks q̃ and k̃ are means over segments of the tokens. Time and memory grow with N.

    heads: number H of heads.
    dim_head: width E of one head; None: dim / heads.
    landmarks: number M of landmarks.
    pinv_iterations: iterations of the pseudo-inverse (in the paper 6). Each enlarges rounding errors where the matrix is nearly
        singular, as at the beginning of training: with more than about 12 models may not train.
    conv_kernel: kernel size of the depthwise convolution of the values along the tokens, one filter per head, that is added to
        the result; odd, or 0: no convolution.

    Raises ValueError where ``heads`` does not divide ``dim``, there are fewer tokens than landmarks, or ``conv_kernel``
    is even.
    """

    def __init__(
        self,
        dim: int,
        tokens: TokenGrid,
        rotary: Callable[[int], nn.Module] | None = None,
        *,
        heads: Positive = 4,
        dim_head: Positive | None = None,
        landmarks: Positive = 64,
        pinv_iterations: Positive = 6,
        conv_kernel: NotNegative = 33,
    ) -> None:
        super().__init__(dim, rotary, heads, dim_head)
        if landmarks > tokens.count:
            raise ValueError(f"landmarks={landmarks} is more than the {tokens.count} tokens; at most {tokens.count}")
        if conv_kernel and conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel={conv_kernel} is even; nearest odd: {conv_kernel - 1}, {conv_kernel + 1}")
        self.landmarks, self.pinv_iterations = landmarks, pinv_iterations
        self.conv = (
            nn.Conv2d(heads, heads, (conv_kernel, 1), padding=(conv_kernel // 2, 0), groups=heads, bias=False)
            if conv_kernel
            else None
        )

    def forward(self, x_BND: Tensor) -> Tensor:
        q_BHNE, k_BHNE, v_BHNE = self.qkv(x_BND)
        out_BHNE = self.attend(q_BHNE, k_BHNE, v_BHNE).to(v_BHNE.dtype)
        if self.conv is not None:
            out_BHNE = out_BHNE + self.convolved(v_BHNE)
        return self.to_out(merge_heads(out_BHNE))

    def convolved(self, v_BHNE: Tensor) -> Tensor:
        """Convolve the values of each head along the tokens: (B, H, N, E) → (B, H, N, E)."""
        assert self.conv is not None
        if not v_BHNE.is_cpu:
            return self.conv(v_BHNE)
        # The same convolution with all H·E channels as groups in a channels-last layout: 2 to 3 times faster on a CPU.
        width, taps = v_BHNE.shape[-1], self.conv.kernel_size[0]
        weight_F1T1 = self.conv.weight.repeat_interleave(width, dim=0)
        v_BFN1 = merge_heads(v_BHNE).mT.unsqueeze(-1)
        out_BFN1 = F.conv2d(v_BFN1, weight_F1T1, padding=(taps // 2, 0), groups=len(weight_F1T1))
        return split_heads(out_BFN1.squeeze(-1).mT, self.heads)

    def attend(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
        """Nyström attention without the convolution: queries, keys and values (B, H, N, E) → (B, H, N, E).

        It runs in float32 under any autocast dtype, because the pseudo-inverse amplifies rounding errors. Two of the three
        softmaxes are computed as attention: of landmarks to tokens, and of tokens to landmarks.
        """
        with no_autocast(q_BHNE):
            q_BHNE, k_BHNE, v_BHNE = upcast_fp32(q_BHNE, k_BHNE, v_BHNE)
            q_BHME, k_BHME = segment_means(q_BHNE, self.landmarks), segment_means(k_BHNE, self.landmarks)
            kernel_BHMM = (q_BHME @ k_BHME.mT * q_BHNE.shape[-1] ** -0.5).softmax(dim=-1)
            summary_BHME = softmax_attention(q_BHME, k_BHNE, v_BHNE)
            values_BHME = pseudo_inverse(kernel_BHMM, self.pinv_iterations) @ summary_BHME
            return softmax_attention(q_BHNE, k_BHME, values_BHME)


def segment_means(t_BHNE: Tensor, segments: int) -> Tensor:
    """Means over M contiguous segments of the tokens: (B, H, N, E) → (B, H, M, E).

    Where M does not divide N, the first N mod M segments are one token longer. Padding to a multiple, as common
    implementations do, adds zero tokens that take part in the attention. With 1,025 tokens and 64 landmarks, only the segment
    of the class token is longer.

    t_BHNE: queries or keys (B, H, N, E).
    segments: number M of segments.
    """
    size, longer = divmod(t_BHNE.shape[2], segments)
    border = longer * (size + 1)
    first_BHNE, rest_BHNE = t_BHNE.split([border, t_BHNE.shape[2] - border], dim=2)
    rest_BHME = rest_BHNE.unflatten(2, (segments - longer, size)).mean(dim=3)
    if not longer:
        return rest_BHME
    return torch.cat([first_BHNE.unflatten(2, (longer, size + 1)).mean(dim=3), rest_BHME], dim=2)


def pseudo_inverse(a_BHMM: Tensor, iterations: int) -> Tensor:
    """Moore–Penrose pseudo-inverse of row-stochastic matrices by a third-order iteration (Razavi et al., 2014).

    The iteration starts from Aᵀ / (max row sum · max column sum), with maxima per matrix. Common implementations take the
    maxima over the batch, so that the result for an image depends on the other images until the iteration has converged.

    a_BHMM: matrices (B, H, M, M).
    iterations: number of iterations.
    """
    row_sum = a_BHMM.abs().sum(dim=-1).amax(dim=-1)
    column_sum = a_BHMM.abs().sum(dim=-2).amax(dim=-1)
    z_BHMM = a_BHMM.mT / (row_sum * column_sum)[..., None, None]
    # Z ← Z(13I − AZ(15I − AZ(7I − AZ)))/4, with each addition fused into a matrix product.
    eye_1MM = torch.eye(a_BHMM.shape[-1], dtype=a_BHMM.dtype, device=a_BHMM.device).unsqueeze(0)
    seven, fifteen, thirteen_fourths = 7 * eye_1MM, 15 * eye_1MM, 3.25 * eye_1MM
    a_BMM, z_BMM = a_BHMM.flatten(0, 1), z_BHMM.flatten(0, 1)
    for _ in range(iterations):
        az_BMM = a_BMM @ z_BMM
        inner_BMM = torch.baddbmm(fifteen, az_BMM, az_BMM - seven)
        z_BMM = z_BMM @ torch.baddbmm(thirteen_fourths, az_BMM, inner_BMM, alpha=-0.25)
    return z_BMM.view_as(a_BHMM)
