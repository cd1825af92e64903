"""Figure of ``benchmarks.scaling``: every mixer's time and memory over the number of tokens, relative to softmax attention."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.crossover import Point, crossover, curve

COLUMNS = 6
QUANTITIES = {"seconds": ("time", "tab:blue"), "bytes": ("memory", "tab:orange")}


REFERENCE = "softmax"


def comparable(points: Sequence[Point]) -> bool:
    """Whether there is something to draw: points of softmax attention, and of another mixer."""
    mixers = {point["mixer"] for point in points}
    return REFERENCE in mixers and len(mixers) > 1


def draw(record: Path, path: Path | None = None) -> None:
    """Draw the JSON file of ``benchmarks.scaling``, whose points are :func:`comparable`.

    path: of the PNG; by default next to the JSON file, with its name.
    """
    measured = json.loads(record.read_text(encoding="utf-8"))
    points, device = measured["points"], measured["device"]
    mixers = [mixer for mixer in dict.fromkeys(point["mixer"] for point in points) if mixer != REFERENCE]
    rows = max(1, math.ceil(len(mixers) / COLUMNS))
    figure = Figure(figsize=(12, 0.9 + 1.75 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    threads = "" if device["type"] == "cuda" else f", {device['threads']} threads"
    figure.suptitle(
        f"A training step over the number of tokens, relative to fused softmax attention (below 1: better)\n"
        f"ViT with 4 blocks, width 128, batch size {measured['batch']}, {device['name']}{threads}",
        fontsize=11,
    )
    panels = list(figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flat)
    for axes, mixer in zip(panels, mixers, strict=False):
        panel(axes, points, mixer)
    for axes in panels[len(mixers) :]:
        axes.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path or record.with_suffix(".png"), dpi=110)


def panel(axes: Axes, points: Sequence[Point], mixer: str) -> None:
    """One mixer's ratios; a vertical line shows from how many tokens it trains faster."""
    for quantity, (label, color) in QUANTITIES.items():
        mine, other = (curve(points, name, "training", quantity) for name in (mixer, REFERENCE))
        sizes = sorted(mine.keys() & other.keys())
        axes.plot(sizes, [mine[n] / other[n] for n in sizes], marker="o", ms=3, lw=1.5, color=color, label=label)
        where = crossover(mine, other)
        if quantity == "seconds" and where:
            axes.axvline(where, color=color, lw=0.8, ls=":")
            axes.annotate(
                f"{float(f'{where:.2g}'):,.0f}", (where, 1), (3, 3), textcoords="offset points", fontsize=7, color=color
            )
    axes.axhline(1, color="black", lw=0.8)
    axes.set(xscale="log", yscale="log")
    axes.set_title(mixer, fontsize=9)
    axes.xaxis.set_major_locator(FixedLocator(sorted({point["tokens"] for point in points})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(FixedLocator([0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)


def thousands(value: float, position: Any = None) -> str:
    """256, 1k, 4k, 16k: the number of tokens, short enough for a small panel."""
    return f"{value:.0f}" if value < 1024 else f"{value / 1024:.0f}k"
