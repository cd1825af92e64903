"""Reference models: vit-pytorch's ViT with the token mixers of other packages, in the paper's sizes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vix.errors import UserError

try:
    from agent_attention_pytorch import AgentSelfAttention
    from fightingcv_attention.attention.ExternalAttention import ExternalAttention
    from fightingcv_attention.attention.gfnet import GlobalFilter
    from isab_pytorch import ISAB
    from linear_attention_transformer.linear_attention_transformer import SelfAttention as EfficientAttention
    from linformer import LinformerSelfAttention
    from nystrom_attention import NystromAttention
    from performer_pytorch import SelfAttention
    from timm.models import efficientvit_mit, focalnet, metaformer, mlp_mixer, pvt_v2, swin_transformer, xcit
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    from vit_pytorch.vit import ViT
except ImportError as error:
    raise UserError(f"a package to compare with is missing ({error}): pip install -r requirements-benchmarks.txt") from error

DIM, DEPTH, HEADS, MLP = 128, 4, 4, 256
PROJECTED = LANDMARKS = LATENTS = MEMORY = 64
AGENTS, WINDOW = 49, 8


class OnGrid(nn.Module):
    """A package's mixer in a model of tokens: (B, N, D) → (B, N, D), N = side².

    call: applies the module to maps (B, Y, X, D), or whatever ``call`` makes of them; its result is such maps or tokens.
    """

    def __init__(self, module: nn.Module, side: int, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.side, self.call = module, side, call

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.call(self.module, x_BND.unflatten(1, (self.side, self.side))).reshape(x_BND.shape)


def channels_first(module: nn.Module, side: int) -> nn.Module:
    """A module of maps (B, D, Y, X) → (B, N, D) tokens."""
    return OnGrid(module, side, lambda m, x: m(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def window(side: int, layer: int) -> nn.Module:
    """The attention of timm's Swin block, shifted in every second layer."""
    shift = WINDOW // 2 if layer % 2 and side > WINDOW else 0
    block: Any = swin_transformer.SwinTransformerBlock(DIM, (side, side), HEADS, window_size=WINDOW, shift_size=shift)
    block.norm1 = block.norm2 = block.mlp = nn.Identity()
    return OnGrid(block, side, lambda m, x: m._attn(x))  # type: ignore[operator]


def spatial_reduction(side: int, layer: int) -> nn.Module:
    """timm's attention of PVT v2 with strided convolution."""
    attention = pvt_v2.Attention(DIM, HEADS, sr_ratio=4, linear_attn=False, qkv_bias=False)
    return OnGrid(attention, side, lambda m, x: m(x.flatten(1, 2), [side, side]))


def mamba2(side: int, layer: int) -> nn.Module:
    """transformers' mixer in one direction, its path in plain PyTorch where no kernels are installed."""
    config = Mamba2Config(
        hidden_size=DIM,
        expand=2,
        num_heads=8,
        head_dim=32,
        state_size=64,
        n_groups=1,
        conv_kernel=4,
        num_hidden_layers=DEPTH,
    )
    return Mamba2Mixer(config, layer)


class First(nn.Module):
    """A module that returns several results, of which the first is the output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.module(x_BND)[0]


def lite_mla() -> nn.Module:
    """timm's linear attention of EfficientViT with the ReLU kernel, without its multi-scale convolutions."""
    return efficientvit_mit.LiteMLA(
        DIM, DIM, heads=HEADS, dim=DIM // HEADS, use_bias=(False, True), norm_layer=(None, None), scales=()
    )


# Our model (benchmarks.variants.MODELS) → (side of the map, layer) → the mixer that replaces vit-pytorch's softmax attention,
# which stores the N×N matrix; the first three have a class token as well.
MIXERS: dict[str, Callable[[int, int], nn.Module]] = {
    "vip": lambda side, _: SelfAttention(DIM, heads=HEADS, dim_head=DIM // HEADS, qkv_bias=True),
    "vil": lambda side, _: LinformerSelfAttention(DIM, side**2 + 1, k=PROJECTED, heads=HEADS, one_kv_head=True, share_kv=True),
    "vin": lambda side, _: NystromAttention(DIM, dim_head=DIM // HEADS, heads=HEADS, num_landmarks=LANDMARKS),
    "agent": lambda side, _: AgentSelfAttention(
        DIM, num_agent_tokens=AGENTS, dim_head=DIM // HEADS, heads=HEADS, talking_heads=False, gate=False
    ),
    "convolution": lambda side, _: channels_first(metaformer.SepConv(DIM), side),
    "cross_covariance": lambda side, _: xcit.XCA(DIM, HEADS),
    "external": lambda side, _: ExternalAttention(DIM, MEMORY),
    "focal": lambda side, _: channels_first(focalnet.FocalModulation(DIM, focal_window=3, focal_level=2), side),
    "gating": lambda side, _: mlp_mixer.SpatialGatingBlock(DIM, side**2, mlp_ratio=2, norm_layer=nn.LayerNorm).mlp_channels,
    "global_filter": lambda side, _: OnGrid(
        GlobalFilter(DIM, side, side // 2 + 1), side, lambda m, x: m(x.flatten(1, 2), (side, side))
    ),
    "latent": lambda side, _: First(ISAB(dim=DIM, heads=HEADS, num_latents=LATENTS)),
    "linear_relu": lambda side, _: channels_first(lite_mla(), side),
    "linear_softmax": lambda side, _: EfficientAttention(DIM, HEADS),
    "mamba2": mamba2,
    "pooling": lambda side, _: channels_first(metaformer.Pooling(3), side),
    "spatial_reduction": spatial_reduction,
    "window": window,
}
PAPERS = ("vit", "vip", "vil", "vin")


def package_model(name: str, image_size: int, patch_size: int) -> nn.Module:
    """A model with the same parameters as this program's: (B, 3, Y, X) images → (B, 10) logits.

    name: vit, or a key of MIXERS; the paper's models classify from a class token, the others from the mean of the tokens.
    image_size, patch_size: in pixels.

    Recent versions of vit-pytorch normalize the patches before and after their projection. The published models did not, so
    these layers are removed.
    """
    model = ViT(
        image_size=image_size,
        patch_size=patch_size,
        num_classes=10,
        dim=DIM,
        depth=DEPTH,
        heads=HEADS,
        dim_head=DIM // HEADS,
        mlp_dim=MLP,
        pool="cls" if name in PAPERS else "mean",
    )
    to_pixels, _, project, _ = model.to_patch_embedding
    model.to_patch_embedding = nn.Sequential(to_pixels, project)
    if name in MIXERS:
        for i, layer in enumerate(model.transformer.layers):
            layer[0] = nn.Sequential(nn.LayerNorm(DIM), MIXERS[name](image_size // patch_size, i))
    return model
