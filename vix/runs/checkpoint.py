"""Checkpoint files: written whole or not at all, read without running code."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vix.errors import UserError
from vix.system.files import atomic_write


def saved_megabytes(state: dict[str, Tensor]) -> float:
    """Size of a state dict as torch.save writes it, in MB (10⁶ bytes)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell() / 1e6


def write_tensors(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` as torch.save does, whole or not at all. Raises UserError."""
    buffer = io.BytesIO()  # written by itself torch.save reports a full disk without saying so
    torch.save(state, buffer)
    atomic_write(path, buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint.pt, on the CPU. Raises UserError, naming the file, where it is no sound checkpoint."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        reason = "it holds code, which is never run" if "weights_only" in str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or no checkpoint ({reason})") from error
    if not (isinstance(state, dict) and {"model", "best_model", "config", "progress", "results"} <= set(state)):
        raise UserError(f"{path} is damaged or no checkpoint (it is of another program)")
    return state
