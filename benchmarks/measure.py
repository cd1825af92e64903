"""Time and peak memory of a step that is repeated, on a GPU by its own events, and what its operations amount to."""

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
FEWEST, MOST = 5, 200  # repeats


class Cost(NamedTuple):
    """What a step takes: the median of its repeats, and the peaks over them in bytes.

    allocated: of PyTorch's memory on a GPU, all of it: weights, optimizer state, activations. On a CPU what a step takes beside
        the weights and the optimizer's state, without what the libraries below PyTorch take for themselves.
    reserved: what PyTorch holds of a GPU's memory; None on a CPU.
    resident: of the process on a CPU over what it had before the model; None on a GPU, or where the system does not tell.
    """

    seconds: float
    repeats: int
    allocated: int
    reserved: int | None
    resident: int | None


def measure(
    step: Callable[[], object], device: torch.device, seconds: float, baseline: int | None, fewest: int = FEWEST
) -> Cost:
    """Warm up, then repeat for about so many seconds, at least ``fewest`` times.

    baseline: bytes that the process had resident before the model was made, from :func:`resident`.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and events are the current device's
    step()  # allocates the optimizer's state, and chooses kernels
    synchronize(device)
    clock = time.perf_counter()
    step()
    synchronize(device)
    once = time.perf_counter() - clock
    if once < seconds:  # caches and clocks settle; a step that takes longer than all of this has settled
        for _ in range(min(10, int(seconds / 4 / once))):
            step()
    repeats = max(fewest, min(MOST, int(seconds / once)))
    if device.type != "cuda":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak: what compiling took is not the step's
        marks = [time.perf_counter()]
        for _ in range(repeats):
            step()
            marks.append(time.perf_counter())
        durations = [later - earlier for earlier, later in pairwise(marks)]
        peak = resident("VmHWM")
        above = None if peak is None or baseline is None else peak - baseline
        return Cost(statistics.median(durations), repeats, most_allocated(step), None, above)
    synchronize(device)
    torch.cuda.empty_cache()  # what the warm-up tried and let go is not the step's
    torch.cuda.reset_peak_memory_stats(device)
    step()
    # An event between every two steps, and no wait before the last: the host runs ahead as it does in training.
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
    """Bytes on the CPU that PyTorch's profiler sees a step hold at most of those that it has allocated itself."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident(which: str = "VmRSS") -> int | None:
    """Bytes of this process in memory now, or at most so far (``VmHWM``); None where the system does not tell."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(which))
    except (OSError, StopIteration):
        return None
    return 1024 * int(line.split()[1])


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write: their tensors, each once an operation, and none for views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns, arguments = func._schema.returns, func._schema.arguments
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and "empty" not in func.__name__:
            self.bytes += size(args) + size(kwargs) + size(result)
            if not returns:  # works in place on lists of tensors: reads and writes them
                written = [value for value, a in zip(args, arguments, strict=False) if a.alias_info and a.alias_info.is_write]
                self.bytes += size(written)
        return result


def size(tree: Any) -> int:
    """Bytes of all tensors of a nest; an expanded one has those that it occupies."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)


def traffic(step: Callable[[], object]) -> int:
    """Bytes that the operations of one step read and write, if nothing stays in a cache between two of them."""
    with Traffic() as counted:
        step()
    return counted.bytes


class Ceilings(NamedTuple):
    """What the device reaches at best: FLOP/s in a large matrix product, bytes/s (read and written) in a large copy."""

    matmul: float
    copy: float


def ceilings(device: torch.device, dtype: torch.dtype, quick: bool) -> Ceilings:
    """Measured with ``dtype``, which the steps compute in."""
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
