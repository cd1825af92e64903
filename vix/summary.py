"""``python -m vix.summary [group=option] [key=value] …``: a model as a table of its layers, and what it costs.

Takes what ``train.py`` takes, and reads no data. The model runs on PyTorch's meta device, which works out shapes alone.
"""

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import nn

from vix.build import build, build_model
from vix.checks import UserError
from vix.command_line import about_the_command, explain
from vix.compose import add_flags, compose_with_hydra, expand_arguments, flags_from, left_out
from vix.console import protect_output
from vix.flops import flop_counter, training_flops
from vix.papersize import Call, Calls, Shape, paper_megabytes
from vix.report import Table
from vix.run import parameter_counts, saved_megabytes

NOTE = """\
A row holds all that is in it. Multiply-adds are those of matrix products and convolutions, and 2.5 n log₂ n for a Fourier
transform of n values; each is two FLOPs. Training is a forward and a backward pass, without what fused kernels compute twice.
"""


class Layer(NamedTuple):
    """A module that a forward pass of one image calls, with all that is in it.

    name: its path in the model; the model itself has none.
    output: shape of what it last returned, with a batch of 1.
    """

    name: str
    kind: str
    output: Shape
    parameters: int
    multiply_adds: int


class Summary(NamedTuple):
    """A model's layers, from the whole to its parts, and its totals.

    paper_mb is the size as the paper prints it (:mod:`vix.papersize`, MB of 2²⁰ bytes); checkpoint_mb that of the weights as
    saved (MB of 10⁶ bytes); the FLOPs are for one image.
    """

    layers: list[Layer]
    trainable_params: int
    weight_bias_params: int
    paper_mb: float
    checkpoint_mb: float
    forward_flops: int
    training_flops: int


def summarise(cfg: DictConfig) -> Summary:
    """The summary of the model that a composed config describes. Raises ConfigError."""
    model, data = build_model(cfg), build(cfg, "data")
    counts, checkpoint_mb = parameter_counts(model), saved_megabytes(model.state_dict())
    model = model.to("meta")
    image_1CYX = torch.empty(1, data.channels, data.image_size, data.image_size, device="meta")

    counter = flop_counter()
    with torch.no_grad(), recorded(model) as calls, counter:
        model.eval()(image_1CYX)
    flops = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}

    def layer(name: str, module: nn.Module) -> Layer:
        path = f"{type(model).__name__}.{name}".rstrip(".")  # as the counter calls it
        parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
        return Layer(name, type(module).__name__, calls[module][-1].output, parameters, flops.get(path, 0) // 2)

    called = [(name, m) for name, m in model.named_modules() if m in calls and not isinstance(m, nn.Identity)]

    return Summary(
        layers=[layer(*item) for item in called],
        paper_mb=paper_megabytes(model, calls, counts["weight_bias_params"]),
        checkpoint_mb=checkpoint_mb,
        forward_flops=counter.get_total_flops(),
        training_flops=training_flops(model, image_1CYX.shape[1:]),
        **counts,
    )


@contextmanager
def recorded(model: nn.Module) -> Iterator[Calls]:
    """Shapes of the calls of all modules of the model while the context lasts."""
    calls: defaultdict[nn.Module, list[Call]] = defaultdict(list)

    def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        calls[module].append(Call(tuple(arguments[0].shape) if arguments else (), tuple(output.shape)))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def show(summary: Summary) -> None:
    """Print the table and the totals."""
    lines = []
    for layer in summary.layers:
        depth, name = layer.name.count(".") + bool(layer.name), layer.name.rpartition(".")[2]
        shape = "×".join(map(str, layer.output))
        label = "  " * depth + (f"{name}: " if name else "") + layer.kind
        lines.append((label, shape, f"{layer.parameters:,}", f"{layer.multiply_adds:,}"))
    Table("Layers", ("layer", "output", "parameters", "multiply-adds"), lines, words=1).print()
    print(NOTE)
    for label, value in (
        ("trainable parameters", f"{summary.trainable_params:,}"),
        ("weights and biases (the paper's count)", f"{summary.weight_bias_params:,}"),
        ("“size” as in the paper", f"{summary.paper_mb:.2f} MB"),
        ("checkpoint (the weights)", f"{summary.checkpoint_mb * 1e6:,.0f} bytes"),
        ("forward pass of an image", f"{summary.forward_flops / 1e9:.3f} GFLOPs"),
        ("training on an image", f"{summary.training_flops / 1e9:.3f} GFLOPs"),
    ):
        print(f"{label:<40}{value:>18}")


def main() -> None:
    protect_output()
    parser = argparse.ArgumentParser(
        prog="python -m vix.summary", description="A model as a table of its layers, and its cost."
    )
    parser.add_argument("overrides", nargs="*", help="what train.py takes: experiment=vin, model=pit, model.depth=6, …")
    add_flags(parser)
    parsed = parser.parse_intermixed_args(expand_arguments(sys.argv[1:]))
    overrides, flags = parsed.overrides, flags_from(parsed)
    try:
        cfg = compose_with_hydra(overrides, flags)
        for note in left_out(cfg.hydra):
            print(note)
        show(summarise(cfg))
    except Exception as error:
        wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") != "0"
        if wants_traceback or not (isinstance(error, UserError) or about_the_command(error)):
            raise
        sys.exit(f"error: {explain(error, overrides, flags)}")


if __name__ == "__main__":
    main()
