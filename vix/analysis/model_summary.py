"""A model as a table of its layers, and what it costs: parameters, FLOPs and sizes.

The model runs on PyTorch's meta device, which works out shapes alone.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from vix.analysis.paper_size import Call, Calls, paper_megabytes
from vix.build import Experiment
from vix.models.counts import Shape, flop_counter, parameter_counts, training_flops
from vix.runs.checkpoint import saved_megabytes


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

    paper_mb is the size as the paper prints it (:mod:`vix.analysis.paper_size`, MB of 2²⁰ bytes); checkpoint_mb that of
    the weights as saved (MB of 10⁶ bytes); the FLOPs are for one image.
    """

    layers: list[Layer]
    trainable_params: int
    weight_bias_params: int
    paper_mb: float
    checkpoint_mb: float
    forward_flops: int
    training_flops: int


def summarize(experiment: Experiment) -> Summary:
    """The summary of the model that a composed config describes. Raises ConfigError."""
    model, data = experiment.build_model(), experiment.data
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
