"""Check before training that no batch is too small for a layer, such as BatchNorm with one value per channel."""

from collections.abc import Callable

import torch
from torch import nn

from vix.data.dataset import ImageData
from vix.errors import ConfigError
from vix.system.distributed import world_size
from vix.training.micro_batch import fewest_images, smallest_part
from vix.training.trainer import Trainer


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
    fewest, reason = fewest_images(model, data)
    if smallest >= fewest:
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
