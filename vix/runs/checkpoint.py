"""Checkpoint files: written atomically, and loaded without executing code (``weights_only=True``)."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vix.errors import UserError
from vix.system.files import atomic_write


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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint.pt onto the CPU. Raises UserError, which names the file, where it is damaged or not a checkpoint."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise any exception
        reason = "it contains code, which is never run" if "weights_only" in str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint ({reason})") from error
    if not (isinstance(state, dict) and {"model", "best_model", "config", "progress", "results"} <= set(state)):
        raise UserError(f"{path} is damaged or not a checkpoint (another program wrote it)")
    return state
