"""Data-parallel training in several processes, started by ``torchrun``: each batch is split among them; only rank 0 writes.

Every function also works in a run with one process. ``trainer.batch_size`` is the global batch size, which is split among the
processes (Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017, describe data-parallel SGD).
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vix.errors import UserError

T = TypeVar("T")

VARIABLES = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # besides WORLD_SIZE; torchrun and others set them


# In the messages of gloo and of NCCL, whose errors need not be a DistError.
CONNECTION_LOST = re.compile(r"gloo/transport|NCCL (Async E|e)rror|NCCL (operation timed out|watchdog)")
WRONG_USE = re.compile(r"invalid (usage|argument)|Duplicate GPU")
gpu_group: dist.ProcessGroup | None = None  # of connect_gpus, for collectives on tensors; None: that of process_group


class PeerLostError(UserError):
    """Another process of this run has ended or cannot be reached."""


def check_environment() -> None:
    """Raises UserError where WORLD_SIZE says that there are several processes, but they have not been started as such."""
    size = os.environ.get("WORLD_SIZE") or "1"
    if size == "1":
        return
    index = os.environ.get("RANK", "")
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        reason = f"without {', '.join(missing)}"
    elif not size.isdecimal() or int(size) < 1:
        reason = "which is no number of processes"
    elif not index.isdecimal() or int(index) >= int(size):
        reason = f"with RANK={index}, which is none of its processes"
    else:
        reason = ""
    if reason:
        raise UserError(
            f"WORLD_SIZE={size} is set in the environment, {reason}: start several processes with torchrun, or for one "
            "process, unset WORLD_SIZE"
        )


def world_size() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Index of this process; rank 0 writes files and logs."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_world_size() -> int:
    """Number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size()) if world_size() > 1 else 1


def local_rank() -> int | None:
    """Index of this process on this machine; None where it is unknown: torchrun sets it, and other launchers may not."""
    return (int(os.environ["LOCAL_RANK"]) if os.environ.get("LOCAL_RANK") else None) if world_size() > 1 else 0


@contextmanager
def process_group() -> Iterator[None]:
    """Context manager of the processes' connection by gloo, for messages of the hosts. Does nothing for one process."""
    if world_size() == 1:
        yield
        return
    global gpu_group
    dist.init_process_group("gloo")
    failed = False
    try:
        yield
    except Exception:
        failed = True
        raise
    finally:
        # After an error, the other processes may not end their connection by NCCL, which would wait for them.
        if not (failed and gpu_group):
            dist.destroy_process_group()
        gpu_group = None


def connect_gpus(device: torch.device) -> None:
    """Connect the processes' GPUs by NCCL, for tensors; without a GPU, gloo serves them. Within ``process_group``.

    device: on which this process computes. NCCL must know it: since PyTorch 2.15 it connects at once, and would otherwise
        choose a GPU by itself.
    """
    global gpu_group
    if world_size() > 1 and device.type == "cuda" and dist.is_nccl_available():
        group = dist.new_group(backend="cpu:gloo,cuda:nccl", device_id=device)
        assert isinstance(group, dist.ProcessGroup)  # every process is in it
        gpu_group = group


def peer_lost(error: Exception) -> PeerLostError | None:
    """The error for a failed communication with another process of this run; None for other errors."""
    lost = isinstance(error, dist.DistError) or CONNECTION_LOST.search(str(error))
    if world_size() == 1 or not lost or WRONG_USE.search(str(error)):
        return None
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    reason = (line.partition("] ")[2] or line).partition(". ")[0]
    return PeerLostError(
        f"another process of this run was lost ({reason}); the same command continues from the last checkpoint"
    )


def wrap_ddp(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel, which averages gradients over the processes; unchanged for one process."""
    return DistributedDataParallel(model, process_group=gpu_group) if world_size() > 1 else model


def shard(batch: Tensor) -> Tensor:
    """This process's part of a batch that every process holds: (B, …) → (about B / world_size, …), possibly empty."""
    return batch[rank() :: world_size()]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, group=gpu_group)
    return tensor


def all_reduce_max(number: int) -> int:
    """The maximum of a number over the processes."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Call ``make`` on rank 0 only, and return its result, which must be picklable, on every rank."""
    if world_size() == 1:
        return make()
    made: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(made)
    result: T = made[0]
    return result


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the model's buffers from rank 0 to all ranks.

    DistributedDataParallel does so only before a forward pass. After it, running statistics differ between the ranks.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0, group=gpu_group)


def seed_rank(seed: int, epoch: int, batch: int) -> None:
    """Seed every rank except 0 for one step, so that dropout and the like differ between ranks and can be repeated.

    Rank 0 keeps its random state, which is saved in checkpoints.
    """
    if rank() > 0:
        step_seed = (seed * 1_000_003 + epoch) * 1_000_003 + batch
        torch.manual_seed((step_seed * world_size() + rank()) % 2**63)
