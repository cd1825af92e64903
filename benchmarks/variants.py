"""What a measuring process runs: it makes one variant, and returns what that costs."""

from typing import Any

import torch

from benchmarks.measure import measure, resident, traffic
from benchmarks.steps import composed, ours, package, papers_way, random_batch
from vix.build import build_model
from vix.models.counts import training_flops
from vix.system.device import resolve_device, resolve_precision

# ours is compiled, as train.py does in runs of the paper's length; selective and full checkpoint activations; eager
# is not compiled, and the two graphs use CUDA graphs as well.
OURS = {
    "ours": ("trainer.compile=true",),
    "selective": ("trainer.compile=true", "trainer.activation_checkpointing=selective"),
    "full": ("trainer.compile=true", "trainer.activation_checkpointing=full"),
    "eager": ("trainer.compile=false",),
    "graphs": ("trainer.compile=cuda_graphs",),
    "graphs_selective": ("trainer.compile=cuda_graphs", "trainer.activation_checkpointing=selective"),
}
# settings is the package in a process that is set up for a CPU as ours are (vix/system/device.py): what they do for its speed.
THEIRS = ("package", "settings", "paper")
ON_GPUS, ON_CPUS = {"graphs", "graphs_selective"}, {"settings"}
KINDS = (*OURS, *THEIRS)


def step_cost(kind: str, name: str, device: torch.device, batch_size: int, quick: bool) -> dict[str, Any]:
    """A training step of one of the paper's models: ours, the packages' or the paper's own way."""
    patch_size = 4 if quick else 1
    compiled = kind in OURS and kind != "eager" and not quick
    baseline = resident_without_model(device, compiled)
    if kind in OURS:
        how = (*OURS[kind], *(("trainer.compile=false",) if quick else ()))
        training = ours((f"experiment={name}", f"embedding.patch_size={patch_size}", *how), device, batch_size)
    else:
        from benchmarks.packages import package_model

        make = papers_way if kind == "paper" else package
        if kind == "settings":
            resolve_device(str(device))
        training = make(package_model(name, 32, patch_size), 32, device, batch_size)
    cost = measure(training.step, device, 0.05 if quick else 4.0, baseline, fewest=2 if quick else 5)
    # Last, because what counts them also takes memory.
    operations = {"flops": batch_size * training_flops(training.model, (3, 32, 32)), "traffic_bytes": traffic(training.step)}
    return {**cost._asdict(), **operations}


def mixer_cost(
    mixer: tuple[str, ...], side: int, training: bool, device: torch.device, batch_size: int, quick: bool
) -> dict[str, Any]:
    """A ViT of side² tokens with this mixer: a training step, or a forward pass without gradients.

    mixer: overrides that choose it.
    """
    overrides = (*mixer, *skeleton(side), "trainer.compile=false")
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


def resident_without_model(device: torch.device, compiled: bool = False) -> int | None:
    """Bytes of the process once a step of one linear layer has loaded the libraries that every step uses; None on a GPU."""
    if device.type == "cuda":
        return None
    layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 10))
    if compiled:
        layer.compile()
    package(layer, 1, device, 2).step()
    return resident()


def bare_step(overrides: tuple[str, ...], device: torch.device, batch_size: int, quick: bool) -> dict[str, Any]:
    """A training step of what ``python train.py OVERRIDES`` trains, on one batch that is there already."""
    seconds, fewest = (0.02, 2) if quick else (4.0, 5)
    training = ours((*overrides, "trainer.compile=false"), device, batch_size)
    return measure(training.step, device, seconds, None, fewest)._asdict()
