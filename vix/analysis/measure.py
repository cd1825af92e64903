"""Time and peak memory of a repeated step; CUDA events measure the time on a GPU."""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch

STATUS = Path("/proc/self/status")
FEWEST, MOST = 5, 200  # limits of the number of repeats


class Cost(NamedTuple):
    """Cost of a step: the median time over its repeats, and the peak memory in bytes.

    seconds, seconds_p95: median and 95th percentile of the time of a step.
    repeats: number of measured steps.
    allocated: on a GPU, all memory that PyTorch allocated: weights, optimizer state and activations. On a CPU, the memory of a
        step in addition to weights and optimizer state, excluding the memory of libraries below PyTorch.
    reserved: memory that PyTorch reserved on a GPU; None on a CPU.
    resident: increase of the process's resident memory over ``baseline`` on a CPU; None on a GPU, or where it is unknown.
    """

    seconds: float
    seconds_p95: float
    repeats: int
    allocated: int
    reserved: int | None
    resident: int | None


def measure(
    step: Callable[[], object], device: torch.device, seconds: float, baseline: int | None = None, fewest: int = FEWEST
) -> Cost:
    """Warm up, then repeat a step and measure it.

    seconds: approximate total time of the repeats.
    baseline: resident bytes of the process before the model was created, from :func:`resident`; None where it is unknown.
    fewest: minimum number of repeats, at least 2.
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
        return Cost(*percentiles(durations), repeats, most_allocated(step), None, above)
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
    return Cost(*percentiles(durations), repeats, allocated, reserved, None)


def percentiles(durations: list[float]) -> tuple[float, float]:
    """Median and 95th percentile of at least two durations."""
    return statistics.median(durations), statistics.quantiles(durations, n=20, method="inclusive")[-1]


def peak_allocated(step: Callable[[], object], device: torch.device) -> int:
    """Peak bytes of a step, as ``Cost.allocated``, without the time."""
    if device.type != "cuda":
        step()  # allocates the optimizer state
        return most_allocated(step)
    torch.cuda.set_device(device)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(device)
        step()
        synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def most_allocated(step: Callable[[], object]) -> int:
    """Peak bytes on the CPU that a step allocates, measured with PyTorch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # without a GPU, PyTorch for CUDA would report that on standard error
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
