"""The largest micro-batch whose gradients fit the memory (trainer.micro_batch=auto), and steps that are only a trial."""

import gc
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from vix.system.distributed import all_reduce_max
from vix.system.memory import out_of_memory, release_memory
from vix.system.rng import get_rng_state, set_rng_state
from vix.training.train_step import TrainStep, shard_batch

log = logging.getLogger(__name__)

SPARE_BYTES = 2**25  # for what a run allocates besides its steps: threads that write events, a checkpoint, fragmentation


@contextmanager
def dry_run(step: TrainStep) -> Iterator[None]:
    """Context for a trial: gradients, buffers, gradient scaling and random generators are restored afterwards."""
    state = step.state
    rng, buffers = get_rng_state(), [buffer.clone() for buffer in state.model.buffers()]
    scaler, trial_scaler = state.scaler, state.new_scaler()
    if scaler.is_enabled():
        trial_scaler.load_state_dict(scaler.state_dict())
    state.scaler = trial_scaler  # a scaler unscales gradients once per update only
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
    """The largest of the batch size, its half, its quarter, … at which the gradients of this batch fit the device's memory.

    Tries them, with room for Adam's state and a little more, and changes nothing. Raises the device's out-of-memory error
    where not even single images fit.
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
    """Whether the memory suffices for the gradients of a batch in micro-batches of this size, and what a run needs besides.

    Raises the out-of-memory error where the size is 1. All that a failed trial holds, also by the error's traceback, is
    released with the frame of this function.
    """
    adam_bytes = 2 * sum(p.nbytes for p in step.state.model.parameters())
    try:
        with dry_run(step):
            room = torch.empty(adam_bytes + SPARE_BYTES, dtype=torch.uint8, device=images.device)
            replace(step, micro_batch=size, distributed=False).forward_backward(0, images, labels)
            del room
    except Exception as error:
        if size == 1 or not out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()  # frames and errors that refer to one another
    return True
