"""Check before training that no batch is too small for a layer, such as BatchNorm with one value per channel."""

from collections.abc import Callable

import torch
from torch import nn

from vix.data.dataset import ImageData
from vix.errors import ConfigError
from vix.system.distributed import world_size
from vix.training.trainer import Trainer

MAX_TRIED = 8  # images; a model that fails with this many fails for another reason


def check_batches(make_model: Callable[[], nn.Module], data: ImageData, trainer: Trainer) -> None:
    """Check that the model trains on the smallest micro-batch of the run, by a forward pass on the meta device.

    make_model: builds the model.
    data: the image set; it is not read.
    trainer: the trainer with the batch sizes.

    Raises ConfigError with the nearest batch or micro-batch sizes that work.
    """
    images, batch = data.train_images, trainer.batch_size
    micro_batch = None if trainer.micro_batch == "auto" else trainer.micro_batch
    smallest = smallest_part(images, batch, micro_batch)
    with torch.device("meta"):
        model = make_model().train()
    reason = forward_error(model, data, smallest)
    fewest = next((n for n in range(smallest + 1, MAX_TRIED + 1) if not forward_error(model, data, n)), None)
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
        f"trainer.{key}={size}: of {images} training images some step{among} would compute {count} at a time, but this model "
        f"needs at least {fewest} ({reason}); nearest that work: {nearest}"
    )


def smallest_part(images: int, batch: int, micro_batch: int | None) -> int:
    """The smallest number of images in any forward pass of an epoch.

    images: number of training images.
    batch: batch size.
    micro_batch: images per micro-batch; None: not split.
    """
    parts = []
    for size in {min(batch, images), images % batch or min(batch, images)}:
        for share in {max(1, size // world_size()), -(-size // world_size())}:
            at_once = min(micro_batch or share, share)
            parts += [at_once, share % at_once or at_once]
    return min(parts)


def forward_error(model: nn.Module, data: ImageData, images: int) -> str:
    """Error message of a forward pass with this many images; empty where it succeeds."""
    shape = images, data.channels, data.image_size, data.image_size
    try:
        with torch.no_grad():
            model(torch.empty(shape, device="meta"))
    except Exception as error:  # a user-defined model may raise anything, also because it does not support the meta device
        return " ".join(str(error).split()) or type(error).__name__
    return ""
