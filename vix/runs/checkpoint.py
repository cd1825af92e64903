"""Checkpoint files: written atomically, and loaded without executing code (``weights_only=True``)."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vix.errors import UserError
from vix.system.files import atomic_write

# Keys of a checkpoint that are read before the state is restored, and those of the state, with their types.
CHECKPOINT: dict[str, Any] = {
    **dict.fromkeys(("model", "best_model", "config", "results", "config.trainer"), dict),
    **dict.fromkeys(("config.trainer.epochs", "progress.epoch", "progress.batch", "skipped_steps"), int),
    **dict.fromkeys(("optimizer", "optimizer.state", "lr_scheduler", "scaler", "progress", "peak_memory", "rng"), dict),
    **dict.fromkeys(("optimizer.param_groups", "optimizer_params"), list),
}


def saved_megabytes(state: dict[str, Tensor]) -> float:
    """Size of a state dict as written by torch.save, in MB (10⁶ bytes)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell() / 1e6


def write_tensors(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` with torch.save, atomically. Raises UserError where the disk is full or not writable."""
    buffer = io.BytesIO()  # torch.save's own error message for a full disk does not name the cause
    torch.save(state, buffer)
    atomic_write(path, buffer.getbuffer())


def read_tensors(path: Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """Load a file of ``write_tensors`` onto the CPU.

    types: dotted keys that the file must contain, and the types of their values, as for ``isinstance``.

    Raises UserError, which names the file, where it cannot be read, is damaged, or is another program's.
    """
    try:
        with open(path, "rb"):  # an OSError of torch.load may also mean that the file is truncated
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise any exception
        reason = "it contains code, which is never run" if "weights_only" in str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or not types.keys() & state.keys():
        raise UserError(f"{path} is damaged or not a checkpoint (another program wrote it)")
    for key, kind in types.items():
        value: Any = state
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise UserError(f"{path} is damaged or not a checkpoint ({key} is missing or invalid)")
    return state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint.pt onto the CPU. Raises UserError, which names the file, where it is damaged or not a checkpoint."""
    state = read_tensors(path, CHECKPOINT)
    for key in ("model", "best_model"):
        if not all(isinstance(tensor, Tensor) for tensor in state[key].values()):
            raise UserError(f"{path} is damaged or not a checkpoint ({key} contains something else than tensors)")
    return state
