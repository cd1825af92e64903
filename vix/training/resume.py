"""Check whether a checkpoint matches the model and optimizer of the current config (trainer.resume=force)."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vix.errors import UserError, first_paragraph
from vix.runs.identity import MODEL_GROUPS, Changes, cannot_resume
from vix.system.memory import out_of_memory
from vix.training.state import TrainState


def check_state_fits(
    changed: Changes,
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    model: nn.Module,
    saved: Mapping[str, Any] | None,
    directory: Path,
) -> None:
    """Check that a checkpoint's weights and optimizer state match the current config.

    changed: options that differ from the checkpoint's config.
    build_optimizer: builds the optimizer of a model.
    model: the model of the current config.
    saved: the checkpoint; None: nothing to check.
    directory: the run's directory, for the error message.

    Raises ConfigError where they do not match.
    """
    if saved:
        check_weights_fit(changed, model, saved["model"], directory)
        check_optimizer_state_fits(changed, build_optimizer, model, saved, directory)


def check_weights_fit(changed: Changes, model: nn.Module, saved: Mapping[str, Tensor], directory: Path) -> None:
    """Raises ConfigError where the names or shapes of the saved weights and buffers are not those of this model, and UserError
    where no changed option explains it."""
    here = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if here != {name: tensor.shape for name, tensor in saved.items()}:
        if not changed:
            raise UserError(
                f"the checkpoint in {directory} has the weights of another model, although its config is the same "
                "(an older version of this program may have written it); start over with rerun=true"
            )
        model_keys = {key: values for key, values in changed.items() if key.partition(".")[0] in MODEL_GROUPS}
        raise cannot_resume(directory, model_keys or changed, "its weights do not match this model")


def check_optimizer_state_fits(
    changed: Changes,
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    model: nn.Module,
    saved: Mapping[str, Any],
    directory: Path,
) -> None:
    """Raises ConfigError where the optimizer of the current config needs state that the saved one lacks.

    The needed state is found by a step of a copy of the model with zero gradients.
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
        # Changed numbers, such as a learning rate, are blamed only if nothing else changed.
        suspects = {k: v for k, v in optimizer_keys.items() if not all(is_number(x) for x in v)}
        raise cannot_resume(directory, suspects or optimizer_keys, f"its optimizer has no {', '.join(sorted(missing))}")


def restore(state: TrainState, saved: Mapping[str, Any], steps_per_epoch: int, directory: Path) -> None:
    """Restore the state from a checkpoint.

    steps_per_epoch: training steps per epoch.   directory: the run's directory, for the error message.

    Raises UserError where a part of the checkpoint is invalid.
    """
    try:
        state.load_state_dict(saved, steps_per_epoch)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_paragraph(error)}"
        raise UserError(
            f"the checkpoint in {directory} is damaged or of another version of this program ({reason}); "
            "start over with rerun=true"
        ) from error


def is_number(value: Any) -> bool:
    """Whether an option's value is a number or a list of numbers."""
    numbers = value if isinstance(value, list) else [value]
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers)
