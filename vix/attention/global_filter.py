"""Global filter: Rao et al., "Global Filter Networks for Image Classification" (GFNet), 2021."""

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
            spectrum_BYXD = torch.fft.rfft2(wide_BYXD, dim=(1, 2), norm="ortho")
            spectrum_BYXD = spectrum_BYXD * torch.view_as_complex(self.filter_YXD2)
            size = (self.tokens.height, self.tokens.width)
            return torch.fft.irfft2(spectrum_BYXD, s=size, dim=(1, 2), norm="ortho")
