"""Refuses batches that a layer cannot train on, such as BatchNorm one value per channel, before anything is read or trained."""

from collections.abc import Callable

import torch
from torch import nn

from vix.data.dataset import ImageData
from vix.errors import ConfigError
from vix.system.distributed import world_size
from vix.training.trainer import Trainer

LARGEST_TRIED = 8  # a layer that refuses this many images at a time refuses them for another reason than their number


def check_batches(make_model: Callable[[], nn.Module], data: ImageData, trainer: Trainer) -> None:
    """Run the model's forward in train mode on the meta device, with as few images as will ever be computed at a time.

    Raises ConfigError, which names the nearest batch or micro-batch sizes that work.
    """
    images, batch = data.train_images, trainer.batch_size
    micro_batch = None if trainer.micro_batch == "auto" else trainer.micro_batch
    smallest = smallest_part(images, batch, micro_batch)
    with torch.device("meta"):
        model = make_model().train()
    reason = forward_error(model, data, smallest)
    fewest = next((n for n in range(smallest + 1, LARGEST_TRIED + 1) if not forward_error(model, data, n)), None)
    if not reason or fewest is None:
        return
    key, size, works = "batch_size", batch, [n for n in range(1, images + 1) if smallest_part(images, n, micro_batch) >= fewest]
    if micro_batch and smallest_part(images, batch, None) >= fewest:
        key, size = "micro_batch", micro_batch
        works = [n for n in range(1, batch + 1) if smallest_part(images, batch, n) >= fewest]
    below, above = [n for n in works if n < size][-1:], [n for n in works if n > size][:1]
    nearest = ", ".join(map(str, below + above)) or "none"
    if not works and micro_batch:
        nearest = "none; use trainer.micro_batch=null and a larger trainer.batch_size"
    among = f" of {world_size()} processes" if world_size() > 1 else ""
    count = f"{smallest} image{'s' * (smallest > 1)}"
    raise ConfigError(
        f"trainer.{key}={size}: of {images} training images some step{among} would compute {count} at a time, and this model "
        f"needs {fewest} ({reason}); nearest that work: {nearest}"
    )


def smallest_part(images: int, batch: int, micro_batch: int | None) -> int:
    """The fewest images that are computed at a time in an epoch: of its last batch, a process's share, or a micro-batch."""
    parts = []
    for size in {min(batch, images), images % batch or min(batch, images)}:
        for share in {max(1, size // world_size()), -(-size // world_size())}:
            at_once = min(micro_batch or share, share)
            parts += [at_once, share % at_once or at_once]
    return min(parts)


def forward_error(model: nn.Module, data: ImageData, images: int) -> str:
    """Why the model cannot train on this many images at a time; empty where it can."""
    shape = images, data.channels, data.image_size, data.image_size
    try:
        with torch.no_grad():
            model(torch.empty(shape, device="meta"))
    except Exception as error:  # a model of the user's own may raise anything, also because it does not run on this device
        return " ".join(str(error).split()) or type(error).__name__
    return ""
