"""Where numbers went wrong: ``python -m vix.nonfinite RUN_DIRECTORY`` repeats a step whose loss or gradient is not finite.

Training only notes on the device that a step was broken, and looks at the note now and then: looking at every step would
make the host wait for the device. The step is then found by doing those since the last checkpoint once more, which on a CPU
repeats them to the bit.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

import vix
from vix.checks import UserError
from vix.console import protect_output
from vix.distributed import rank
from vix.files import user_path
from vix.learner import Learner
from vix.run import write_tensors
from vix.runtime import get_rng_state, resolve_device, set_rng_state
from vix.threads import use_given_cpus

FILE = "nonfinite.pt"


class NotFinite(UserError):
    """A loss or a gradient that is not finite."""


def find(learner: Learner, batches: Iterable[tuple[Tensor, Tensor]], first: int, directory: Path, config: Any) -> NotFinite:
    """Repeat the steps from number ``first`` until one breaks; save that one as nonfinite.pt, and return what is to be told.

    ``learner`` and the random generators must be as they were before step ``first``.
    """
    for number, (images, labels) in enumerate(batches, first):
        rng, model = get_rng_state(), {name: t.clone() for name, t in learner.model.state_dict().items()}
        learner.gradients(number, images, labels)
        if learner.broken:
            scale, smoothing, rate = learner.scaler.get_scale(), learner.label_smoothing, learner.rate
            state = {"images": images, "labels": labels, "model": model, "rng": rng, "step": number, "config": config}
            state |= {
                "lr": rate,
                "scale": scale,
                "label_smoothing": smoothing,
                "dtype": learner.dtype,
                "device": str(images.device),
            }
            if rank() == 0:
                write_tensors(directory / FILE, state)
            learner.model.load_state_dict(model)
            return NotFinite(f"{describe(learner.model, state)}; `python -m vix.nonfinite {directory}` repeats it")
        learner.update()
    return NotFinite("a loss or gradient was not finite, but is when the steps since the last checkpoint are repeated")


def describe(model: nn.Module, state: dict[str, Any]) -> str:
    """Do a saved step's forward and backward again and say in which layer the first number was not finite."""
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:

            def note(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
                if not found and isinstance(output, Tensor) and not output.isfinite().all():
                    found.append(f"the output of {name} ({type(module).__name__})")

            handles.append(module.register_forward_hook(note))
    set_rng_state(state["rng"])
    device = state["images"].device.type
    with torch.autocast(device, dtype=state["dtype"], enabled=state["dtype"] is not torch.float32):
        loss = F.cross_entropy(model.train()(state["images"]), state["labels"], label_smoothing=state["label_smoothing"])
    if not found and not loss.isfinite():
        found.append("the loss")
    if not found:
        (loss * state["scale"]).backward()
        broken = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        found += [f"the gradient of {broken[-1]}"] if broken else ["no number of the repeated step"]
    for handle in handles:
        handle.remove()
    return (
        f"not finite at step {state['step']}: {found[0]} (loss {loss.item():.4g}, learning rate {state['lr']:.4g}, "
        f"scale {state['scale']:g})"
    )


def saved_device(name: str) -> torch.device:
    """The device that a step was saved on, or where this machine lacks it another one; set up as for training."""
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        name = "auto"
    return resolve_device(name)


def main() -> None:
    protect_output()
    parser = argparse.ArgumentParser(prog="python -m vix.nonfinite", description=__doc__)
    parser.add_argument("directory", type=user_path, help="directory of a run that stopped because a number was not finite")
    directory = parser.parse_args().directory
    if not (directory / FILE).is_file():
        sys.exit(f"error: {directory} holds no {FILE}: no step of a run there was not finite")
    use_given_cpus()
    state = torch.load(directory / FILE, map_location="cpu", weights_only=True)
    device = saved_device(state["device"])
    state |= {"images": state["images"].to(device), "labels": state["labels"].to(device)}
    model = vix.build_model(OmegaConf.create(state["config"]))
    model.load_state_dict(state["model"])
    print(describe(model.to(device), state))


if __name__ == "__main__":
    main()
