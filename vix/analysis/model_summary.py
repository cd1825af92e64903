"""Summary of a model: a table of its layers, and its parameters, FLOPs and sizes.

The model runs on PyTorch's meta device, which computes only shapes; on the CPU where a module reads values.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vix.analysis.paper_size import Call, Calls, paper_megabytes
from vix.build import Experiment
from vix.models.counts import Shape, flop_counter, parameter_counts, training_flops, without_values
from vix.runs.checkpoint import saved_megabytes


class Layer(NamedTuple):
    """A module that is called in the forward pass, including its submodules.

    name: path in the model; empty for the model itself.
    kind: name of the module's class.
    output: shape of its last output, for a batch of one image.
    parameters: number of trainable parameters.
    multiply_adds: multiply-adds of a forward pass of one image.
    """

    name: str
    kind: str
    output: Shape
    parameters: int
    multiply_adds: int


class Summary(NamedTuple):
    """A model's layers and totals.

    layers: the model itself, then its submodules, parents before children.
    trainable_params, weight_bias_params: parameter counts (:func:`vix.models.counts.parameter_counts`).
    paper_mb: size as printed in the paper, in MB of 2²⁰ bytes (:mod:`vix.analysis.paper_size`).
    checkpoint_mb: size of the saved weights, in MB of 10⁶ bytes.
    forward_flops, training_flops: FLOPs for one image of a forward pass, and of a forward and backward pass.
    """

    layers: list[Layer]
    trainable_params: int
    weight_bias_params: int
    paper_mb: float
    checkpoint_mb: float
    forward_flops: int
    training_flops: int


def summarize(experiment: Experiment) -> Summary:
    """Summarize the model of a config.

    experiment: the parsed config.

    Raises ConfigError where the model cannot be built.
    """
    model, data = experiment.build_model(), experiment.data
    counts, checkpoint_mb = parameter_counts(model), saved_megabytes(model.state_dict())
    image_shape = data.channels, data.image_size, data.image_size

    def trace(model: nn.Module, device: str) -> tuple[nn.Module, Calls, FlopCounterMode]:
        counter = flop_counter()
        with torch.no_grad(), recorded(model) as calls, counter:
            model.eval()(torch.zeros(1, *image_shape, device=device))
        return model, calls, counter

    model, calls, counter = without_values(trace, model)
    flops = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}

    def layer(name: str, module: nn.Module) -> Layer:
        path = f"{type(model).__name__}.{name}".rstrip(".")  # the name that the FLOP counter uses
        parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
        return Layer(name, type(module).__name__, calls[module][-1].output, parameters, flops.get(path, 0) // 2)

    called = [(name, m) for name, m in model.named_modules() if m in calls and not isinstance(m, nn.Identity)]

    return Summary(
        layers=[layer(*item) for item in called],
        paper_mb=paper_megabytes(model, calls, counts["weight_bias_params"]),
        checkpoint_mb=checkpoint_mb,
        forward_flops=counter.get_total_flops(),
        training_flops=training_flops(model, image_shape),
        **counts,
    )


@contextmanager
def recorded(model: nn.Module) -> Iterator[Calls]:
    """Context that records the input and output shapes of every call of the model's modules."""
    calls: defaultdict[nn.Module, list[Call]] = defaultdict(list)

    def record(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        calls[module].append(Call(first_shape(arguments), first_shape(output)))

    handles = [module.register_forward_hook(record) for module in model.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def first_shape(value: Any) -> Shape:
    """The shape of a tensor, or of the first one in a tuple, list or mapping; () where there is none."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next(filter(None, map(first_shape, parts)), ())
