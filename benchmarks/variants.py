"""What a measuring process runs: it makes one variant, and returns what that costs."""

from typing import Any

import torch

from benchmarks.measure import flops, measure, resident, traffic
from benchmarks.steps import composed, ours, package, papers_way, random_batch
from vix.build import build_model
from vix.runtime import resolve_precision

KINDS = ("ours", "package", "paper")


def step_cost(kind: str, name: str, device: torch.device, batch_size: int, quick: bool) -> dict[str, Any]:
    """A training step of one of the paper's models: ours, the packages' or the paper's own way."""
    patch_size = 4 if quick else 1
    baseline = resident_without_model(device)
    if kind == "ours":
        training = ours((f"experiment={name}", f"embedding.patch_size={patch_size}"), device, batch_size)
    else:
        from benchmarks.packages import package_model

        make = package if kind == "package" else papers_way
        training = make(package_model(name, 32, patch_size), 32, device, batch_size)
    cost = measure(training.step, device, 0.05 if quick else 4.0, baseline, fewest=2 if quick else 5)
    # Last, because what counts them also takes memory.
    operations = {"flops": flops(training.model, (batch_size, 3, 32, 32)), "traffic_bytes": traffic(training.step)}
    return {**cost._asdict(), **operations}


def mixer_cost(
    mixer: tuple[str, ...], side: int, training: bool, device: torch.device, batch_size: int, quick: bool
) -> dict[str, Any]:
    """A ViT of side² tokens with this mixer: a training step, or a forward pass without gradients.

    mixer: overrides that choose it.
    """
    overrides = (*mixer, *skeleton(side))
    baseline = resident_without_model(device)
    seconds, fewest = (0.02, 2) if quick else (2.0, 3)
    if training:
        return measure(ours(overrides, device, batch_size).step, device, seconds, baseline, fewest)._asdict()
    cfg = composed(*overrides)
    model = build_model(cfg).to(device).eval()
    dtype = resolve_precision(cfg.trainer.precision, device)
    images, _ = random_batch(device, batch_size, 3, side)

    def forward() -> None:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            model(images)

    return measure(forward, device, seconds, baseline, fewest)._asdict()


def skeleton(side: int) -> tuple[str, ...]:
    """Overrides for a ViT on side × side images, each pixel a token and no class token, so that there are side² tokens."""
    image = ("data=imagefolder", f"data.image_size={side}", "data.classes=10")  # its shape is all that is taken of it
    return (*image, "embedding=linear", "posenc=learned", "model=vit", "model.pool=mean")


def resident_without_model(device: torch.device) -> int | None:
    """Bytes of the process once a step of one linear layer has loaded the libraries that every step uses; None on a GPU."""
    if device.type == "cuda":
        return None
    package(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 10)), 1, device, 2).step()
    return resident()


def bare_step(overrides: tuple[str, ...], device: torch.device, batch_size: int, quick: bool) -> dict[str, Any]:
    """A training step of what ``python train.py OVERRIDES`` trains, on one batch that is there already."""
    seconds, fewest = (0.02, 2) if quick else (4.0, 5)
    return measure(ours(overrides, device, batch_size).step, device, seconds, None, fewest)._asdict()
