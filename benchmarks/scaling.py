"""``python -m benchmarks.scaling``: every mixer from 256 to 16,384 tokens, and from where on it beats fused softmax.

Each stands in a ViT of width 128 with 4 blocks and 4 heads; forward passes and training steps, time and peak memory. What
would take longer or more memory than allowed, by how the smaller sizes grew, is left out, and why is written down.
"""

import math
import os
import sys
from typing import Any

import torch

from benchmarks.crossover import growth, sentence
from benchmarks.isolated import Refused, isolated, processes
from benchmarks.record import chosen_device, errors_in_one_line, parser, write
from benchmarks.scaling_plot import draw
from benchmarks.variants import mixer_cost
from vix.errors import UserError
from vix.reporting.table import Table

# What is measured → the overrides that choose it. The first is what the others are compared with.
MIXERS: dict[str, tuple[str, ...]] = {
    "softmax": ("attention=softmax",),
    "softmax-explicit": ("attention=softmax", "attention.implementation=explicit"),
    "performer": ("attention=performer",),
    "linformer": ("attention=linformer",),
    "nystrom": ("attention=nystrom",),
    "linear": ("attention=linear",),
    "fourier": ("attention=fourier",),
    "token_mlp": ("attention=token_mlp",),
}
PASSES = ("forward", "training")


def expected(smaller: list[dict[str, Any]], tokens: int, quantity: str) -> float | None:
    """What the next size takes at most: the last one's, grown with the square of the tokens until two sizes tell how.

    The growth of the last two sizes, a little raised, because the parts that grow fastest weigh more the larger it is.
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
    """Why the next size is not tried, or None.

    Memory is what the process takes from the system, which is several times what its tensors do on a CPU.
    """
    time, memory = expected(smaller, tokens, "seconds"), expected(smaller, tokens, "taken")
    if time is not None and time > seconds:
        return f"a step would take about {time:.0f} s, more than {seconds:.0f} s"
    if memory is not None and memory > gigabytes * 1e9:
        return f"would take about {memory / 1e9:.1f} GB, more than {gigabytes:.1f} GB"
    return None


def print_table(points: list[dict[str, Any]], sizes: list[int], device: str) -> None:
    for name in PASSES:
        for quantity, unit, scale in (("seconds", "ms", 1e3), ("bytes", "peak MB", 1e-6)):
            lines = []
            for mixer in MIXERS:
                mine = {p["tokens"]: p for p in points if p["mixer"] == mixer and p["pass"] == name}
                cells = [f"{mine[n][quantity] * scale:,.1f}" if n in mine and mine[n][quantity] else "–" for n in sizes]
                grows = growth(points, mixer, name, quantity)
                if mine:
                    lines.append((mixer, *cells, "–" if grows is None else f"{grows:.1f}"))
            heads = ("mixer", *(f"{n:,} tokens" for n in sizes), "last, times")
            Table(f"{name}, {unit}, on {device}", heads, lines, 1).print()


def main() -> None:
    options = parser("python -m benchmarks.scaling", "Time and memory of every mixer over the number of tokens.")
    options.add_argument("--batch", type=int, help="images at a time (default: 1 on a CPU, 16 on a GPU)")
    options.add_argument("--tokens", type=int, nargs="+", help="squares of whole numbers (default: 256 1024 4096 16384)")
    options.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS), help="default: all")
    options.add_argument("--most-seconds", type=float, default=20.0, help="skip what takes longer a step (default: 20)")
    options.add_argument("--most-gb", type=float, help="skip what takes more memory (default: 80 %% of what is there)")
    chosen = options.parse_args()
    device = chosen_device(chosen.device)
    batch_size = chosen.batch or (16 if device.type == "cuda" else 1)
    sizes = sorted(chosen.tokens or ([16, 64, 256] if chosen.quick else [256, 1024, 4096, 16384]))
    if wrong := [n for n in sizes if math.isqrt(n) ** 2 != n]:
        raise UserError(f"--tokens {wrong[0]}: tokens are the pixels of a square image; 256, 1024 and 4096 are such numbers")
    gigabytes = chosen.most_gb or 0.8 * memory_of(device) / 1e9

    context = processes("benchmarks.variants")
    points: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for tokens in sizes:  # the mixers of one size follow one another: the same state of the machine for all
        for mixer in chosen.mixers:
            for name in PASSES:
                key = {"mixer": mixer, "pass": name, "tokens": tokens}
                smaller = [p for p in points if (p["mixer"], p["pass"]) == (mixer, name)]
                landmarks = (f"attention.landmarks={tokens}",) if mixer == "nystrom" and tokens < 64 else ()
                reason = too_much(smaller, tokens, chosen.most_seconds, gigabytes)
                if reason is None:
                    print(f"{tokens:,} tokens: {mixer}, {name}", file=sys.stderr)
                    arguments = (
                        MIXERS[mixer] + landmarks,
                        math.isqrt(tokens),
                        name == "training",
                        device,
                        batch_size,
                        chosen.quick,
                    )
                    try:
                        cost = isolated(context, chosen.threads, mixer_cost, *arguments, limit=60 + 10 * chosen.most_seconds)
                        taken = max(cost["allocated"], cost["reserved"] or 0, cost["resident"] or 0)
                        points.append({**key, **cost, "bytes": cost["allocated"], "taken": taken})
                    except Refused as refusal:
                        reason = str(refusal)
                if reason is not None:
                    skipped.append({**key, "reason": reason})
    told = [sentence(points, mixer, "softmax") for mixer in chosen.mixers if mixer != "softmax"]
    path = write("scaling", device, chosen, {"batch": batch_size, "points": points, "skipped": skipped, "sentences": told})
    draw(points, path.with_suffix(".png"), f"ViT of 4 blocks, width 128, batch {batch_size}, on {device.type}")
    print_table(points, sizes, str(device))
    print("\n".join(told))
    for gap in skipped:
        print(f"Not measured: {gap['mixer']}, {gap['pass']}, {gap['tokens']:,} tokens: {gap['reason']}")
    print(f"Written: {path} and {path.with_suffix('.png').name}")


def memory_of(device: torch.device) -> int:
    """Bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    errors_in_one_line(main)
