"""Figure of ``benchmarks.scaling``: time and memory of forward passes and training steps over the number of tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from benchmarks.crossover import curve
from vix.reporting.plots import COLORS

PANELS = (("forward", "seconds"), ("training", "seconds"), ("forward", "bytes"), ("training", "bytes"))
AXES = {"seconds": ("milliseconds", 1e3), "bytes": ("peak memory, MB", 1e-6)}


def draw(points: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write the figure as PNG: one line per mixer, on logarithmic axes.

    points: measurements.   path: of the file.
    """
    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    sizes = sorted({p["tokens"] for p in points})
    mixers = list(dict.fromkeys(p["mixer"] for p in points))
    for axes, (name, quantity) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        unit, scale = AXES[quantity]
        for mixer in mixers:
            mine = curve(points, mixer, name, quantity)
            kind, _, explicit = mixer.partition("-")
            style = "--" if explicit else "-"
            axes.plot(list(mine), [v * scale for v in mine.values()], style, marker="o", ms=4, color=COLORS[kind], label=mixer)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit, title=name)
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)
