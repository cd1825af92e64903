"""Functions that run in a measuring process: each builds one variant and returns its cost."""

from typing import Any

import torch

from benchmarks.measure import traffic
from benchmarks.steps import composed, ours, package, papers_way, random_batch
from vix.analysis.measure import measure, resident
from vix.build import build_model
from vix.models.counts import training_flops
from vix.system.device import resolve_device, resolve_precision

# Name → overrides of the models that other packages have as well. The paper's models have a class token; the others are the
# same ViT with the mean of the tokens and another mixer, with the options that the package has.
MEAN_POOL = ("experiment=vit", "model.pool=mean")
MODELS: dict[str, tuple[str, ...]] = {
    "vit": ("experiment=vit",),
    "vip": ("experiment=vip",),
    "vil": ("experiment=vil",),
    "vin": ("experiment=vin",),
    "agent": (*MEAN_POOL, "attention=agent"),
    "convolution": (*MEAN_POOL, "attention=convolution"),
    "cross_covariance": (*MEAN_POOL, "attention=cross_covariance"),
    "external": (*MEAN_POOL, "attention=external"),
    "focal": (*MEAN_POOL, "attention=focal"),
    "gating": (*MEAN_POOL, "attention=gating"),
    "global_filter": (*MEAN_POOL, "attention=global_filter"),
    "latent": (*MEAN_POOL, "attention=latent", "attention.dim_head=64"),
    "linear_relu": (*MEAN_POOL, "attention=linear", "attention.kernel=relu"),
    "linear_softmax": (*MEAN_POOL, "attention=linear", "attention.kernel=softmax"),
    "mamba2": (*MEAN_POOL, "attention=mamba2", "attention.bidirectional=false"),
    "pooling": (*MEAN_POOL, "attention=pooling"),
    "spatial_reduction": (*MEAN_POOL, "attention=spatial_reduction"),
    "window": (*MEAN_POOL, "attention=window"),
}
# Our variants. ours: compiled, as in runs of the paper's length; selective, full: with activation checkpointing; eager: not
# compiled; graphs, graphs_selective: compiled, with CUDA graphs.
OURS = {
    "ours": ("trainer.compile=true",),
    "selective": ("trainer.compile=true", "trainer.activation_checkpointing=selective"),
    "full": ("trainer.compile=true", "trainer.activation_checkpointing=full"),
    "eager": ("trainer.compile=false",),
    "graphs": ("trainer.compile=cuda_graphs",),
    "graphs_selective": ("trainer.compile=cuda_graphs", "trainer.activation_checkpointing=selective"),
}
# package: other packages' attentions; settings: the same with our CPU settings (vix/system/device.py), to show their effect;
# paper: the paper's training procedure.
THEIRS = ("package", "settings", "paper")
ON_GPUS, ON_CPUS = {"graphs", "graphs_selective"}, {"settings"}
KINDS = (*OURS, *THEIRS)


def step_cost(kind: str, name: str, device: torch.device, batch_size: int, quick: bool) -> dict[str, Any]:
    """Cost of a training step of one of MODELS, with its FLOPs and memory traffic.

    kind: one of KINDS.   name: a key of MODELS.   quick: use large patches and few repeats.
    """
    patch_size = 4 if quick else 1
    compiled = kind in OURS and kind != "eager" and not quick
    baseline = resident_without_model(device, compiled)
    if kind in OURS:
        how = (*OURS[kind], *(("trainer.compile=false",) if quick else ()))
        training = ours((*MODELS[name], f"embedding.patch_size={patch_size}", *how), device, batch_size)
    else:
        from benchmarks.packages import package_model

        make = papers_way if kind == "paper" else package
        if kind == "settings":
            resolve_device(str(device))
        training = make(package_model(name, 32, patch_size), 32, device, batch_size)
    cost = measure(training.step, device, 0.05 if quick else 4.0, baseline, fewest=2 if quick else 5)
    # Last, because counting allocates memory, too.
    operations = {"flops": batch_size * training_flops(training.model, (3, 32, 32)), "traffic_bytes": traffic(training.step)}
    return {**cost._asdict(), **operations}


def mixer_cost(
    mixer: tuple[str, ...], side: int, training: bool, device: torch.device, batch_size: int, quick: bool
) -> dict[str, Any]:
    """Cost of a ViT with side² tokens.

    mixer: overrides that select the mixer.   training: a training step; else a forward pass without gradients.
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
    """Overrides for a ViT with side² tokens: one per pixel of side × side images, and no class token."""
    image = ("data=imagefolder", f"data.image_size={side}", "data.classes=10")  # only its shape is used
    return (*image, "embedding=linear", "posenc=learned", "model=vit", "model.pool=mean")


def resident_without_model(device: torch.device, compiled: bool = False) -> int | None:
    """Resident bytes of the process after a step of one linear layer, which loads all libraries; None on a GPU.

    compiled: whether to compile that step.
    """
    if device.type == "cuda":
        return None
    layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 10))
    if compiled:
        layer.compile()
    package(layer, 1, device, 2).step()
    return resident()


def bare_step(overrides: tuple[str, ...], device: torch.device, batch_size: int, quick: bool) -> dict[str, Any]:
    """Cost of the training step of ``python train.py OVERRIDES``, not compiled, on one batch that is already on the device."""
    seconds, fewest = (0.02, 2) if quick else (4.0, 5)
    training = ours((*overrides, "trainer.compile=false"), device, batch_size)
    return measure(training.step, device, seconds, None, fewest)._asdict()


def compact_step(mixer: str, device: torch.device, quick: bool) -> dict[str, Any]:
    """Cost of a training step of the compact benchmark with one mixer, compiled where a whole run would be."""
    overrides = ("experiment=compact", f"attention={mixer}")
    small = ("trainer.compile=false", "model.depth=1") if quick else ()
    batch_size = 4 if quick else composed(*overrides).trainer.batch_size
    baseline = resident_without_model(device, compiled=not quick)
    training = ours((*overrides, *small), device, batch_size)
    parameters = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    cost = measure(training.step, device, 0.05 if quick else 4.0, baseline, fewest=2 if quick else 5)
    return {**cost._asdict(), "images_per_second": batch_size / cost.seconds, "parameters": parameters}
