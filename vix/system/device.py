"""The hardware a run gets: device, precision, and the state of its random generators."""

import logging
import warnings
from functools import cache
from typing import Any

import torch

from vix.errors import ConfigError
from vix.system.distributed import local_rank, local_world_size, world_size
from vix.system.memory import keep_freed_memory, out_of_memory

log = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """``auto`` or a device's name → the device; a GPU always with its index, which most of ``torch.cuda`` requires.

    Of several processes on a machine, each gets a GPU of its own. The GPU becomes the current one.

    Raises ConfigError where this machine has no such device, PyTorch cannot compute on it, or processes would share a GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            log.warning("No CUDA GPU was found: training on the CPU, which is slow at full size")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = select_gpu(device)
        probe(device)
    except ConfigError:
        raise
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"trainer.device={name}: {unusable_reason(error)}; auto, cpu and cuda:N are names") from error
    if device.type == "meta":
        raise ConfigError("trainer.device=meta: nothing can be trained there; auto, cpu and cuda:N are names")
    if device.type == "cpu":
        keep_freed_memory()
    set_float32_precision(device)
    return device


def select_gpu(device: torch.device) -> torch.device:
    """The GPU with its index, made the current one: random generators, streams and events belong to the current GPU.

    Raises ConfigError where the processes of this machine would share a GPU.
    """
    count = local_world_size()
    if count > 1 and device.index is not None:
        raise ConfigError(
            f"trainer.device={device}: {count} processes on this machine would share that GPU; "
            "trainer.device=auto gives each its own"
        )
    with warnings.catch_warnings():
        # Of GPUs that this build of PyTorch has no kernels for, in several lines and whichever GPU is used: see ``probe``.
        warnings.filterwarnings("ignore", message=r"\s*(Found GPU|.* with CUDA capability)")
        first, available = initial_gpu(), torch.cuda.device_count()
    if count > available:
        raise ConfigError(
            f"trainer.device={device}: {count} processes on this machine need a GPU each, and it has {available}; "
            f"use --nproc-per-node={available}"
        )
    if device.index is None:
        device = torch.device("cuda", local_rank() if count > 1 else first)
    torch.cuda.set_device(device)
    return device


@cache
def initial_gpu() -> int:
    """The GPU that was current when this process first needed one: a sweep's job does not inherit that of the job before."""
    return torch.cuda.current_device()


def probe(device: torch.device) -> None:
    """Compute on the device. An empty tensor would do for a GPU without kernels, whose first real operation then fails."""
    if device.type != "meta":
        torch.ones(2, device=device).sum().item()


def unusable_reason(error: Exception) -> str:
    """Why ``probe`` failed, for an error message."""
    reason = str(error).split("\n")[0].split(". ")[0].rstrip(".")
    if "no kernel image" in str(error):
        built_for = ", ".join(arch.removeprefix("sm_")[:-1] + "." + arch[-1] for arch in torch.cuda.get_arch_list())
        return f"this build of PyTorch has no kernels for that GPU, only for compute capability {built_for} and compatible ones"
    if out_of_memory(error):
        return f"that GPU has no free memory ({reason}); another process may use it"
    return f"this machine has no such device, or it cannot be used ({reason})"


def set_float32_precision(device: torch.device) -> None:
    """Multiply and convolve float32 in float32, never in TF32.

    On a CPU, multiply by oneDNN where that can: on AMD's it is 2 to 3 times faster than MKL.

    PyTorch hands a CPU's products over to oneDNN once they may round to bfloat16. It does so only on processors with
    instructions for whole tiles of bfloat16 (AMX), so a product tells whether it does.
    """
    torch.set_float32_matmul_precision("highest")
    if device.type == "cuda":
        # True by default. This and the line above are the older of PyTorch's two interfaces; parts of PyTorch still read it,
        # and raise where convolutions alone were set by the newer one (fp32_precision).
        torch.backends.cudnn.allow_tf32 = False
    if device.type == "cpu":
        torch.set_float32_matmul_precision("medium")
        a = torch.linspace(1, 2, 128**2).view(128, 128)
        exact = a.double() @ a.double()
        if ((a @ a - exact).abs() > 2e-6 * exact).any():
            torch.set_float32_matmul_precision("highest")


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """``trainer.precision`` → the dtype of autocast (float32: none)."""
    if name == "auto":
        if device.type == "cuda":
            # Emulated bfloat16 (before compute capability 8.0) is slower than float16.
            with torch.cuda.device(device):  # the question is about the current one
                native = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float16
        # Read off the processor, not timed: a run must repeat to the bit on the same machine. Where the instructions
        # exist they are the faster ones; without them bf16 is emulated, and slower.
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if device.type == "cpu" and native else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def hardware(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What results.json tells of it."""
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    return {
        "precision": precision,
        "device": device_name(device),
        "processes": world_size(),
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
