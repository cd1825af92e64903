"""``python -m vix cost RUN …`` or ``python -m vix cost [group=option] [key=value] …``: what a model costs in inference.

Measures latency, throughput and peak memory on this machine, compiled and not. The cost of a run is written to its
``cost.json``, which the report reads; that of a config, whose model is not trained, is printed.
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from vix.analysis.inference import inference_cost
from vix.analysis.model_summary import summarize
from vix.analysis.trained_run import separate
from vix.build import Experiment, for_inference, load_run, parse
from vix.cli.errors import error_of_run, one_line_errors
from vix.composition.command import Flags, add_flags, expand_arguments, flags_from
from vix.composition.compose import compose
from vix.errors import UserError
from vix.reporting.console import protect_output
from vix.reporting.table import Table
from vix.runs.identity import git_commit
from vix.runs.results import COST_FILE, Row
from vix.system.device import hardware, resolve_precision
from vix.system.files import out_file, write_json
from vix.system.threads import use_given_cpus

BATCH_SIZES = (1, 32, 64, 128)
VARIANTS = ("eager", "compiled")


def measure_cost(experiment: Experiment, model: nn.Module, options: argparse.Namespace) -> Row:
    """The contents of ``cost.json``.

    experiment, model: of the run.   options: of the command.
    """
    trainer = experiment.trainer
    summary = summarize(experiment)
    dtype = resolve_precision(trainer.precision, trainer.torch_device)
    eager = inference_cost(experiment, model, options.batches, options.seconds, compiled=False)
    variants = {"eager": eager}
    if options.compile:
        sizes = sorted({*options.batches, eager["best_batch_size"] or 1} if eager else options.batches)
        variants["compiled"] = inference_cost(experiment, model, sizes, options.seconds, compiled=True)
    return {
        **hardware(trainer.torch_device, dtype),
        "mirror_eval": trainer.mirror_eval,
        "torch": torch.__version__,
        "git_commit": git_commit(),
        "trainable_params": summary.trainable_params,
        "forward_flops": summary.forward_flops,
        "checkpoint_mb": summary.checkpoint_mb,
        **variants,
    }


def print_cost(title: str, cost: Row) -> None:
    """Print the costs as tables."""
    measured = {name: cost[name] for name in VARIANTS if cost.get(name)}
    lines = [
        (name, f"{row['batch_size']:,}", f"{row['images_per_second']:,.1f}", f"{row['peak_gb']:,.3f}")
        for name, variant in measured.items()
        for row in variant["batches"]
    ]
    Table(title, ("variant", "batch size", "images/s", "peak GB"), lines, words=1).print()
    for name, variant in measured.items():
        latency, p95 = variant["latency_ms"], variant["latency_p95_ms"]
        print(f"{f'latency of one image, {name}':<40}{f'{latency:,.2f} ms, 95th percentile {p95:,.2f} ms':>40}")
        if variant["best_batch_size"]:
            best = f"{variant['images_per_second']:,.1f} images/s at batch size {variant['best_batch_size']:,}"
            print(f"{f'throughput, {name}':<40}{best:>40}")
    mirror = [("each image and its mirror image", "trainer.mirror_eval")] if cost["mirror_eval"] else []
    for label, value in (
        *mirror,
        ("trainable parameters", f"{cost['trainable_params']:,}"),
        ("forward pass per image", f"{cost['forward_flops'] / 1e9:.3f} GFLOPs"),
        ("checkpoint (weights)", f"{cost['checkpoint_mb']:.2f} MB"),
        ("measured on", f"{cost['device']}, {cost['precision']}, {cost['threads']} CPU threads"),
    ):
        print(f"{label:<40}{value:>40}")
    print()


def cost_of_run(directory: Path, options: argparse.Namespace) -> None:
    """Measure and print the cost of a run, and write its ``cost.json``."""
    run = load_run(directory, device=options.device)
    cost = measure_cost(run.experiment, run.model, options)
    print_cost(str(directory), cost)
    write_json(directory / COST_FILE, cost)
    print(f"Written to {directory / COST_FILE}")


def cost_of_config(overrides: Sequence[str], flags: Flags, options: argparse.Namespace) -> None:
    """Measure and print the cost of a config's model, and write it to ``--out``."""
    experiment = parse(for_inference(compose(overrides, flags), options.device))
    torch.manual_seed(experiment.seed)
    cost = measure_cost(experiment, experiment.build_model(), options)
    print_cost(" ".join(overrides) or "the default config", cost)
    if options.out:
        write_json(options.out, cost)
        print(f"Written to {options.out}")


def batch_sizes(text: str) -> list[int]:
    """The ``type`` of ``--batches``: ascending batch sizes, separated by commas."""
    sizes = text.split(",")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text}: expected batch sizes such as 1,64")
    return sorted(set(map(int, sizes)))


def seconds(text: str) -> float:
    """The ``type`` of ``--seconds``: a number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of seconds")
    return number


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command."""
    description = "Latency, throughput and peak memory of a model in inference, compiled and not."
    parser = argparse.ArgumentParser(prog="python -m vix cost", description=description)
    parser.add_argument(
        "model",
        nargs="+",
        help="directories of runs, such as outputs/vin/seed=0; or overrides as for train.py: experiment=vin …",
    )
    add_flags(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--batches",
        type=batch_sizes,
        default=list(BATCH_SIZES),
        metavar="N,N,…",
        help=f"batch sizes; then doubled as long as throughput rises (default: {','.join(map(str, BATCH_SIZES))})",
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do not measure the compiled model")
    parser.add_argument("--seconds", type=seconds, default=2.0, help="time for each measurement (default: 2)")
    parser.add_argument("--out", type=out_file, metavar="FILE", help="JSON file to write, with overrides instead of runs")
    return parser.parse_intermixed_args(expand_arguments(arguments))


def main() -> None:
    """The command; exits with 1 where the cost of a run cannot be measured, after the others."""
    protect_output()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    options = parse_arguments(sys.argv[1:])
    directories, overrides = separate(options.model)
    flags = flags_from(options)
    use_given_cpus()
    with one_line_errors(overrides, flags, batches="--batches"):
        if overrides and directories:
            raise UserError("pass either directories of runs or overrides, not both; --device chooses the device")
        if overrides:
            cost_of_config(overrides, flags, options)
            return
        if options.out:
            raise UserError(f"--out {options.out}: the cost of a run is written to its {COST_FILE}")
        errors = []
        for directory in directories:
            try:
                cost_of_run(Path(directory), options)
            except UserError as error:
                errors.append(error_of_run(directory, error))
    if errors:
        sys.exit("\n".join(errors))
