"""Whether a checkpoint's weights and optimizer state fit what is trained now (trainer.resume=force)."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vix.runs.identity import Changes, cannot_resume
from vix.runs.results import MODEL_GROUPS


def check_state_fits(
    changed: Changes,
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    model: nn.Module,
    saved: Mapping[str, Any] | None,
    directory: Path,
) -> None:
    """Raises ConfigError where the weights or the optimizer's state of a checkpoint do not fit what is trained now."""
    if saved:
        check_weights_fit(changed, model, saved["model"], directory)
        check_optimizer_state_fits(changed, build_optimizer, model, saved, directory)


def check_weights_fit(changed: Changes, model: nn.Module, saved: Mapping[str, Tensor], directory: Path) -> None:
    """Raises ConfigError where the saved weights and buffers are not those of this model."""
    here = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if here != {name: tensor.shape for name, tensor in saved.items()}:
        model_keys = {key: values for key, values in changed.items() if key.partition(".")[0] in MODEL_GROUPS}
        raise cannot_resume(directory, model_keys or changed, "its weights do not fit this model")


def check_optimizer_state_fits(
    changed: Changes,
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    model: nn.Module,
    saved: Mapping[str, Any],
    directory: Path,
) -> None:
    """Raises ConfigError where the optimizer, as it is configured now, needs state that the saved one lacks.

    A step of a copy with gradients of zero shows what it needs.
    """
    optimizer_keys = {key: values for key, values in changed.items() if key.startswith("optimizer.")}
    states = saved["optimizer"]["state"]
    if not optimizer_keys or not states:
        return
    copied = copy.deepcopy(model)
    for p in copied.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = build_optimizer(copied)
    optimizer.step()
    needed = {name: set(optimizer.state[p]) for name, p in copied.named_parameters()}
    names = saved["optimizer_params"]
    missing = {key for i, state in states.items() if state for key in needed[names[i]] - set(state)}
    if missing:
        # Numbers such as a learning rate need no state; where nothing else changed any of them may.
        suspects = {k: v for k, v in optimizer_keys.items() if not all(is_number(x) for x in v)}
        raise cannot_resume(directory, suspects or optimizer_keys, f"its optimizer has no {', '.join(sorted(missing))}")


def is_number(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers)
