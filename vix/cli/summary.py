"""``python -m vix summary [group=option] [key=value] …``: layers of a model, with output shapes, parameters and FLOPs.

Accepts the arguments of ``train.py``. Reads no data: the model runs on PyTorch's meta device, which computes only shapes.
"""

import argparse
import sys

from vix.analysis.model_summary import Summary, summarize
from vix.build import parse
from vix.cli.errors import one_line_errors
from vix.composition.command import add_flags, expand_arguments, flags_from
from vix.composition.compose import compose_with_hydra, left_out_messages, naming_file
from vix.reporting.console import protect_output
from vix.reporting.table import Table

NOTE = """\
Each row includes the layers below it. Multiply-adds count matrix products and convolutions, and 2.5 n log₂ n for a Fourier
transform of n complex values, half of it for real ones; each is two FLOPs. Training is a forward and a backward pass,
without recomputation in fused kernels.
"""


def print_summary(summary: Summary) -> None:
    """Print the table of layers, and the totals."""
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
        ("checkpoint (weights)", f"{summary.checkpoint_mb * 1e6:,.0f} bytes"),
        ("forward pass per image", f"{summary.forward_flops / 1e9:.3f} GFLOPs"),
        ("training per image", f"{summary.training_flops / 1e9:.3f} GFLOPs"),
    ):
        print(f"{label:<40}{value:>18}")


def main() -> None:
    """The command."""
    protect_output()
    description = "Layers of a model, with output shapes, parameters and FLOPs."
    parser = argparse.ArgumentParser(prog="python -m vix summary", description=description)
    parser.add_argument("overrides", nargs="*", help="as for train.py: experiment=vin, model=pit, model.depth=6, …")
    add_flags(parser)
    parsed = parser.parse_intermixed_args(expand_arguments(sys.argv[1:]))
    overrides, flags = parsed.overrides, flags_from(parsed)
    with one_line_errors(overrides, flags):
        cfg = compose_with_hydra(overrides, flags)
        for note in left_out_messages(cfg.hydra):
            print(note)
        with naming_file(overrides, flags):
            print_summary(summarize(parse(cfg)))
