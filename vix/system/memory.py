"""A device's memory: how much a run may take, what a shortage looks like, and what becomes of freed memory."""

import ctypes
import resource
from contextlib import suppress
from pathlib import Path

import torch

from vix.errors import ConfigError


class PeakMemory:
    """Peak GPU memory of the training steps alone, without the resident data set, in GB (10⁹ bytes).

    device: all figures are None where it is no CUDA device.
    resident: bytes of the data set that lies on the device, taken off both figures.
    graphs: whether the steps replay CUDA graphs. A replay allocates nothing that PyTorch counts, so the memory reserved, which
        holds the graphs' pools, is then both figures.
    """

    def __init__(self, device: torch.device, resident: int, graphs: bool = False) -> None:
        self.device, self.resident, self.graphs = device, resident, graphs
        self.allocated = self.reserved = 0

    def start(self) -> None:
        """Begin to watch: before an epoch's steps."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the evaluation before cached is not the steps' own
            torch.cuda.reset_peak_memory_stats(self.device)

    def stop(self) -> None:
        """Take the peaks since ``start``: after an epoch's steps, before the evaluation."""
        if self.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.device)
            allocated = reserved if self.graphs else torch.cuda.max_memory_allocated(self.device)
            self.allocated = max(self.allocated, allocated - self.resident)
            self.reserved = max(self.reserved, reserved - self.resident)

    def state_dict(self) -> dict[str, int]:
        return {"allocated": self.allocated, "reserved": self.reserved}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.allocated, self.reserved = state["allocated"], state["reserved"]

    @property
    def gigabytes(self) -> dict[str, float | None]:
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
    "could not create a memory",  # oneDNN's, as the next
    "could not execute a primitive",
    "can't start new thread",  # there is no room for its stack
)
# CUDA's runtime and driver, NCCL, PyTorch's allocator (also behind a compiler's own error) and "Triton Error [CUDA]" write
# "out of memory"; the status codes are those of the driver, cuBLAS, cuSOLVER, cuSPARSE, cuFFT, and cuDNN.
GPU_OOM_MESSAGES = ("out of memory", "CUDA_ERROR_OUT_OF_MEMORY", "_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED", "Failed to CUDA")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the GPU or of the machine did not suffice."""
    if isinstance(error, MemoryError) or gpu_out_of_memory(error):
        return True
    text = str(error)
    # Without more words: with some, oneDNN says that it has no such operation.
    return isinstance(error, RuntimeError) and (
        text == "could not create a primitive" or any(shortage in text for shortage in OOM_MESSAGES)
    )


def gpu_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the GPU did not suffice, in whichever library's words."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(shortage in str(error) for shortage in GPU_OOM_MESSAGES)


def check_memory_limit(device: torch.device, gigabytes: float | None) -> None:
    """Raises ConfigError where ``limit_memory`` cannot set this limit."""
    if gigabytes is None:
        return
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 1e9
        if gigabytes > total:
            raise ConfigError(f"trainer.memory_limit_gb={gigabytes}: this GPU has {total:.1f} GB; at most that")
    elif device.type != "cpu" or not STATUS.exists():
        raise ConfigError(
            f"trainer.memory_limit_gb={gigabytes}: only a CUDA GPU's memory, and on Linux a CPU run's, can be limited; use null"
        )


def limit_memory(device: torch.device, gigabytes: float | None) -> None:
    """Let the run take no more than so many GB (10⁹ bytes) of the device's memory; None lifts an earlier limit.

    On a GPU it counts what PyTorch takes, on a CPU what the process takes beyond what it holds now: its writable pages
    (Linux's RLIMIT_DATA), a limit that the processes which it starts inherit. Under a limit a CPU does without oneDNN, whose
    kernels crash the process, or fail for good, where memory runs out while they are compiled.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 1e9
        torch.cuda.set_per_process_memory_fraction(1.0 if gigabytes is None else gigabytes / total, device)
        return
    resource.setrlimit(resource.RLIMIT_DATA, INITIAL_LIMIT)
    torch.backends.mkldnn.set_flags(_enabled=gigabytes is None)
    if gigabytes is not None:
        torch.ones(2**18).sum()  # starts OpenMP's threads: where there is no memory for one it ends the process
        release_memory(device)
        held = next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith("VmData"))
        allowed = held + round(gigabytes * 1e9)
        soft, hard = INITIAL_LIMIT
        resource.setrlimit(resource.RLIMIT_DATA, (allowed if soft == resource.RLIM_INFINITY else min(allowed, soft), hard))
    if any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS)):
        return_freed_memory()


def release_memory(device: torch.device) -> None:
    """Give freed memory that PyTorch or the C library keeps back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Let glibc reuse up to 2 GB of freed memory instead of giving large blocks back to the system at once.

    Every step would take them again, and the system clears each of their pages first: 4 to 17 % of a step of the paper's
    models on a CPU. Does nothing where the C library is another.
    """
    set_malloc_options(trim_threshold=2**31 - 1, mmap_threshold=2**25)  # the largest value allowed


def return_freed_memory() -> None:
    """Let glibc give blocks of 64 KiB and more back at once: kept ones between others are of no use where memory is short."""
    set_malloc_options(trim_threshold=2**17, mmap_threshold=2**16)


def set_malloc_options(trim_threshold: int, mmap_threshold: int) -> None:
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, trim_threshold)  # the parameters' numbers are those of glibc's malloc.h
        mallopt(-3, mmap_threshold)
