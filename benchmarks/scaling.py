"""``python -m benchmarks.scaling``: every mixer from 256 to 16,384 tokens, and the crossover with fused softmax attention.

Measures time and peak memory of forward passes and training steps of a ViT of width 128 with 4 blocks and 4 heads.
Measurements whose time or memory, extrapolated from smaller sizes, would exceed the limits are skipped; the results contain
the reason.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.crossover import curve, growth, sentence
from benchmarks.isolated import Refused, exit_with_errors, isolated, processes
from benchmarks.record import chosen_device, errors_in_one_line, parser, write
from benchmarks.scaling_plot import comparable, draw
from benchmarks.variants import mixer_cost
from vix.composition.command import CONFIG_DIR
from vix.errors import UserError
from vix.reporting.table import Table

# The mixers of the kept measurement, in the order of its tables. The attentions of LeViT and CvT are softmax attention.
ORDER = (
    *("softmax", "performer", "linformer", "nystrom", "linear", "agent", "latent", "external", "cross_covariance"),
    *("spatial_reduction", "window", "neighbourhood", "fourier", "global_filter", "token_mlp", "gating"),
    *("convolution", "focal", "mamba2", "pooling", "random", "identity"),
)
FURTHER = sorted({path.stem for path in (CONFIG_DIR / "attention").glob("*.yaml")} - {*ORDER, "levit", "cvt"})
# Name → overrides. The others are compared with the first.
MIXERS: dict[str, tuple[str, ...]] = {
    "softmax": ("attention=softmax",),
    "softmax-explicit": ("attention=softmax", "attention.implementation=explicit"),
    **{name: (f"attention={name}",) for name in (*ORDER[1:], *FURTHER)},
}
PASSES = ("forward", "training")


def expected(smaller: list[dict[str, Any]], tokens: int, quantity: str) -> float | None:
    """Upper estimate of a quantity at the next size, extrapolated from smaller sizes; None without measurements.

    smaller: measurements at smaller sizes, in order.   tokens: the next size.   quantity: seconds, bytes or taken.

    The exponent is that of the last two sizes plus 0.25, because the fastest-growing terms dominate at larger sizes; 2 where
    only one size is measured.
    """
    if not smaller or not smaller[-1][quantity]:
        return None
    last = smaller[-1]
    power = 2.0
    if len(smaller) > 1 and smaller[-2][quantity]:
        power = math.log(last[quantity] / smaller[-2][quantity]) / math.log(last["tokens"] / smaller[-2]["tokens"])
        power = min(2.0, max(1.0, power + 0.25))
    return last[quantity] * (tokens / last["tokens"]) ** power


def too_much(smaller: list[dict[str, Any]], tokens: int, seconds: float, gigabytes: float) -> str | None:
    """Why the next size is skipped, or None.

    seconds, gigabytes: limits; memory is that of the process, which on a CPU is several times that of its tensors.
    """
    time, memory = expected(smaller, tokens, "seconds"), expected(smaller, tokens, "taken")
    if time is not None and time > seconds:
        return f"a step would take about {time:.0f} s, more than {seconds:.0f} s"
    if memory is not None and memory > gigabytes * 1e9:
        return f"would take about {memory / 1e9:.1f} GB, more than {gigabytes:.1f} GB"
    return None


def tables(record: dict[str, Any]) -> list[Table]:
    """A table per pass and quantity: a row per mixer, a column per size, and the growth to the largest size."""
    points = record["points"]
    sizes, mixers = sorted({p["tokens"] for p in points}), dict.fromkeys(p["mixer"] for p in points)
    found = []
    for name in PASSES:
        for quantity, unit, scale in (("seconds", "ms", 1e3), ("bytes", "peak MB", 1e-6)):
            lines = []
            for mixer in mixers:
                mine = curve(points, mixer, name, quantity)
                cells = [f"{mine[n] * scale:,.1f}" if n in mine else "–" for n in sizes]
                grows = growth(points, mixer, name, quantity)
                lines.append((mixer, *cells, "–" if grows is None else f"{grows:.1f}"))
            heads = ("mixer", *(f"{n:,} tokens" for n in sizes), "growth")
            found.append(Table(f"{name}, {unit}, on {record['device']['name']}", heads, lines, 1))
    return found


def sentences(points: list[dict[str, Any]]) -> list[str]:
    """From how many tokens each mixer costs less than softmax attention."""
    mixers = dict.fromkeys(p["mixer"] for p in points)
    return [sentence(points, mixer, "softmax") for mixer in mixers if mixer != "softmax"]


def main() -> None:
    """The command."""
    options = parser("python -m benchmarks.scaling", "Time and memory of every mixer over the number of tokens.")
    options.add_argument("--batch", type=int, help="batch size (default: 1 on a CPU, 16 on a GPU)")
    options.add_argument("--tokens", type=int, nargs="+", help="squares of multiples of 8 (default: 256 1024 4096 16384)")
    options.add_argument(
        "--mixers",
        nargs="+",
        choices=MIXERS,
        default=list(MIXERS),
        metavar="MIXER",
        help=f"mixers (default: all): {', '.join(MIXERS)}",
    )
    options.add_argument("--most-seconds", type=float, default=20.0, help="skip slower steps (default: 20)")
    options.add_argument("--most-gb", type=float, help="skip steps that need more memory (default: 80 %% of the device's)")
    chosen = options.parse_args()
    device = chosen_device(chosen.device)
    batch_size = chosen.batch or (16 if device.type == "cuda" else 1)
    sizes = sorted(chosen.tokens or ([64, 256] if chosen.quick else [256, 1024, 4096, 16384]))
    if wrong := [n for n in sizes if math.isqrt(n) % 8 or math.isqrt(n) ** 2 != n]:  # 8: the side of windows
        raise UserError(f"--tokens {wrong[0]}: must be the square of a multiple of 8, such as 64, 256, 1024 or 4096")
    gigabytes = chosen.most_gb or 0.8 * memory_of(device) / 1e9

    context = processes("benchmarks.variants")
    points: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    errors: list[dict[str, Any]] = []
    for tokens in sizes:  # outer loop, so that one size of all mixers is measured in close succession
        for mixer in chosen.mixers:
            for name in PASSES:
                key = {"mixer": mixer, "pass": name, "tokens": tokens}
                smaller = [p for p in points if (p["mixer"], p["pass"]) == (mixer, name)]
                reason = too_much(smaller, tokens, chosen.most_seconds, gigabytes)
                if reason is not None:
                    skipped.append({**key, "reason": reason})
                    continue
                print(f"{tokens:,} tokens: {mixer}, {name}", file=sys.stderr)
                arguments = MIXERS[mixer], math.isqrt(tokens), name == "training", device, batch_size, chosen.quick
                try:
                    cost = isolated(context, chosen.threads, mixer_cost, *arguments, limit=60 + 10 * chosen.most_seconds)
                    taken = max(cost["allocated"], cost["reserved"] or 0, cost["resident"] or 0)
                    points.append({**key, **cost, "bytes": cost["allocated"], "taken": taken})
                except (Refused, RuntimeError) as refusal:  # an error in one mixer does not lose the others
                    (skipped if isinstance(refusal, Refused) else errors).append({**key, "reason": str(refusal)})
    record = {"batch": batch_size, "points": points, "skipped": skipped, "errors": errors, "sentences": sentences(points)}
    part = {*chosen.mixers} != {*MIXERS} or bool(chosen.tokens or chosen.batch)
    show(write("scaling", device, chosen, record, part))
    exit_with_errors(errors)


def show(path: Path) -> None:
    """Print what the file contains, and draw it where there is something to compare."""
    record = json.loads(path.read_text(encoding="utf-8"))
    for table in tables(record):
        table.print()
    print("\n".join(record["sentences"]))
    for gap in (*record["skipped"], *record.get("errors", ())):
        print(f"Not measured: {gap['mixer']}, {gap['pass']}, {gap['tokens']:,} tokens: {gap['reason']}")
    written = [str(path)]
    if comparable(record["points"]):
        draw(path)
        written.append(path.with_suffix(".png").name)
    print(f"Written: {' and '.join(written)}")


def memory_of(device: torch.device) -> int:
    """Bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    errors_in_one_line(main)
