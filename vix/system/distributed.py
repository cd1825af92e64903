"""One run in several processes, which ``torchrun`` starts: each takes its share of every batch, and the first one writes.

Every function works in a run of one process too, where there is nobody to ask. (Goyal et al., "Accurate, large minibatch
SGD", 2017, on splitting a batch; here the batch of the config is the one that is split.)
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def world_size() -> int:
    """How many processes this run has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number among them: 0 is the first, which writes and is heard."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_world_size() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def local_rank() -> int:
    """This process's number among those of this machine."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else 0


@contextmanager
def process_group() -> Iterator[None]:
    """Context in which the processes of this run can speak to each other: about CUDA tensors by NCCL, about others by gloo."""
    if world_size() == 1:
        yield
        return
    # Both are named: without a name, PyTorch registers the accelerator's backend alone, and no collective on the CPU works.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def wrap_ddp(model: nn.Module) -> nn.Module:
    """The model, with gradients that are the mean over the processes and buffers that are the first one's."""
    return DistributedDataParallel(model) if world_size() > 1 else model


def shard(batch: Tensor) -> Tensor:
    """This process's part of a batch, which every process has whole; empty where there are fewer items than processes."""
    return batch[rank() :: world_size()]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(number: int) -> int:
    """The highest of the processes' numbers."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """What ``make`` returns in the first process, the only one that calls it, for all of them."""
    if world_size() == 1:
        return make()
    made: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(made)
    result: T = made[0]
    return result


def seed_rank(seed: int, epoch: int) -> None:
    """Let every process but the first draw (dropout, say) by itself; the first one's random state is the run's own."""
    if rank() > 0:
        torch.manual_seed(((seed * 1_000_003 + epoch) * world_size() + rank()) % 2**63)
