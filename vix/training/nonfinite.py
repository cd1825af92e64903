"""Locate the first non-finite loss, gradient or activation.

Training only sets a flag on the device when a loss or gradient is not finite. The host reads the flag every few steps, because
reading it in every step would make it wait for the device. The step is then located by repeating the steps since the last
checkpoint, which are bit-identical on a CPU. It is saved, and ``python -m vix replay RUN`` repeats it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vix.errors import UserError
from vix.runs.checkpoint import write_tensors
from vix.system.distributed import rank
from vix.system.memory import out_of_memory
from vix.system.rng import get_rng_state, set_rng_state
from vix.training.train_step import TrainStep, mean_loss, shard_batch, step_hooks

FILE = "nonfinite.pt"
# Its keys, with their types.
STEP: dict[str, Any] = {
    **dict.fromkeys(("images", "labels"), Tensor),
    **dict.fromkeys(("model", "rng", "config"), dict),
    **dict.fromkeys(("step", "lr", "scale", "label_smoothing"), int | float),
    "dtype": torch.dtype,
    "device": str,
}


class NonFiniteError(UserError):
    """A loss or a gradient is not finite."""


def locate_step(
    step: TrainStep, batches: Iterable[tuple[Tensor, Tensor]], first: int, directory: Path, config: Any
) -> NonFiniteError:
    """Repeat steps until one is not finite, save it as ``nonfinite.pt``, and return the error that names its layer.

    step: the training step, in the state before step ``first``; so are the random generators.
    batches: batches of images and labels, from step ``first`` on.
    first: number of the first step, from 0.
    directory: the run's directory.
    config: the run's config, which is saved with the step.
    """
    model = step.state.model
    for number, (images, labels) in enumerate(batches, first):
        rng, weights = get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
        step.forward_backward(number, images, labels)
        if step.found_nonfinite:
            saved = {
                "images": images,
                "labels": labels,
                "model": weights,
                "rng": rng,
                "step": number,
                "config": config,
                "lr": step.state.lr,
                "scale": step.state.scaler.get_scale(),
                "label_smoothing": step.label_smoothing,
                "class_weights": step.class_weights,
                "micro_batch": step.micro_batch or len(shard_batch(images, labels)[1]),
                "dtype": step.state.dtype,
                "device": str(images.device),
            }
            if rank() == 0:
                write_tensors(directory / FILE, saved)
            step.state.optimizer.zero_grad(set_to_none=True)
            model.load_state_dict(weights)
            try:
                found = locate_layer(model, saved)
            except RuntimeError as error:  # the step that failed may have been a compiled one, which needs less memory
                if not out_of_memory(error):
                    raise
                found = f"not finite at step {number}; the memory does not suffice to locate the layer"
            return NonFiniteError(f"{found}; `python -m vix replay {directory}` repeats it")
        step.optimizer_step()
    return NonFiniteError(
        "a loss or gradient was not finite, but repeating the steps since the last checkpoint gives finite values"
    )


def locate_layer(model: nn.Module, state: dict[str, Any]) -> str:
    """Repeat a saved step and describe the first non-finite value, with its layer.

    The step is repeated uncompiled, in one process, in micro-batches of the size that fitted the memory.

    model: the model with the weights before the step, and without gradients.
    state: the saved step, the content of ``nonfinite.pt``.
    """
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:

            def check_output(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
                if not found and isinstance(output, Tensor) and not output.isfinite().all():
                    found.append(f"the output of {name} ({type(module).__name__})")

            handles.append(module.register_forward_hook(check_output))
    set_rng_state(state["rng"])
    for hook in step_hooks(model):
        hook(state["step"])  # may draw random numbers
    images, labels = state["images"], state["labels"]
    weights, size = state.get("class_weights"), state.get("micro_batch") or len(labels)  # absent in the files of older runs
    loss = torch.zeros((), device=images.device)
    for part_images, part_labels in zip(images.split(size), labels.split(size), strict=True):
        with torch.autocast(images.device.type, dtype=state["dtype"], enabled=state["dtype"] is not torch.float32):
            part = mean_loss(model.train(), part_images, part_labels, state["label_smoothing"], weights)
            part = part * (len(part_labels) / len(labels))
        if not found:
            (part * state["scale"]).backward()
        loss += part.detach().float()
        del part  # its activations, where there was no backward pass
    if not found:
        found.append(nonfinite_gradient(model) if loss.isfinite() else "the loss")
    for handle in handles:
        handle.remove()
    return (
        f"not finite at step {state['step']}: {found[0]} (loss {loss.item():.4g}, learning rate {state['lr']:.4g}, "
        f"scale {state['scale']:g})"
    )


def nonfinite_gradient(model: nn.Module) -> str:
    """The gradient that became non-finite first: that of the last parameter."""
    nonfinite = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"the gradient of {nonfinite[-1]}" if nonfinite else "nothing in the repeated step"
