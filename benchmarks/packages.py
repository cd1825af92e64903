"""The packages' attentions in one skeleton: vit-pytorch's ViT with the sizes of the paper's ViT, ViP, ViL and ViN."""

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
    return SelfAttention(DIM, heads=HEADS, dim_head=DIM // HEADS, qkv_bias=True)


def linformer(tokens: int) -> nn.Module:
    return LinformerSelfAttention(DIM, tokens, k=PROJECTED, heads=HEADS, one_kv_head=True, share_kv=True)


def nystrom(tokens: int) -> nn.Module:
    return NystromAttention(DIM, dim_head=DIM // HEADS, heads=HEADS, num_landmarks=LANDMARKS)


# The paper's model → what stands in it instead of vit-pytorch's own softmax attention, which writes out the N×N matrix.
ATTENTIONS: dict[str, Callable[[int], nn.Module] | None] = {
    "vit": None,
    "vip": performer,
    "vil": linformer,
    "vin": nystrom,
}


def package_model(name: str, image_size: int, patch_size: int) -> nn.Module:
    """(B, 3, Y, X) images → (B, 10) logits. ``name``: vit, vip, vil or vin.

    Parameter for parameter this program's model of that name: later versions of vit-pytorch normalise the patches before and
    after their projection, which the published models did not, so that is taken out.
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
