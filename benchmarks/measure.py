"""Time and peak memory of a repeated step, measured with CUDA events on a GPU, and the memory traffic of its operations."""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STATUS = Path("/proc/self/status")
FEWEST, MOST = 5, 200  # limits of the number of repeats


class Cost(NamedTuple):
    """Cost of a step: the median time over its repeats, and the peak memory in bytes.

    seconds: median time of a step.
    repeats: number of measured steps.
    allocated: on a GPU, all memory that PyTorch allocated: weights, optimizer state and activations. On a CPU, the memory of a
        step in addition to weights and optimizer state, excluding the memory of libraries below PyTorch.
    reserved: memory that PyTorch reserved on a GPU; None on a CPU.
    resident: increase of the process's resident memory over ``baseline`` on a CPU; None on a GPU, or where it is unknown.
    """

    seconds: float
    repeats: int
    allocated: int
    reserved: int | None
    resident: int | None


def measure(
    step: Callable[[], object], device: torch.device, seconds: float, baseline: int | None, fewest: int = FEWEST
) -> Cost:
    """Warm up, then repeat a step and measure it.

    seconds: approximate total time of the repeats.
    baseline: resident bytes of the process before the model was created, from :func:`resident`.
    fewest: minimum number of repeats.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and events belong to the current device
    step()  # allocates the optimizer state, and selects kernels
    synchronize(device)
    clock = time.perf_counter()
    step()
    synchronize(device)
    once = time.perf_counter() - clock
    if once < seconds:  # warms up caches and clocks; not needed for longer steps
        for _ in range(min(10, int(seconds / 4 / once))):
            step()
    repeats = max(fewest, min(MOST, int(seconds / once)))
    if device.type != "cuda":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak, to exclude memory used by compilation
        marks = [time.perf_counter()]
        for _ in range(repeats):
            step()
            marks.append(time.perf_counter())
        durations = [later - earlier for earlier, later in pairwise(marks)]
        peak = resident("VmHWM")
        above = None if peak is None or baseline is None else peak - baseline
        return Cost(statistics.median(durations), repeats, most_allocated(step), None, above)
    synchronize(device)
    torch.cuda.empty_cache()  # excludes memory that only the warm-up used
    torch.cuda.reset_peak_memory_stats(device)
    step()
    # Events between the steps, without synchronization, so that the host runs ahead of the GPU as in training.
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    synchronize(device)
    durations = [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return Cost(statistics.median(durations), repeats, allocated, reserved, None)


def most_allocated(step: Callable[[], object]) -> int:
    """Peak bytes on the CPU that a step allocates, measured with PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; does nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident(which: str = "VmRSS") -> int | None:
    """Resident memory of this process in bytes; None where /proc is missing.

    which: VmRSS for the current value, VmHWM for the peak so far.
    """
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(which))
    except (OSError, StopIteration):
        return None
    return 1024 * int(line.split()[1])


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write: each input and output tensor once per operation; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns, arguments = func._schema.returns, func._schema.arguments
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and "empty" not in func.__name__:
            self.bytes += size(args) + size(kwargs) + size(result)
            if not returns:  # in-place operations on lists of tensors read and write them
                written = [value for value, a in zip(args, arguments, strict=False) if a.alias_info and a.alias_info.is_write]
                self.bytes += size(written)
        return result


def size(tree: Any) -> int:
    """Bytes of all tensors in a nested structure; an expanded tensor counts only its storage."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)


def traffic(step: Callable[[], object]) -> int:
    """Bytes that the operations of one step read and write, without caching between operations."""
    with Traffic() as counted:
        step()
    return counted.bytes


class Ceilings(NamedTuple):
    """Peak rates of the device: FLOP/s of a large matrix product, and bytes/s (read plus written) of a large copy."""

    matmul: float
    copy: float


def ceilings(device: torch.device, dtype: torch.dtype, quick: bool) -> Ceilings:
    """Measure the peak rates.

    dtype: of the matrix product, as in the steps.   quick: use small sizes.
    """
    gpu = device.type == "cuda"
    side, count = (8192, 2**30) if gpu else (2048, 2**28)
    if quick:
        side, count = 512, 2**20
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = 0.1 if quick else 1.0
    matmul = measure(lambda: torch.mm(a, b, out=product), device, seconds, None)
    copying = measure(lambda: target.copy_(source), device, seconds, None)
    return Ceilings(2 * side**3 / matmul.seconds, 2 * count / copying.seconds)
