"""Hardware of a run: device, precision, and the description for results.json."""

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
    """``trainer.device`` → the device. A GPU always has an index, which most of ``torch.cuda`` requires.

    name: auto, or a device's name, such as cpu or cuda:1.

    Each of several processes on a machine gets its own GPU. The GPU becomes the current one. Also sets the float32 precision,
    and on a GPU which kernels compute attention.

    Raises ConfigError where this machine lacks the device, PyTorch cannot compute on it, or processes would share a GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            log.warning("No CUDA GPU found: using the CPU, which is slow for full-size models")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = select_gpu(device)
        probe(device)
    except ConfigError:
        raise
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"trainer.device={name}: {unusable_reason(error)}; valid: auto, cpu, cuda:N") from error
    if device.type == "meta":
        raise ConfigError("trainer.device=meta: training is not possible on this device; valid: auto, cpu, cuda:N")
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        avoid_cudnn_attention()
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
            "trainer.device=auto assigns one to each"
        )
    with warnings.catch_warnings():
        # PyTorch warns about every GPU that it has no kernels for, used or not; ``probe`` checks the one that is used.
        warnings.filterwarnings("ignore", message=r"\s*(Found GPU|.* with CUDA capability)")
        first, available = initial_gpu(), torch.cuda.device_count()
    if count > available:
        raise ConfigError(
            f"trainer.device={device}: {count} processes on this machine need a GPU each, and it has {available}; "
            f"use --nproc-per-node={available}"
        )
    index = local_rank() if count > 1 else first
    if index is None:
        raise ConfigError(
            f"trainer.device={device}: LOCAL_RANK, which says which of {available} GPUs this process uses, is not set; "
            "start the processes with torchrun"
        )
    if device.index is None:
        device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


@cache
def initial_gpu() -> int:
    """The GPU that was current at the first call: a job of a sweep must not inherit the GPU of the previous job."""
    return torch.cuda.current_device()


def probe(device: torch.device) -> None:
    """Run an operation on the device. Allocating an empty tensor would succeed even on a GPU without kernels."""
    if device.type != "meta":
        torch.ones(2, device=device).sum().item()


def unusable_reason(error: Exception) -> str:
    """Why ``probe`` failed, for an error message."""
    reason = str(error).split("\n")[0].split(". ")[0].rstrip(".")
    if "no kernel image" in str(error):
        built_for = ", ".join(arch.removeprefix("sm_")[:-1] + "." + arch[-1] for arch in torch.cuda.get_arch_list())
        return f"this build of PyTorch has no kernels for that GPU, only for compute capability {built_for} and compatible ones"
    if out_of_memory(error):
        return f"that GPU has no free memory ({reason}); another process may be using it"
    return f"this machine has no such device, or it is unusable ({reason})"


def avoid_cudnn_attention() -> None:
    """Let fused attention use PyTorch's own kernels instead of cuDNN's, the default on Hopper GPUs.

    The gradient of cuDNN's is not a number for some finite inputs (PyTorch 2.11, cuDNN 9, H200; PyTorch's issue 196678):
    ``experiment=vil`` ended in its fourth epoch, and the same step is finite with the other kernels.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def set_float32_precision(device: torch.device) -> None:
    """Compute float32 matrix products and convolutions in float32, never in TF32.

    On a CPU, use oneDNN for matrix products where it computes them in float32: on AMD processors it is 2 to 3 times faster
    than MKL. PyTorch uses oneDNN with float32 matmul precision "medium", which permits rounding to bfloat16. Only processors
    with AMX instructions do round, so a test product decides.
    """
    torch.set_float32_matmul_precision("highest")
    if device.type == "cuda":
        # True by default. This and the line above are the older of PyTorch's two interfaces. Parts of PyTorch still read it,
        # and raise where only convolutions were set with the newer one (fp32_precision).
        torch.backends.cudnn.allow_tf32 = False
    if device.type == "cpu":
        torch.set_float32_matmul_precision("medium")
        a = torch.linspace(1, 2, 128**2).view(128, 128)
        exact = a.double() @ a.double()
        if ((a @ a - exact).abs() > 2e-6 * exact).any():
            torch.set_float32_matmul_precision("highest")


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """``trainer.precision`` → the autocast dtype; float32 means no autocast.

    name: auto, bf16, fp16 or fp32. ``auto`` selects 16 bits where the device has fast instructions for them.
    """
    if name == "auto":
        if device.type == "cuda":
            # Emulated bfloat16 (below compute capability 8.0) is slower than float16.
            with torch.cuda.device(device):  # is_bf16_supported checks the current device
                native = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float16
        # Determined by CPU features, not by timing: runs must be bit-identical on the same machine. bf16 is faster with
        # these instructions, and emulated and slower without them.
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if device.type == "cpu" and native else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def hardware(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of results.json that describe the hardware; ``dtype``: from :func:`resolve_precision`."""
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    return {
        "precision": precision,
        "device": device_name(device),
        "processes": world_size(),
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
