"""``python -m benchmarks.compact``: training steps of the compact benchmark (conf/experiment/compact.yaml) with every mixer."""

import sys
from typing import Any

from benchmarks.isolated import Refused, exit_with_errors, gap_kind, isolated, processes
from benchmarks.record import chosen_device, errors_in_one_line, parser, write
from benchmarks.scaling import MIXERS
from benchmarks.variants import compact_step
from vix.reporting.table import Table

NAMES = [name for name in MIXERS if name != "softmax-explicit"]
IMAGES = 50_000  # of CIFAR-10, for the seconds per epoch


def tables(record: dict[str, Any]) -> list[Table]:
    """The table of a record, by speed."""
    rows = [
        (
            row["mixer"],
            f"{row['images_per_second']:.0f}",
            f"{IMAGES / row['images_per_second']:,.0f}",
            f"{row['allocated'] / 1e6:,.0f}",
            f"{row['parameters']:,}",
        )
        for row in sorted(record["rows"], key=lambda row: -row["images_per_second"])
    ]
    heads = ("mixer", "images/s", "seconds per epoch of steps", "peak MB of a step", "trainable")
    return [Table("Training steps of the compact benchmark", heads, rows, 1)]


def main() -> None:
    """The command."""
    options = parser("python -m benchmarks.compact", "Training steps of the compact benchmark with every mixer.")
    options.add_argument("--mixers", nargs="+", choices=NAMES, default=NAMES, metavar="MIXER", help="mixers (default: all)")
    chosen = options.parse_args()
    device = chosen_device(chosen.device)
    context = processes("benchmarks.variants")
    record: dict[str, Any] = {"rows": [], "refused": [], "errors": []}
    for mixer in chosen.mixers:
        print(f"compact: {mixer}", file=sys.stderr)
        try:
            cost = isolated(context, chosen.threads, compact_step, mixer, device, chosen.quick, limit=1800)
            record["rows"].append({"mixer": mixer, **cost})
        except (Refused, RuntimeError) as reason:  # an error in one mixer does not lose the others
            record[gap_kind(reason)].append({"mixer": mixer, "reason": str(reason)})
        path = write("compact", device, chosen, record, part={*chosen.mixers} != {*NAMES})
    for table in tables(record):
        table.print()
    for gap in (*record["refused"], *record["errors"]):
        print(f"Not measured: {gap['mixer']}: {gap['reason']}")
    print(f"Written: {path}")
    exit_with_errors(record["errors"])


if __name__ == "__main__":
    errors_in_one_line(main)
