"""Figures of the report: figure 4 of the paper, accuracy against cost, and learning curves.

matplotlib renders PNGs in memory, without a display. It is slow to import, so :mod:`vix.cli.report` imports this module only
when it writes files.
"""

import io
import itertools
import math
import statistics
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from vix.reporting.console import encodable
from vix.runs.results import Group, Row, shared_overrides

# The paper's colors: ViT red, ViX blue, hybrid ViT orange, hybrid ViX green.
FAMILIES = {"ViT": "tab:red", "ViX": "tab:blue", "Hybrid ViT": "tab:orange", "Hybrid ViX": "tab:green"}
# Experiments in the paper's figure 4 → family, label of the point.
FIGURE_4 = {
    "vit": ("ViT", "ViT"),
    "vip": ("ViX", "ViP"),
    "vil": ("ViX", "ViL"),
    "vin": ("ViX", "ViN"),
    "hybrid_vit": ("Hybrid ViT", "Hybrid ViT"),
    "hybrid_vip": ("Hybrid ViX", "Hybrid ViP"),
    "hybrid_vil": ("Hybrid ViX", "Hybrid ViL"),
    "hybrid_vin": ("Hybrid ViX", "Hybrid ViN"),
}
XFORMERS = ("performer", "linformer", "nystrom")
COLORS = {
    "softmax": "tab:red",
    "performer": "tab:blue",
    "linformer": "tab:purple",
    "nystrom": "tab:green",
    "linear": "tab:cyan",
    "fourier": "tab:orange",
    "token_mlp": "tab:brown",
}
OTHER = "tab:gray"
KINDS = {"levit": "softmax", "cvt": "softmax"}  # softmax attention with convolutions
# Column of the table → the word in the title, the axis label with its unit, and the divisor.
COSTS = {
    "trainable_params": ("parameters", "trainable parameters, millions", 1e6),
    "minutes": ("time", "training, evaluation and compilation, minutes", 1.0),
    "gpu_gb": ("memory", "peak GPU memory, GB", 1.0),
    "latency_ms": ("latency", "median latency of one image in inference, ms", 1.0),
    "inference_gb": ("inference memory", "peak memory in inference at batch size 64, GB", 1.0),
}
DPI = 130  # of the label placement and of the file: the size of text is not proportional to the resolution
MOST_LABELS = 40  # in addition to those of the Pareto front; more would be illegible
MOST_CURVES = 20  # ten colors with two line styles
LINES = ("-", "--")
SIDES = ((1, 0), (0, 1), (0, -1), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
# Candidate offsets from a point to the near side of its label, in points (1/72 inch): the nearest first.
OFFSETS = [(r * dx, r * dy) for r in (6, 12, 20, 30, 42, 56, 72, 90) for dx, dy in SIDES]
# Alignment of a label by the sign of its offset: index 0, 1, -1.
ACROSS = ("center", "left", "right")
UP = ("center", "bottom", "top")
Pixels = np.ndarray[Any, np.dtype[np.float64]]
Line = tuple[tuple[float, float], tuple[float, float]]  # start and end, in data coordinates


class Entry(NamedTuple):
    """A group with its row of the table and its label in the figures."""

    group: Group
    row: Row
    label: str


class Point(NamedTuple):
    """A labeled point, in data coordinates; labels of ``first`` points are placed before the others."""

    x: float
    y: float
    label: str
    color: str
    first: bool = False


@rc_context({"text.parse_math": False})  # dollar signs in names are text
def pictures(
    groups: Sequence[Group], rows: Sequence[Row], published: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[str, bytes]]:
    """All figures: file name → (title, PNG).

    rows: each group's row of the table.   published: the paper's rows by experiment.

    A figure without data is omitted; figure 4 always shows the published points.
    """
    common = shared_overrides(groups)
    labels = [encodable(group.name_without(common)) for group in groups]
    entries = [Entry(*entry) for entry in zip(groups, rows, labels, strict=True)]
    note = encodable(f"all: {' '.join(common)}") if common else ""
    with warnings.catch_warnings(action="ignore"):  # a character missing from the font is drawn as a box
        drawn = {
            "figure4.png": figure_4(entries, note, published),
            **{f"accuracy_{word.replace(' ', '_')}.png": pareto(entries, note, cost) for cost, (word, *_) in COSTS.items()},
            "learning_curves.png": learning_curves(entries, note),
        }
        return {name: (figure.get_suptitle(), png(figure)) for name, figure in drawn.items() if figure is not None}


def figure_4(entries: Iterable[Entry], note: str, published: Mapping[str, Mapping[str, str]]) -> Figure:
    """Accuracy against GPU memory for the paper's four families: hollow published points, and our filled ones."""
    figure, axes = new_figure("Accuracy against GPU memory (the paper's figure 4)", note)
    points: list[Point] = []
    lines: dict[Line, str] = {}
    ours: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    published_points: dict[str, tuple[float, float]] = {}
    for name, (family, label) in FIGURE_4.items():
        published_points[name] = float(published[name]["published_gpu_gb"]), float(published[name]["published_top1"])
        axes.plot(*published_points[name], "o", mfc="white", mec=FAMILIES[family], mew=1.6, ms=7, zorder=3)
        points.append(Point(*published_points[name], label, FAMILIES[family], first=True))
    for group, row, label in entries:
        run_family = family_of(group.best)
        if run_family is None or row["gpu_gb"] is None:
            continue
        x, y, color = row["gpu_gb"], row["best_top1"], FAMILIES[run_family]
        ours[color].append((x, y))
        published_point = published_points.get(group.runs[0].experiment)
        if group.published and published_point:
            lines[published_point, (x, y)] = color
        points.append(Point(x, y, label, color))
    for color, own_points in ours.items():
        axes.plot(*zip(*own_points, strict=True), "o", color=color, ms=7, zorder=4)
    axes.add_collection(LineCollection([*lines], colors=[*lines.values()], linestyles=":", linewidths=1, zorder=1))
    axes.margins(0.12)
    logarithmic(axes)
    axes.set_xlabel("peak GPU memory, GB (the paper's at batch 64)")
    axes.set_ylabel("top-1 accuracy of the best epoch, %")
    filled = "ours" if ours else "ours: no GPU measurements"
    handles = [dot(family, color) for family, color in FAMILIES.items()]
    legend(figure, [*handles, dot("published", "black", mfc="white", mew=1.6), dot(filled, "black")])
    put_labels(figure, axes, points, [*lines])
    return figure


def family_of(results: Row) -> str | None:
    """A run's family in figure 4; None where it is not a ViT or ViX on CIFAR-10 with learned position embeddings."""
    if (results.get("model"), results.get("data"), results.get("posenc")) != ("vit", "cifar10", "learned"):
        return None
    attention = results.get("attention")
    kind = "ViT" if attention == "softmax" else "ViX" if attention in XFORMERS else None
    embedding = {"linear": "", "conv": "Hybrid "}.get(str(results.get("embedding")))
    return None if kind is None or embedding is None else embedding + kind


def pareto(entries: Iterable[Entry], note: str, cost: str) -> Figure | None:
    """Accuracy of the last epoch (mean ± standard deviation) against one of COSTS, with the Pareto front.

    None where no group has this cost.
    """
    word, axis, unit = COSTS[cost]
    measured = [
        Cost(row[cost] / unit, row["top1"], row["top1_std"], label, str(group.best.get("attention")))
        for group, row, label in entries
        if row[cost]
    ]
    if not measured:
        return None
    figure, axes = new_figure(f"Accuracy against {word}", note)
    kinds = pareto_panel(figure, axes, measured, axis)
    handles = [dot(kind, COLORS.get(kind, OTHER)) for kind in kinds]
    legend(figure, [*handles, Line2D([], [], color="black", alpha=0.6, label="Pareto front")])
    return figure


class Cost(NamedTuple):
    """A point of :func:`pareto_panel`: cost, accuracy in percent and its standard deviation, label, and token mixer."""

    cost: float
    top1: float
    std: float | None
    label: str
    mixer: str


def pareto_panel(figure: Figure, axes: Axes, measured: Sequence[Cost], axis: str) -> list[str]:
    """Draw accuracy (mean ± standard deviation) against cost, with labels and the Pareto front.

    measured: at least one point.   axis: label of the x axis.

    Returns the mixers whose colors occur, with ``other`` for all that have none of their own.
    """
    front = pareto_front((cost, top1) for cost, top1, *_ in measured)
    points: list[Point] = []
    lines: list[Line] = []
    bars: defaultdict[str, list[tuple[float, float, float]]] = defaultdict(list)  # keyed by the color's meaning
    for x, y, std, label, mixer in measured:
        kind = KINDS.get(mixer, mixer)
        bars[kind if kind in COLORS else "other"].append((x, y, math.nan if std is None else std))
        lines.append(((x, y - (std or 0.0)), (x, y + (std or 0.0))))
        points.append(Point(x, y, label, COLORS.get(kind, OTHER), first=(x, y) in front))
    for kind, bar in bars.items():
        x_values, y_values, stds = zip(*bar, strict=True)
        axes.errorbar(x_values, y_values, stds, fmt="o", color=COLORS.get(kind, OTHER), ms=6, capsize=3, lw=1, zorder=3)
    axes.margins(0.12)
    logarithmic(axes)
    # The front is extended to the right edge at its best accuracy.
    left, right = axes.get_xlim()
    corners = [front[0]]
    for x, y in [*front[1:], (right, front[-1][1])]:
        corners += [(x, corners[-1][1]), (x, y)]
    lines += itertools.pairwise(corners)
    axes.plot(*zip(*corners, strict=True), color="black", lw=1, alpha=0.6, zorder=1)
    axes.set_xlim(left, right)
    axes.set_xlabel(axis)
    axes.set_ylabel("top-1 accuracy of the last epoch, %")
    put_labels(figure, axes, points, lines)
    return [*bars]


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto-optimal (cost, accuracy) points, by increasing cost."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def learning_curves(entries: Sequence[Entry], note: str) -> Figure | None:
    """Training loss and accuracy per epoch: the mean over a group's seeds, with a band of ± one standard deviation.

    Where seeds ended early, the mean is over those that reached an epoch, and the band ends where only one is left.

    None where no run has a history.
    """
    logged = [entry for entry in entries if all(curve(run.results, "top1") for run in entry.group.runs)]
    if not logged:
        return None
    shown = sorted(logged, key=lambda entry: -entry.row["top1"])[:MOST_CURVES]
    if len(shown) < len(logged):
        note = f"the {len(shown)} best of {len(logged)}{', ' if note else ''}{note}"
    figure = Figure((12, 5), DPI)
    panels = figure.subplots(1, 2)
    headings(figure, "Learning curves", note)
    handles = []
    for i, (group, _, label) in enumerate(shown):
        color, line = f"C{i % 10}", LINES[i // 10]
        for axes, key in zip(panels, ("train_loss", "top1"), strict=True):
            means, stds = mean_curve([curve(run.results, key) for run in group.runs])
            epochs = range(1, len(means) + 1)
            axes.plot(epochs, means, lw=1.5, marker="o" if len(means) < 4 else None, ms=4, color=color, ls=line)
            low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
            axes.fill_between(epochs, low, high, color=color, alpha=0.15, lw=0)
        text = textwrap.fill(label, 36)
        # matplotlib omits labels that begin with an underscore from a legend.
        handles.append(Line2D([], [], label=f" {text}" if text.startswith("_") else text, color=color, ls=line))
    for axes, quantity in zip(panels, ("training loss, nats", "top-1 accuracy of the evaluated images, %"), strict=True):
        axes.set_xlabel("epoch")
        axes.set_ylabel(quantity)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    legend(figure, handles)
    return figure


def mean_curve(curves: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Mean and sample standard deviation of curves at every point that one of them has; NaN for the deviation of one value."""
    values = [[value for value in point if value is not None] for point in itertools.zip_longest(*curves)]
    deviations = [statistics.stdev(point) if len(point) > 1 else math.nan for point in values]
    return [statistics.fmean(point) for point in values], deviations


def curve(results: Row, key: str) -> list[float]:
    """A column of a run's history, up to the first value that is not a number (an overflowed loss is null)."""
    values = []
    for epoch in results["history"]:
        if not isinstance(epoch.get(key), int | float):
            break
        values.append(epoch[key])
    return values


def new_figure(title: str, note: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, a title and a note."""
    figure = Figure((9, 5.5), DPI)
    axes = figure.subplots()
    headings(figure, title, note)
    axes.grid(alpha=0.25)
    return figure, axes


def headings(figure: Figure, title: str, note: str) -> None:
    """A title, and a note below it."""
    figure.suptitle(title, fontweight="bold")
    figure.text(0.5, 0.93, textwrap.shorten(note, 120, placeholder=" …"), ha="center", va="top", size=8, color="dimgray")
    figure.subplots_adjust(top=0.88, left=0.08)


def legend(figure: Figure, handles: list[Line2D]) -> None:
    """A legend to the right of the axes; ``png`` widens the figure for it."""
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.91, 0.88), frameon=False, fontsize=8)


def dot(label: str, color: str, **style: Any) -> Line2D:
    """A legend entry with a point."""
    return Line2D([], [], ls="", marker="o", color=color, label=label, **style)


def logarithmic(axes: Axes) -> None:
    """A logarithmic x axis with plain numbers; narrow ranges get more ticks, so that there are always some."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = (1.0,) if high > 1000 * low else (1.0, 2.0, 5.0) if high > 5 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axes.xaxis.set_major_locator(LogLocator(10, subs=steps))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.4g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def put_labels(figure: Figure, axes: Axes, points: Sequence[Point], lines: Sequence[Line]) -> None:
    """Place each point's label where it overlaps no point, no other label and, if possible, no line; draw a leader line to it.

    points, lines: in data coordinates.

    Labels without a free position are omitted; ``first`` points come first, then those with a color of their own.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # fixes the pixels
    frame = axes.get_window_extent()
    to_pixels = axes.transData.transform
    pixels = to_pixels([(point.x, point.y) for point in points])
    solid = np.concatenate([pixels - 7, pixels + 7], axis=1)  # rows of x0, y0, x1, y1
    thin = np.concatenate([np.empty((0, 4)), *(along(*to_pixels(line)) for line in lines)])
    leaders: list[tuple[Pixels, Pixels]] = []
    leader_colors: list[str] = []
    order = sorted(range(len(points)), key=lambda i: (not points[i].first, points[i].color == OTHER))
    for i in order[: sum(point.first for point in points) + MOST_LABELS]:
        x, y, text, color, _ = points[i]
        label = axes.annotate(
            textwrap.fill(text, 30),
            (x, y),
            xytext=OFFSETS[0],
            textcoords="offset points",
            fontsize=7.5,
            color=color,
            zorder=5,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )
        size = np.array(label.get_window_extent(renderer).size)
        # The near side or corner is at the offset; the lower left corner is 0, 1/2 or 1 label size below or left of it.
        near = pixels[i] + np.array(OFFSETS) * figure.dpi / 72
        low = near + size * (np.sign(OFFSETS) - 1) / 2
        boxes = np.concatenate([low, low + size], axis=1)
        free = (low > frame.min).all(axis=1) & (low + size < frame.max).all(axis=1) & ~overlap(boxes, solid)
        others, labels = np.delete(solid[: len(points)], i, 0), solid[len(points) :]
        places = dict.fromkeys([*np.flatnonzero(free & ~overlap(boxes, thin)), *np.flatnonzero(free)])
        chosen = None
        for k in places:
            leader = along(pixels[i], near[k])
            if not overlap(leader, labels).any():
                if not overlap(leader, others).any():
                    chosen = k
                    break
                # Leaders cross points, which often lie close together, only where there is no other place.
                chosen = k if chosen is None else chosen
        if chosen is None:
            label.remove()
            continue
        dx, dy = OFFSETS[chosen]
        label.set(position=(dx, dy), ha=ACROSS[np.sign(dx)], va=UP[np.sign(dy)])
        solid = np.concatenate([solid, boxes[chosen : chosen + 1], along(pixels[i], near[chosen])])
        if chosen >= len(SIDES):  # labels next to their point need no leader
            leaders.append((near[chosen], pixels[i]))
            leader_colors.append(color)
    # One artist for all leaders: an arrow per label would take most of the report's time.
    ends = [axes.transData.inverted().transform((start, end)) for start, end in leaders]
    axes.add_collection(LineCollection(ends, colors=leader_colors, linewidths=0.5, zorder=2), autolim=False)


def along(start: Pixels, end: Pixels) -> Pixels:
    """Boxes that cover the line between two pixels: a row of small boxes, or one box for a vertical or horizontal line."""
    if (start == end).any():
        return np.concatenate([np.minimum(start, end) - 1, np.maximum(start, end) + 1])[None]
    middles = np.linspace(start, end, 2 + int(np.hypot(*(end - start)) / 4))
    return np.concatenate([middles - 1, middles + 1], axis=1)


def overlap(boxes: Pixels, others: Pixels) -> Any:
    """For each box (x0, y0, x1, y1), whether it overlaps any of the others."""
    left, low, right, high = boxes.T[:, :, None]
    return ((others[:, 0] < right) & (others[:, 1] < high) & (others[:, 2] > left) & (others[:, 3] > low)).any(axis=1)


def png(figure: Figure) -> bytes:
    """A figure as PNG, widened to include the legends."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    # bbox_inches="tight" would draw everything twice to determine the size.
    whole = Bbox.union([figure.bbox, *(legend.get_window_extent(renderer).padded(10) for legend in figure.legends)])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches=Bbox(whole.get_points() / figure.dpi))
    return buffer.getvalue()
