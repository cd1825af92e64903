"""``python -m benchmarks.accuracy``: accuracy of the compact benchmark's runs against their time and memory.

Reads the finished runs of ``./sweep.sh compact hydra.sweep.dir=results/compact``, and the time and memory of a training step
that ``python -m benchmarks.compact --threads 1`` has measured; prints the table of docs/compact.md, and draws the picture
docs/accuracy.png.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from benchmarks.compact import NAMES
from benchmarks.record import errors_in_one_line
from vix.errors import UserError
from vix.reporting.plots import DPI, Cost, pareto_front, pareto_panel, png
from vix.reporting.table import Table
from vix.runs.results import find_runs, group_seeds
from vix.system.files import user_path

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "results/compact"
RECORD = ROOT / "benchmarks/results/compact-intel-xeon-processor-1-threads.json"
HEADS = ("mixer", "top-1 %, last epoch", "seeds", "seconds per epoch", "peak MB", "parameters", "Pareto front of")


class Trained(NamedTuple):
    """A mixer: accuracy in percent after the last epoch (mean and standard deviation over the seeds), and its costs.

    seconds: of the training steps of one epoch.
    megabytes: peak memory of a training step in addition to weights and optimizer state, in 10⁶ bytes.
    """

    mixer: str
    top1: float
    std: float | None
    seeds: int
    seconds: float
    megabytes: float
    parameters: int


def trained(directory: Path, record: Mapping[str, Any]) -> list[Trained]:
    """The mixers that were trained with the unchanged protocol and measured, by accuracy.

    directory: of the runs.   record: of ``python -m benchmarks.compact``.
    """
    costs = {row["mixer"]: row for row in record["rows"]}
    rows = []
    for group in group_seeds(find_runs([directory]))[0]:
        run = group.runs[0]
        mixer, top1 = str(run.results["attention"]), group.mean("top1")
        other = set(run.changes) - {f"attention={mixer}"}
        if run.experiment != "compact" or other or mixer not in costs or top1 is None:
            continue
        cost = costs[mixer]
        seconds, megabytes = run.results["train_images"] / cost["images_per_second"], cost["allocated"] / 1e6
        rows.append(Trained(mixer, top1, group.std("top1"), len(group.runs), seconds, megabytes, cost["parameters"]))
    return sorted(rows, key=lambda row: -row.top1)


def not_measured(directory: Path, record: Mapping[str, Any]) -> list[str]:
    """The mixers of runs of the protocol whose costs ``record`` lacks."""
    runs = [run for run in find_runs([directory]) if run.status == "finished" and run.experiment == "compact"]
    found = {str(run.results["attention"]) for run in runs}
    return sorted(found - {row["mixer"] for row in record["rows"]})


def table(rows: Sequence[Trained]) -> Table:
    """The table of docs/compact.md, by accuracy."""
    fast = pareto_front((row.seconds, row.top1) for row in rows)
    small = pareto_front((row.megabytes, row.top1) for row in rows)
    lines = [
        (
            row.mixer,
            f"{row.top1:.2f}" if row.std is None else f"{row.top1:.2f} ± {row.std:.2f}",
            str(row.seeds),
            f"{row.seconds:,.0f}",
            f"{row.megabytes:,.0f}",
            f"{row.parameters:,}",
            ", ".join(
                word
                for word, cost, front in (("time", row.seconds, fast), ("memory", row.megabytes, small))
                if (cost, row.top1) in front
            )
            or "–",
        )
        for row in rows
    ]
    return Table("The compact benchmark", HEADS, lines, 1)


def picture(rows: Sequence[Trained]) -> bytes:
    """PNG of accuracy, on an axis that is logarithmic in the error rate, against seconds per epoch, and against peak memory."""
    with rc_context({"font.size": 9}):
        figure = Figure((11, 5.6), DPI)
        panels = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.06, right=0.99, top=0.98, bottom=0.09, wspace=0.14)
        quantities = (("seconds", "seconds per epoch of 50,000 images"), ("megabytes", "peak memory of a training step, MB"))
        for axes, (quantity, label) in zip(panels, quantities, strict=True):
            axes.grid(alpha=0.25)
            axes.set_yscale("function", functions=(lambda top1: -np.log(101 - top1), lambda scaled: 101 - np.exp(-scaled)))
            axes.yaxis.set_major_locator(MultipleLocator(5))
            costs = [Cost(getattr(row, quantity), row.top1, row.std, row.mixer, row.mixer) for row in rows]
            pareto_panel(figure, axes, costs, label)
        return png(figure)


def main() -> None:
    """The command."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description="Accuracy against time and memory.")
    options.add_argument(
        "--runs", metavar="DIR", type=user_path, default=RUNS, help="folder of the runs (default: results/compact)"
    )
    options.add_argument(
        "--costs", type=user_path, default=RECORD, help="file of python -m benchmarks.compact (default: the kept one)"
    )
    default = "docs/accuracy.png for the kept runs, else DIR/accuracy.png"
    options.add_argument("--picture", type=user_path, help=f"PNG file to write (default: {default})")
    chosen = options.parse_args()
    folder = ROOT / "docs" if chosen.runs.resolve() == RUNS else chosen.runs
    if not chosen.costs.exists():
        raise UserError(f"{chosen.costs}: no such file; pass the one that python -m benchmarks.compact writes")
    record = json.loads(chosen.costs.read_text(encoding="utf-8"))
    rows = trained(chosen.runs, record)
    if not rows:
        raise UserError(f"{chosen.runs}: no finished run of ./sweep.sh compact that is measured in {chosen.costs}")
    print(table(rows).markdown())
    (chosen.picture or folder / "accuracy.png").write_bytes(picture(rows))
    absent = not_measured(chosen.runs, record)
    if absent:
        print(f"Trained, but not measured in {chosen.costs}: {', '.join(absent)}.")
    if missing := [name for name in NAMES if name not in {*absent, *(row.mixer for row in rows)}]:
        print(f"Not trained yet: {', '.join(missing)}.")


if __name__ == "__main__":
    errors_in_one_line(main)
