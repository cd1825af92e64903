"""The hardware a run gets: device, precision, and the state of its random generators."""

import logging
import os
import random
from typing import Any

import numpy as np
import torch

from vix.checks import ConfigError
from vix.distributed import processes
from vix.memory import keep_freed_memory

log = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """``auto`` or a device's name → the device; of several processes each gets a GPU of its own.

    Raises ConfigError where this machine has no such device.
    """
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        name = f"cuda:{os.environ['LOCAL_RANK']}" if processes() > 1 else "cuda"
    elif name == "auto":
        log.warning("No CUDA GPU was found: training on the CPU, which is slow at full size")
        name = "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).split(".")[0].split("\n")[0]
        raise ConfigError(
            f"trainer.device={name}: this machine has no such device ({reason}); auto, cpu and cuda:N are names"
        ) from error
    if device.type == "meta":
        raise ConfigError("trainer.device=meta: nothing can be trained there; auto, cpu and cuda:N are names")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # random generators, peaks and caches are asked for without a name
    if device.type == "cpu":
        keep_freed_memory()
    choose_float32_products(device)
    return device


def choose_float32_products(device: torch.device) -> None:
    """Multiply float32 matrices in float32, on a CPU by oneDNN where that can: on AMD's it is 2 to 3 times faster than MKL.

    PyTorch hands a CPU's products over to oneDNN once they may round to bfloat16. It does so only on processors with
    instructions for whole tiles of bfloat16 (AMX), so a product tells whether it does.
    """
    torch.set_float32_matmul_precision("highest")
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
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
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
        "processes": processes(),
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def get_rng_state() -> dict[str, Any]:
    """State of every global random generator (of GPUs, the current one's), in types that weights_only=True reads."""
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every global random generator back into a state that ``get_rng_state`` took."""
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": inner["key"].numpy().astype(np.uint32)}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
