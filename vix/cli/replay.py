"""``python -m vix replay RUN``: repeat the step whose loss or gradient was not finite, and name the first such layer."""

import argparse
import sys

import torch
from omegaconf import OmegaConf

import vix
from vix.build import load_weights
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
    if not (directory / FILE).is_file():
        sys.exit(f"error: {directory} contains no {FILE}: no run in it stopped at a non-finite loss or gradient")
    use_given_cpus()
    state = read_tensors(directory / FILE, STEP)
    device = saved_device(state["device"])
    state |= {"images": state["images"].to(device), "labels": state["labels"].to(device)}
    model = load_weights(vix.build_model(OmegaConf.create(state["config"])), state["model"], directory / FILE)
    print(locate_layer(model.to(device), state))
