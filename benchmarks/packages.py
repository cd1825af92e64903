"""Reference models: vit-pytorch's ViT with the attentions of other packages, in the paper's sizes."""

from collections.abc import Callable

from torch import nn

from vix.errors import UserError

try:
    from linformer import LinformerSelfAttention
    from nystrom_attention import NystromAttention
    from performer_pytorch import SelfAttention
    from vit_pytorch.vit import ViT
except ImportError as error:
    raise UserError(f"a package to compare with is missing ({error}): pip install -r requirements-benchmarks.txt") from error

DIM, DEPTH, HEADS, MLP = 128, 4, 4, 256
PROJECTED = LANDMARKS = 64


def performer(tokens: int) -> nn.Module:
    """performer-pytorch's attention: (B, N, D) → (B, N, D)."""
    return SelfAttention(DIM, heads=HEADS, dim_head=DIM // HEADS, qkv_bias=True)


def linformer(tokens: int) -> nn.Module:
    """linformer's attention for N = ``tokens``: (B, N, D) → (B, N, D)."""
    return LinformerSelfAttention(DIM, tokens, k=PROJECTED, heads=HEADS, one_kv_head=True, share_kv=True)


def nystrom(tokens: int) -> nn.Module:
    """nystrom-attention's attention: (B, N, D) → (B, N, D)."""
    return NystromAttention(DIM, dim_head=DIM // HEADS, heads=HEADS, num_landmarks=LANDMARKS)


# The paper's model → the attention that replaces vit-pytorch's softmax attention, which stores the N×N matrix.
ATTENTIONS: dict[str, Callable[[int], nn.Module] | None] = {
    "vit": None,
    "vip": performer,
    "vil": linformer,
    "vin": nystrom,
}


def package_model(name: str, image_size: int, patch_size: int) -> nn.Module:
    """A model with the same parameters as this program's: (B, 3, Y, X) images → (B, 10) logits.

    name: vit, vip, vil or vin.   image_size, patch_size: in pixels.

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
    )
    to_pixels, _, project, _ = model.to_patch_embedding
    model.to_patch_embedding = nn.Sequential(to_pixels, project)
    attention = ATTENTIONS[name]
    if attention is not None:
        tokens = (image_size // patch_size) ** 2 + 1
        for layer in model.transformer.layers:
            layer[0] = nn.Sequential(nn.LayerNorm(DIM), attention(tokens))
    return model
