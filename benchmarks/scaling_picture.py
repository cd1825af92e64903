"""``python -m benchmarks.scaling_picture``: docs/scaling.png, time and memory of a training step over the number of tokens.

Draws the kept measurement of ``python -m benchmarks.scaling``.
"""

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from benchmarks.crossover import curve
from vix.reporting.plots import COLORS

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks/results/scaling-intel-xeon-processor-2-threads.json"
LABELS = {
    "softmax": "softmax",
    "softmax-explicit": "softmax, N×N matrix stored",
    "performer": "Performer",
    "linformer": "Linformer",
    "nystrom": "Nyströmformer",
    "linear": "linear attention",
    "fourier": "FNet",
    "token_mlp": "MLP-Mixer",
}
PANELS = (("seconds", "ms per training step", 1e3), ("bytes", "peak memory of a training step, MB", 1e-6))


def draw(path: Path) -> None:
    """Write the PNG: one line per mixer, logarithmic axes."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    points, device = record["points"], record["device"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"ViT with 4 blocks, width 128, {record['batch']} image, {device['name']}, {device['threads']} threads")
    for axes, (quantity, label, scale) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for mixer, name in LABELS.items():
            measured = curve(points, mixer, "training", quantity)
            kind, _, explicit = mixer.partition("-")
            values = [value * scale for value in measured.values()]
            style = "--" if explicit else "-"
            axes.plot(list(measured), values, style, marker="o", ms=4, color=COLORS[kind], label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.xaxis.set_major_locator(FixedLocator(sorted({point["tokens"] for point in points})))
        axes.xaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    draw(ROOT / "docs/scaling.png")
