"""Global filter: Rao et al., "Global Filter Networks for Image Classification" (GFNet), 2021."""

from typing import Any

import torch
from torch import Tensor, nn

from vix.layers.maps import MapMixer
from vix.layers.precision import no_autocast, upcast_fp32
from vix.layers.tokens import TokenGrid


class GlobalFilter(MapMixer):
    """Multiplies the map's 2-D Fourier transform by a learned filter: a convolution with a kernel as large as the map.

    The filter (Y, X // 2 + 1, D) is complex, so the map's size is fixed. The transforms are computed in float32 under any
    autocast: PyTorch does not support them in bfloat16, and in float16 only for powers of two.
    """

    def __init__(self, dim: int, tokens: TokenGrid) -> None:
        super().__init__(tokens)
        # Real and imaginary part, as in the authors' code. Called neither weight nor bias, like other maps of positions.
        self.filter_YXD2 = nn.Parameter(0.02 * torch.randn(tokens.height, tokens.width // 2 + 1, dim, 2))

    def forward_map(self, x_BYXD: Tensor) -> Tensor:
        with no_autocast(x_BYXD):
            (wide_BYXD,) = upcast_fp32(x_BYXD)
            filtered: Tensor = Filter.apply(wide_BYXD, torch.view_as_complex(self.filter_YXD2))
            return filtered


class Filter(torch.autograd.Function):
    """Maps (B, Y, X, D) times a complex filter (Y, X // 2 + 1, D) in the frequency domain.

    Its gradients need one transform each way, PyTorch's three: those of real maps are computed from whole complex spectra.
    Maps and gradients leave it token by token, as the layers around it need them; transforms leave them channel by channel.
    """

    @staticmethod
    def forward(ctx: Any, x_BYXD: Tensor, filter_YXD: Tensor) -> Tensor:
        spectrum_BYXD = transform(x_BYXD)
        ctx.save_for_backward(spectrum_BYXD, filter_YXD)
        ctx.size = x_BYXD.shape[1:3]
        return inverse(spectrum_BYXD * filter_YXD, ctx.size)

    @staticmethod
    def backward(ctx: Any, gradient_BYXD: Tensor) -> tuple[Tensor, Tensor]:
        spectrum_BYXD, filter_YXD = ctx.saved_tensors
        gradient_BYXD = transform(gradient_BYXD)
        filter_gradient_YXD = (gradient_BYXD * spectrum_BYXD.conj()).sum(dim=0)
        # Half of the spectrum is stored: each column, but the first and for an even width the last, is that of two frequencies.
        columns = slice(1, (ctx.size[1] + 1) // 2)
        filter_gradient_YXD[:, columns] *= 2
        return inverse(gradient_BYXD * filter_YXD.conj(), ctx.size), filter_gradient_YXD


def transform(x_BYXD: Tensor) -> Tensor:
    """Orthonormal 2-D Fourier transform of real maps, (B, Y, X, D) → (B, Y, X // 2 + 1, D)."""
    return torch.fft.rfft2(x_BYXD, dim=(1, 2), norm="ortho")


def inverse(spectrum_BYXD: Tensor, size: torch.Size) -> Tensor:
    """Inverse of :func:`transform`, for maps of the given size (Y, X)."""
    x_BYXD = torch.fft.irfft2(spectrum_BYXD, s=size, dim=(1, 2), norm="ortho")
    return x_BYXD if x_BYXD.is_contiguous() else x_BYXD.contiguous()  # see round_to
