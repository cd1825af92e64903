"""``python -m benchmarks``: training steps of ViTs with each mixer: ours, other packages', and the paper's training procedure.

All models have width 128, 4 blocks, 4 heads, MLP width 256, patches of 1 pixel, 1,024 tokens and 10 classes; ViT, ViP, ViL and
ViN have a class token as well. Every measurement runs in a new process. Rounds alternate the order of the variants, and a ratio
is the median over the rounds of the ratios within a round, so that other load on the machine affects both sides equally.
"""

import json
import statistics
import sys
from itertools import product
from typing import Any

from benchmarks.isolated import Refused, exit_with_errors, gap_kind, isolated, processes
from benchmarks.measure import ceilings
from benchmarks.record import chosen_device, errors_in_one_line, parser, write
from benchmarks.variants import KINDS, MODELS, ON_CPUS, ON_GPUS, OURS, THEIRS, step_cost
from vix.reporting.table import Table
from vix.system.device import resolve_precision

TITLES = {"vit": "ViT", "vip": "ViP", "vil": "ViL", "vin": "ViN"}  # the others have the names of their mixers
LIMIT = 900.0  # seconds for one measurement


def median_ratio(rounds: list[dict[str, Any]], above: str, below: str, quantity: str) -> float | None:
    """Median over the rounds of the ratio of one variant's quantity to another's."""
    pairs = [(r[above].get(quantity), r[below].get(quantity)) for r in rounds if above in r and below in r]
    ratios = [a / b for a, b in pairs if a and b]
    return statistics.median(ratios) if ratios else None


def geometric_mean(values: list[float | None]) -> float | None:
    """Geometric mean; None where a value is missing."""
    known = [value for value in values if value is not None]
    return statistics.geometric_mean(known) if known and len(known) == len(values) else None


def summarize(name: str, batch_size: int, rounds: list[dict[str, Any]], top: dict[str, float]) -> dict[str, Any]:
    """One model's measurements over all rounds, and the ratios of images per second and of memory (ours over theirs)."""
    row: dict[str, Any] = {"model": name, "batch": batch_size, "rounds": rounds}
    for kind in KINDS:
        costs = [r[kind] for r in rounds if kind in r]
        if not costs:
            continue
        # PyTorch does not count allocations of a replayed CUDA graph; the reserved memory includes its pool.
        allocated = "reserved" if kind in ON_GPUS else "allocated"
        seconds = statistics.median(c["seconds"] for c in costs)
        row[kind] = {
            "images_per_second": batch_size / seconds,
            "milliseconds": 1e3 * seconds,
            "peak_bytes": max(c[allocated] for c in costs),
            "peak_reserved_bytes": max((c["reserved"] for c in costs if c["reserved"]), default=None),
            "of_matmul_ceiling": costs[0]["flops"] / seconds / top["matmul"],
            "of_copy_ceiling": costs[0]["traffic_bytes"] / seconds / top["copy"],
        }
    for own, other in product(OURS, THEIRS):
        row[f"{own}_speed_over_{other}"] = median_ratio(rounds, other, own, "seconds")
        peak = "peak_reserved_bytes" if own in ON_GPUS else "peak_bytes"
        both = [row[kind][peak] for kind in (own, other) if kind in row]
        row[f"{own}_memory_over_{other}"] = both[0] / both[1] if len(both) == 2 else None
    return row


def summarize_all(results: dict[tuple[str, int], list[dict[str, Any]]], tops: list[dict[str, float]]) -> dict[str, Any]:
    """Median peak rates, a row per model and batch size, and the geometric means of the rows' ratios.

    results: (model, batch size) → the measurements of each round.   tops: the peak rates in each round.
    """
    top = {key: statistics.median(t[key] for t in tops) for key in tops[0]}
    rows = [summarize(*key, measured_rounds, top) for key, measured_rounds in results.items()]
    means = [
        {
            "model": "geometric mean",
            "batch": b,
            **{key: geometric_mean([r[key] for r in rows if r["batch"] == b]) for key in rows[0] if "_over_" in key},
        }
        for b in dict.fromkeys(batch_size for _, batch_size in results)
    ]
    return {"ceilings": top, "rows": rows, "means": means}


def tables(record: dict[str, Any]) -> list[Table]:
    """The table of ratios, and the table of measurements."""
    rows, means = record["rows"], record["means"]

    def times(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    ratios = ("speed_over_package", "memory_over_package", "speed_over_settings", "speed_over_paper", "memory_over_paper")
    over = Table(
        f"Ours over theirs, on {record['device']['name']}",
        (
            *("model", "variant", "batch", "images/s, package", "memory, package", "images/s, package with our settings"),
            *("images/s, paper's procedure", "memory, paper's procedure"),
        ),
        [
            (TITLES.get(r["model"], r["model"]), own, str(r["batch"]), *(times(r[f"{own}_{key}"]) for key in ratios))
            for own in OURS
            for r in [*rows, *means]
            if any(r[f"{own}_{key}"] for key in ratios)
        ],
        2,
    )
    steps = Table(
        "Training steps",
        ("model", "variant", "batch", "images/s", "ms", "peak GB", "reserved GB", "of matmul, %", "of copy, %"),
        [
            (
                *(TITLES.get(row["model"], row["model"]), kind, str(row["batch"])),
                *(f"{row[kind]['images_per_second']:.1f}", f"{row[kind]['milliseconds']:.2f}"),
                *(
                    "–" if row[kind][key] is None else f"{row[kind][key] / 1e9:.3f}"
                    for key in ("peak_bytes", "peak_reserved_bytes")
                ),
                *(f"{100 * row[kind][key]:.1f}" for key in ("of_matmul_ceiling", "of_copy_ceiling")),
            )
            for row in rows
            for kind in KINDS
            if kind in row
        ],
        2,
    )
    return [over, steps]


def main() -> None:
    """The command."""
    if sys.argv[1:2] == ["everything"]:
        from benchmarks.everything import main as everything

        everything(sys.argv[2:])
        return
    options = parser("python -m benchmarks", "Training steps: ours, other packages', and the paper's training procedure.")
    options.add_argument("--batch", type=int, nargs="+", help="images per step (default: 8 on a CPU, 64 and 256 on a GPU)")
    options.add_argument("--rounds", type=int, default=3, help="measurements of every variant (default: 3)")
    options.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=list(MODELS),
        metavar="MODEL",
        help=f"models (default: all): {', '.join(MODELS)}",
    )
    options.add_argument("--kinds", nargs="+", choices=KINDS, help="variants (default: all that the device supports)")
    chosen = options.parse_args()
    device = chosen_device(chosen.device)
    batches = chosen.batch or ([64, 256] if device.type == "cuda" else [8])
    rounds = 1 if chosen.quick else chosen.rounds
    import benchmarks.packages  # noqa: F401  # reports a missing package before the first measurement

    context = processes("benchmarks.packages", "benchmarks.variants")
    elsewhere = ON_CPUS if device.type == "cuda" else ON_GPUS
    part = bool(chosen.kinds or chosen.batch) or {*chosen.models} != {*MODELS}
    kinds = chosen.kinds or [kind for kind in KINDS if kind not in elsewhere]
    results: dict[tuple[str, int], list[dict[str, Any]]] = {(m, b): [] for b in batches for m in chosen.models}
    gaps: dict[str, list[dict[str, Any]]] = {"refused": [], "errors": []}
    tops = []
    for number in range(rounds):
        top = isolated(context, chosen.threads, ceilings, device, resolve_precision("auto", device), chosen.quick, limit=LIMIT)
        tops.append(top._asdict())
        order = [(*key, kind) for key in results for kind in kinds]
        for name, batch_size, kind in order if number % 2 == 0 else reversed(order):
            if len(results[name, batch_size]) == number:
                results[name, batch_size].append({})
            print(f"round {number + 1} of {rounds}: {name}, batch {batch_size}, {kind}", file=sys.stderr)
            try:
                cost = isolated(context, chosen.threads, step_cost, kind, name, device, batch_size, chosen.quick, limit=LIMIT)
                results[name, batch_size][number][kind] = cost
            except (Refused, RuntimeError) as reason:  # an error in one variant does not lose the others
                gap = {"model": name, "batch": batch_size, "kind": kind, "round": number, "reason": str(reason)}
                gaps[gap_kind(reason)].append(gap)
                print(f"  not measured: {reason}", file=sys.stderr)
            record = summarize_all(results, tops)
            # After each, so that none is lost.
            path = write("side-by-side", device, chosen, {**record, **gaps}, part=part)

    for table in tables(json.loads(path.read_text(encoding="utf-8"))):
        table.print()
    top = record["ceilings"]
    print(f"Ceilings: {top['matmul'] / 1e12:.2f} TFLOP/s for a matrix product, {top['copy'] / 1e9:.1f} GB/s for a copy")
    print(f"Written: {path}")
    exit_with_errors([*gaps["refused"], *gaps["errors"]])


if __name__ == "__main__":
    errors_in_one_line(main)
