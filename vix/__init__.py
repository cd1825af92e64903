"""Vision X-formers: how much accuracy do I get for how much memory and time?

The two entry points are :func:`build_model` (a composed config in, an ``nn.Module`` out) and :func:`load_model`
(a run's directory in, the trained model out).

Tensor names end in their shape, one letter per axis: ``q_BHNE`` has the shape (batch, heads, tokens, head width).

===  ==========================================  ===  =============================================
B    images in the batch                         M    landmarks, random features, projected length
N    tokens of an image                          C    channels of an image
D    width of the model (``model.dim``)          Y X  rows and columns of an image or a feature map
H    heads                                       K    classes
E    width of one head (``attention.dim_head``)  T    tokens of a window
F    width of all heads together                 P    prefix tokens (the class token)
G    key and value heads
===  ==========================================  ===  =============================================
"""

from typing import TYPE_CHECKING, Any

from vix.system.threads import set_wait_policy

if TYPE_CHECKING:
    from vix.build import build_model, load_model

__all__ = ["build_model", "load_model"]

set_wait_policy()  # here, because every command imports this package before PyTorch


def __getattr__(name: str) -> Any:
    # Imported on first use: `python -m vix report` reads JSON and should not wait for torch.
    if name in __all__:
        from vix import build

        return getattr(build, name)
    raise AttributeError(f"module 'vix' has no attribute {name!r}")
