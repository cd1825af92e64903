"""The whole model on equal weights against vit_pytorch's ViT, an implementation that shares no line with ours."""

from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig
from torch import nn
from vit_pytorch.vit import ViT as ReferenceViT

from vix import build_model


def with_weights_of(ours: nn.Module, *, image_size: int, channels: int, patch_size: int, heads: int, pool: str) -> nn.Module:
    """vit_pytorch's model with the weights of ours, and without what the published model did not have."""
    depth, dim = len(ours.blocks), ours.head.in_features
    reference = ReferenceViT(
        image_size=image_size,
        channels=channels,
        patch_size=patch_size,
        num_classes=ours.head.out_features,
        dim=dim,
        depth=depth,
        heads=heads,
        dim_head=dim // heads,
        mlp_dim=ours.blocks[0].mlp[0].out_features,
        pool="cls" if pool == "class_token" else "mean",
    )
    # Later versions of the package normalise the patches before and after their projection; the published model did not.
    to_pixels, _, project, _ = reference.to_patch_embedding
    reference.to_patch_embedding = nn.Sequential(to_pixels, nn.Identity(), project, nn.Identity())
    pairs = [
        # The package orders the numbers of a patch (row, column, channel), a convolution's kernel (channel, row, column).
        (project.weight, ours.embedding.project.weight.permute(0, 2, 3, 1).flatten(1)),
        (project.bias, ours.embedding.project.bias),
        (reference.pos_embedding, ours.posenc.table_ND),
        (reference.transformer.norm.weight, ours.norm.weight),
        (reference.transformer.norm.bias, ours.norm.bias),
        (reference.mlp_head.weight, ours.head.weight),
        (reference.mlp_head.bias, ours.head.bias),
    ]
    if pool == "class_token":
        pairs.append((reference.cls_token, ours.class_token[None]))
    for (attention, feed_forward), block in zip(reference.transformer.layers, ours.blocks, strict=True):
        pairs += [
            (attention.norm.weight, block.norm1.weight),
            (attention.norm.bias, block.norm1.bias),
            (attention.to_qkv.weight, block.mixer.to_qkv.weight),
            (attention.to_out[0].weight, block.mixer.to_out.weight),
            (attention.to_out[0].bias, block.mixer.to_out.bias),
            (feed_forward.net[0].weight, block.norm2.weight),
            (feed_forward.net[0].bias, block.norm2.bias),
            (feed_forward.net[1].weight, block.mlp[0].weight),
            (feed_forward.net[1].bias, block.mlp[0].bias),
            (feed_forward.net[4].weight, block.mlp[3].weight),
            (feed_forward.net[4].bias, block.mlp[3].bias),
        ]
    with torch.no_grad():
        for theirs, value in pairs:
            assert theirs.shape == value.shape
            theirs.copy_(value)
    # Nothing is left at a start of its own on either side.
    assert sum(p.numel() for p in reference.parameters()) == sum(p.numel() for p in ours.parameters())
    return reference


@pytest.mark.parametrize("implementation", ["fused", "explicit"])
@pytest.mark.parametrize(
    ("data", "image_size", "channels", "patch_size", "dim", "depth", "heads", "pool"),
    [
        pytest.param("cifar10", 32, 3, 1, 128, 4, 4, "class_token", id="paper"),
        pytest.param("cifar10", 32, 3, 4, 64, 3, 2, "class_token", id="patch4"),
        pytest.param("cifar10", 32, 3, 8, 48, 2, 3, "mean", id="patch8-mean"),
        pytest.param("digits", 8, 1, 1, 32, 2, 4, "class_token", id="grey-patch1"),
    ],
)
def test_logits_are_vit_pytorchs(
    compose_config: Callable[..., DictConfig],
    implementation: str,
    data: str,
    image_size: int,
    channels: int,
    patch_size: int,
    dim: int,
    depth: int,
    heads: int,
    pool: str,
) -> None:
    """The logits of an image and their gradient in it equal vit_pytorch's to 1e-5."""
    torch.manual_seed(0)
    ours = build_model(
        compose_config(
            "attention=softmax",
            f"attention.implementation={implementation}",
            f"attention.heads={heads}",
            "embedding=linear",
            f"embedding.patch_size={patch_size}",
            "posenc=learned",
            f"data={data}",
            f"model.dim={dim}",
            f"model.depth={depth}",
            f"model.pool={pool}",
        )
    )
    with torch.no_grad():  # weights 1 and biases 0 would not distinguish the norms
        for name, parameter in ours.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    reference = with_weights_of(ours, image_size=image_size, channels=channels, patch_size=patch_size, heads=heads, pool=pool)
    image = torch.rand(1, channels, image_size, image_size) * 2 - 1
    (logits, gradient), (expected, expected_gradient) = (
        logits_and_gradient(model.eval(), image) for model in (ours, reference)
    )
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def logits_and_gradient(model: nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of one of them in the image."""
    image = image.clone().requires_grad_()
    logits = model(image)
    (gradient,) = torch.autograd.grad(logits[0, 3], image)
    return logits, gradient
