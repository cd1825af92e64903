"""Memory of the device: peak usage, limits, out-of-memory errors, and settings of the C allocator."""

import ctypes
import resource
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from vix.errors import ConfigError


class PeakMemory:
    """Peak GPU memory of the training steps, excluding evaluation and the data set on the device, in GB (10⁹ bytes).

    device: all values are None where it is not a CUDA device.
    resident: bytes of the data set on the device, subtracted from both peaks.
    graphs: whether the steps replay CUDA graphs. PyTorch does not count the allocations of a replay, so both peaks are then the
        reserved memory, which includes the graphs' memory pools.
    """

    def __init__(self, device: torch.device, resident: int, graphs: bool = False) -> None:
        self.device, self.resident, self.graphs = device, resident, graphs
        self.allocated = self.reserved = 0

    def start(self) -> None:
        """Reset PyTorch's peaks; call before the steps of an epoch."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # memory cached by the evaluation does not count
            torch.cuda.reset_peak_memory_stats(self.device)

    def stop(self) -> None:
        """Record the peaks since ``start``; call after the steps of an epoch, before the evaluation."""
        if self.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.device)
            allocated = reserved if self.graphs else torch.cuda.max_memory_allocated(self.device)
            self.allocated = max(self.allocated, allocated - self.resident)
            self.reserved = max(self.reserved, reserved - self.resident)

    def state_dict(self) -> dict[str, int]:
        """The peaks so far, in bytes, for a checkpoint."""
        return {"allocated": self.allocated, "reserved": self.reserved}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the peaks from a checkpoint."""
        self.allocated, self.reserved = state["allocated"], state["reserved"]

    @property
    def gigabytes(self) -> dict[str, float | None]:
        """The fields of results.json: peaks of allocated and reserved memory, and the size of the data set on the GPU."""
        gpu = self.device.type == "cuda"
        return {
            "peak_gpu_allocated_gb": self.allocated / 1e9 if gpu else None,
            "peak_gpu_reserved_gb": self.reserved / 1e9 if gpu else None,
            "resident_data_gb": self.resident / 1e9 if gpu else None,
        }


def process_peak_gb() -> float:
    """Peak resident memory of this process so far, in GB (10⁹ bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


STATUS = Path("/proc/self/status")
INITIAL_LIMIT = resource.getrlimit(resource.RLIMIT_DATA)
OOM_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
    "HOST_ALLOCATION_FAILED",  # cuDNN's
    "could not create a memory",  # oneDNN's, like the next
    "could not execute a primitive",
    "can't start new thread",  # no memory for its stack
)
# "out of memory" is in the messages of CUDA's runtime and driver, NCCL, PyTorch's allocator (also when wrapped in a compiler's
# error) and Triton. The status codes are those of the driver, cuBLAS, cuSOLVER, cuSPARSE, cuFFT and cuDNN.
GPU_OOM_MESSAGES = ("out of memory", "CUDA_ERROR_OUT_OF_MEMORY", "_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED", "Failed to CUDA")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception is an out-of-memory error of the GPU or of the machine."""
    if isinstance(error, MemoryError) or gpu_out_of_memory(error):
        return True
    text = str(error)
    # Exact match: with further text, oneDNN's message means that the operation is not supported.
    return isinstance(error, RuntimeError) and (
        text == "could not create a primitive" or any(shortage in text for shortage in OOM_MESSAGES)
    )


def gpu_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is an out-of-memory error of the GPU, from any library."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(shortage in str(error) for shortage in GPU_OOM_MESSAGES)


def check_memory_limit(device: torch.device, gigabytes: float | None) -> None:
    """Raises ConfigError where ``limit_memory`` cannot set a limit of this many GB (10⁹ bytes) on the device."""
    if gigabytes is None:
        return
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 1e9
        if gigabytes > total:
            raise ConfigError(
                f"trainer.memory_limit_gb={gigabytes}: this GPU has only {total:.1f} GB; use at most that, or null"
            )
    elif device.type != "cpu" or not STATUS.exists():
        raise ConfigError(
            f"trainer.memory_limit_gb={gigabytes}: supported only on CUDA GPUs, and on CPUs under Linux; use null"
        )


def limit_memory(device: torch.device, gigabytes: float | None) -> None:
    """Limit the memory that the run may allocate on the device; None removes that of an earlier call.

    gigabytes: in GB of 10⁹ bytes. On a GPU, all memory that PyTorch reserves; on a CPU, the writable memory of the process in
        addition to its present size (Linux's RLIMIT_DATA, which child processes inherit).

    Under a limit on a CPU, oneDNN is disabled: its kernels crash the process, or fail permanently, when memory runs out
    during their compilation.
    """
    if device.type == "cuda":
        fraction = initial_fraction(device)
        if gigabytes is not None:
            fraction = min(fraction, gigabytes * 1e9 / torch.cuda.get_device_properties(device).total_memory)
        torch.cuda.set_per_process_memory_fraction(fraction, device)
        return
    resource.setrlimit(resource.RLIMIT_DATA, INITIAL_LIMIT)
    torch.backends.mkldnn.set_flags(_enabled=gigabytes is None)
    if gigabytes is not None:
        torch.ones(2**18).sum()  # starts OpenMP's threads, which abort the process where memory for them is missing
        release_memory(device)
        used = next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith("VmData"))
        allowed = used + round(gigabytes * 1e9)
        soft, hard = INITIAL_LIMIT
        resource.setrlimit(resource.RLIMIT_DATA, (allowed if soft == resource.RLIM_INFINITY else min(allowed, soft), hard))
    if any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS)):
        return_freed_memory()


@cache
def initial_fraction(device: torch.device) -> float:
    """The share of a GPU's memory that PyTorch may use before the first change: 1, or that of ``PYTORCH_ALLOC_CONF``."""
    return torch.cuda.get_per_process_memory_fraction(device)


def release_memory(device: torch.device) -> None:
    """Return freed memory that PyTorch or the C library caches to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Make glibc reuse up to 2 GB of freed memory instead of returning large blocks to the system immediately.

    Otherwise every step allocates them again, and the system zeroes their pages: 4 to 17 % of the time of a step of the
    paper's models on a CPU. Does nothing with another C library.
    """
    set_malloc_options(trim_threshold=2**31 - 1, mmap_threshold=2**25)  # the largest value allowed


def return_freed_memory() -> None:
    """Make glibc return blocks of 64 KiB and more immediately: under a memory limit, fragmentation would waste them."""
    set_malloc_options(trim_threshold=2**17, mmap_threshold=2**16)


def set_malloc_options(trim_threshold: int, mmap_threshold: int) -> None:
    """Set glibc's thresholds in bytes; does nothing with another C library."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, trim_threshold)  # M_TRIM_THRESHOLD and, below, M_MMAP_THRESHOLD of glibc's malloc.h
        mallopt(-3, mmap_threshold)
