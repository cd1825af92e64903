"""Continuing a checkpoint, also under another config (trainer.resume=force): what is used from which, and what cannot change.

Options come from the new config, state from the checkpoint. A changed option that the state does not fit is refused by name.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from vix.checks import ConfigError

Changes = Mapping[str, tuple[Any, Any]]  # changed keys of the config: their values in the checkpoint, and now

# Groups whose class cannot be replaced in the middle of a run, and those that make the model.
CLASSES = ("model", "attention", "embedding", "posenc", "optimizer", "data")
MODEL = ("model", "attention", "embedding", "posenc")
FIXED = {
    "seed": "weights and order of the images began with the other seed",
    "data.image_size": "the images would be others",
    "data.channels": "the images would be others",
    "data.test_size": "its epochs were evaluated on other images",
    "data.validation_size": "its epochs were evaluated on other images",
}
FIXED_WITHIN_EPOCH = ("trainer.batch_size", "data.train_size")


def refuse_fixed(changed: Changes, epoch: int, batch: int, directory: Path) -> None:
    """Raises ConfigError where a changed option can never change, or not after ``epoch`` epochs and ``batch`` steps."""
    for key, (then, now) in changed.items():
        group, _, option = key.partition(".")
        if option == "_target_" and group in CLASSES:
            raise refusal(directory, {key: (then, now)}, f"its state is that of another {group}")
        if key in FIXED:
            raise refusal(directory, {key: (then, now)}, FIXED[key])
        if key in FIXED_WITHIN_EPOCH and batch:
            raise refusal(directory, {key: (then, now)}, f"it stopped within epoch {epoch + 1}, whose batches it decides")
        if key == "trainer.epochs" and now < epoch + (batch > 0):
            done = f"{epoch} epochs" + (f" and {batch} steps" if batch else "")
            raise refusal(directory, {key: (then, now)}, f"{done} are done already")


def refuse_misfit(
    changed: Changes,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    model: nn.Module,
    saved: Mapping[str, Any] | None,
    directory: Path,
) -> None:
    """Raises ConfigError where the weights or the optimizer's state of a checkpoint do not fit what is trained now."""
    if saved:
        refuse_other_weights(changed, model, saved["model"], directory)
        refuse_other_state(changed, make_optimizer, model, saved, directory)


def refuse_other_weights(changed: Changes, model: nn.Module, saved: Mapping[str, Tensor], directory: Path) -> None:
    """Raises ConfigError where the saved weights and buffers are not those of this model."""
    here = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if here != {name: tensor.shape for name, tensor in saved.items()}:
        of_model = {key: values for key, values in changed.items() if key.partition(".")[0] in MODEL}
        raise refusal(directory, of_model or changed, "its weights do not fit this model")


def refuse_other_state(
    changed: Changes,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    model: nn.Module,
    saved: Mapping[str, Any],
    directory: Path,
) -> None:
    """Raises ConfigError where the optimizer, as it is configured now, needs state that the saved one lacks.

    A step of a copy with gradients of zero shows what it needs.
    """
    of_optimizer = {key: values for key, values in changed.items() if key.startswith("optimizer.")}
    states = saved["optimizer"]["state"]
    if not of_optimizer or not states:
        return
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    trial = make_optimizer(twin)
    trial.step()
    needed = {name: set(trial.state[p]) for name, p in twin.named_parameters()}
    names = saved["optimizer_params"]
    missing = {key for i, state in states.items() if state for key in needed[names[i]] - set(state)}
    if missing:
        # Numbers such as a learning rate need no state; where nothing else changed any of them may.
        suspects = {k: v for k, v in of_optimizer.items() if not all(is_number(x) for x in v)}
        raise refusal(directory, suspects or of_optimizer, f"its optimizer has no {', '.join(sorted(missing))}")


def is_number(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers)


def refusal(directory: Path, changed: Changes, reason: str) -> ConfigError:
    keys = ", ".join(f"{key} was {then} and is {now}" for key, (then, now) in changed.items())
    return ConfigError(
        f"trainer.resume=force cannot continue {directory} ({keys}): {reason}; keep the value, or start over with rerun=true"
    )


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the optimizer's parameters in the order in which its state dict numbers them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def load_optimizer(optimizer: torch.optim.Optimizer, names: list[str], saved: dict[str, Any], saved_names: list[str]) -> None:
    """Take each parameter's state from a state dict, and the options from the optimizer as it was constructed.

    names, saved_names: of the parameters, here and there, in the order in which state dicts number them: the parameters may be
        grouped otherwise than they were.
    """
    position = {name: i for i, name in enumerate(names)}
    state = {position[saved_names[i]]: values for i, values in saved["state"].items()}
    groups = optimizer.state_dict()["param_groups"]
    if names == saved_names and [len(g["params"]) for g in groups] == [len(g["params"]) for g in saved["param_groups"]]:
        # What is in a group besides the constructor's options and the scheduler's base is state of that optimizer.
        options = {*inspect.signature(type(optimizer)).parameters, "params", "initial_lr"}
        pairs = zip(saved["param_groups"], groups, strict=True)
        groups = [{**old, **{key: value for key, value in new.items() if key in options}} for old, new in pairs]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def scheduler_at(scheduler: LambdaLR, step: int) -> LambdaLR:
    """The same learning rates over the steps, from step number ``step`` on."""
    return LambdaLR(scheduler.optimizer, scheduler.lr_lambdas, last_epoch=step - 1)


def changes_row(changed: Changes, epoch: int, batch: int) -> dict[str, Any]:
    """What results.json says of a run that was continued under another config, from where on."""
    return {"epochs_before": epoch, "steps_before": batch, "changed": {key: list(values) for key, values in changed.items()}}


def differing(then: Mapping[str, Any], now: Mapping[str, Any], ignored: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Keys of two flat configs whose values differ, with both values (None where one lacks the key), sorted."""
    keys = sorted({*then, *now} - {*ignored})
    return {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}
