"""Search for the largest micro-batch that fits the memory (trainer.micro_batch=auto), and dry runs of a training step."""

import copy
import gc
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from vix.data.dataset import ImageData
from vix.errors import ConfigError
from vix.system.distributed import all_reduce_max, world_size
from vix.system.memory import out_of_memory, release_memory
from vix.system.rng import get_rng_state, set_rng_state
from vix.training.train_step import TrainStep, shard_batch

log = logging.getLogger(__name__)

MAX_TRIED = 8  # images; a model that fails with this many fails for another reason
SPARE_BYTES = 2**25  # for allocations outside of the steps: event writer threads, checkpoints, fragmentation


@contextmanager
def dry_run(step: TrainStep) -> Iterator[None]:
    """Context for a dry run: gradients are cleared; buffers, gradient scaling and random generators are restored."""
    state = step.state
    rng, buffers = get_rng_state(), [buffer.clone() for buffer in state.model.buffers()]
    scaler, dry_scaler = state.scaler, state.new_scaler()
    if scaler.is_enabled():
        dry_scaler.load_state_dict(scaler.state_dict())
    state.scaler = dry_scaler  # because a scaler can unscale gradients only once per update
    try:
        yield
    finally:
        state.scaler = scaler
        state.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(state.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        step.found_nonfinite.zero_()
        set_rng_state(rng)


def largest_micro_batch(step: TrainStep, images: Tensor, labels: Tensor) -> int:
    """The largest micro-batch whose gradients fit the device's memory, of the batch size, its half, its quarter, ….

    The sizes are tried in dry runs, with memory reserved for Adam's state and other allocations.

    step: the training step.
    images, labels: a batch.

    Raises the device's out-of-memory error where even single images do not fit.
    """
    images, labels, _ = shard_batch(images, labels)
    size = len(labels)
    try:
        while not fits(step, size, images, labels):
            size = math.ceil(size / 2)
            release_memory(images.device)
    finally:
        release_memory(images.device)
    size = -all_reduce_max(-size)  # the smallest of all processes
    log.info("Micro-batch: %d images of %d fit the memory", size, len(labels))
    return size


def fits(step: TrainStep, size: int, images: Tensor, labels: Tensor) -> bool:
    """Whether micro-batches of this size, and the other allocations of a run, fit the memory.

    The memory of a failed dry run, which the error's traceback refers to, is released when this function returns.

    Raises the out-of-memory error where the size is 1.
    """
    adam_bytes = 2 * sum(p.nbytes for p in step.state.model.parameters())
    try:
        with dry_run(step):
            reserved = torch.empty(adam_bytes + SPARE_BYTES, dtype=torch.uint8, device=images.device)
            replace(step, micro_batch=size, distributed=False).forward_backward(0, images, labels)
            del reserved
    except Exception as error:
        if size == 1 or not out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()  # frames and exceptions form reference cycles
    return True


def with_parts_large_enough(size: int, batch: int, model: nn.Module, data: ImageData) -> int:
    """The largest micro-batch up to ``size`` that leaves no part of a batch with too few images for a layer (BatchNorm).

    size: of the micro-batches that fit the memory.   batch: batch size.   model: it is not changed.   data: the image set.

    Raises ConfigError where there is none.
    """
    shapes_only = copy.deepcopy(model).to("meta").train()
    if forward_error(shapes_only, data, MAX_TRIED):
        return size
    errors = [forward_error(shapes_only, data, images) for images in range(1, MAX_TRIED)]
    fewest = next((images for images, error in enumerate(errors, 1) if not error), MAX_TRIED)
    sizes = [n for n in range(1, size + 1) if smallest_part(data.train_images, batch, n) >= fewest]
    if not sizes:
        raise ConfigError(
            f"trainer.micro_batch=auto: {size} image{'s' * (size > 1)} at a time fit the memory, but this model needs at least "
            f"{fewest} in every step ({errors[0]}); use more memory, or another trainer.batch_size"
        )
    if sizes[-1] < size:
        log.info("Micro-batch: %d images, because %d would leave fewer than %d over", sizes[-1], size, fewest)
    return sizes[-1]


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
