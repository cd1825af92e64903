"""``python -m vix replay RUN``: repeat the step whose loss or gradient was not finite, and name the first such layer."""

import argparse
from pathlib import Path

import torch
from omegaconf import OmegaConf

import vix
from vix.build import load_weights
from vix.cli.errors import one_line_errors
from vix.errors import UserError, permission_errors
from vix.layers.checkpointing import set_activation_checkpointing
from vix.reporting.console import protect_output
from vix.runs.checkpoint import read_tensors
from vix.system.device import resolve_device
from vix.system.files import user_path
from vix.system.threads import use_given_cpus
from vix.training.nonfinite import FILE, STEP, locate_layer


def saved_device(name: str) -> torch.device:
    """The device on which a step was saved, or ``auto`` where this machine lacks it; set up as for training."""
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        name = "auto"
    return resolve_device(name)


def main() -> None:
    """The command."""
    protect_output()
    parser = argparse.ArgumentParser(prog="python -m vix replay", description=__doc__)
    parser.add_argument("directory", type=user_path, help="directory of a run that stopped at a non-finite loss or gradient")
    directory = parser.parse_args().directory
    use_given_cpus()
    with one_line_errors((), batches=""):
        print(repeat_step(directory))


@permission_errors()
def repeat_step(directory: Path) -> str:
    """Repeat the step saved in a run's directory, on the device and with the activation checkpointing of the run.

    Raises UserError where there is none.
    """
    if not (directory / FILE).is_file():
        raise UserError(f"{directory} contains no {FILE}: no run in it stopped at a non-finite loss or gradient")
    state = read_tensors(directory / FILE, STEP)
    device = saved_device(state["device"])
    tensors = ("images", "labels", "class_weights")
    state |= {name: state[name].to(device) for name in tensors if state.get(name) is not None}
    model = load_weights(vix.build_model(OmegaConf.create(state["config"])), state["model"], directory / FILE)
    set_activation_checkpointing(model, state["config"]["trainer"].get("activation_checkpointing"))
    return locate_layer(model.to(device), state)
