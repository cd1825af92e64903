"""Search for the largest micro-batch that fits the memory (trainer.micro_batch=auto), and dry runs of a training step."""

import copy
import gc
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from vix.data.dataset import ImageData
from vix.system.distributed import all_reduce_max, world_size
from vix.system.memory import out_of_memory, release_memory
from vix.system.rng import get_rng_state, set_rng_state
from vix.training.train_step import TrainStep

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


def largest_micro_batch(step: TrainStep, images: Tensor, labels: Tensor, sizes: Sequence[int]) -> int:
    """The first of these micro-batch sizes whose gradients fit the device's memory.

    The sizes are tried in dry runs, with memory reserved for Adam's state and other allocations.

    step: the training step.
    images, labels: the images of a batch in this process.
    sizes: from :func:`micro_batch_sizes`.

    Raises the device's out-of-memory error where even the last one does not fit.
    """
    try:
        for size in sizes:
            if fits(step, size, images, labels, last=size == sizes[-1]):
                break
            release_memory(images.device)
    finally:
        release_memory(images.device)
    size = -all_reduce_max(-size)  # the smallest of all processes
    log.info("Micro-batch: %d images of %d fit the memory", size, len(labels))
    return size


def fits(step: TrainStep, size: int, images: Tensor, labels: Tensor, last: bool) -> bool:
    """Whether micro-batches of this size, and the other allocations of a run, fit the memory.

    The memory of a failed dry run, which the error's traceback refers to, is released when this function returns.

    Raises the out-of-memory error of the last size.
    """
    adam_bytes = 2 * sum(p.nbytes for p in step.state.model.parameters())
    try:
        with dry_run(step):
            reserved = torch.empty(adam_bytes + SPARE_BYTES, dtype=torch.uint8, device=images.device)
            replace(step, micro_batch=size, distributed=False).forward_backward(0, images, labels)
            del reserved
    except Exception as error:
        if last or not out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()  # frames and exceptions form reference cycles
    return True


def micro_batch_sizes(share: int, batch: int, model: nn.Module, data: ImageData) -> list[int]:
    """The micro-batch sizes to try, from ``share`` on, each about half of the one before.

    Each is lowered until it leaves no part of a batch with too few images for a layer (BatchNorm).

    share: images of a batch in this process.   batch: batch size.   model: it is not changed.   data: the image set.
    """
    fewest, _ = fewest_images(copy.deepcopy(model).to("meta").train(), data)
    works = [n for n in range(1, share + 1) if smallest_part(data.train_images, batch, n) >= fewest]
    sizes = [share]
    while smaller := [n for n in works if n <= math.ceil(sizes[-1] / 2) and n < sizes[-1]]:
        sizes.append(smaller[-1])
    return sizes


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


def fewest_images(model: nn.Module, data: ImageData) -> tuple[int, str]:
    """The fewest images of a forward pass in training, and the error with fewer; 1 and "" where it fails with any number.

    model: on the meta device, in training mode.
    """
    reason = ""
    for images in range(1, MAX_TRIED + 1):
        error = forward_error(model, data, images)
        if not error:
            return images, reason
        reason = error
    return 1, ""


def forward_error(model: nn.Module, data: ImageData, images: int) -> str:
    """Error message of a forward pass with this many images; empty where it succeeds."""
    shape = images, data.channels, data.image_size, data.image_size
    try:
        with torch.no_grad():
            model(torch.empty(shape, device="meta"))
    except Exception as error:  # a user-defined model may raise anything, also because it does not support the meta device
        return " ".join(str(error).split()) or type(error).__name__
    return ""
