"""``python -m benchmarks.rows``: time and peak memory of a training step of every published row, next to the paper's memory.

A step is that of ``python train.py experiment=ROW``: batch size 64, and all tokens of the row. All rows are measured in one
process. The table also has the estimate of ``python -m vix plan``, which needs neither the measurement nor a GPU.
"""

import gc
import json
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.compact import IMAGES
from benchmarks.isolated import exit_with_errors
from benchmarks.record import chosen_device, errors_in_one_line, parser, write
from benchmarks.steps import composed, ours
from vix.analysis.cost import training_memory
from vix.analysis.measure import measure
from vix.build import parse
from vix.cli.plan import ABSENT_GPU, choose_device
from vix.errors import UserError
from vix.reporting.table import Table
from vix.runs.results import published_rows
from vix.system.files import user_path
from vix.system.memory import out_of_memory

KINDS = {"plain": "false", "compiled": "true", "graphs": "cuda_graphs"}  # values of trainer.compile


def row_cost(row: str, device: torch.device, batch_size: int, kind: str, seconds: float) -> dict[str, Any]:
    """Cost of a row's training step.   kind: of KINDS.   seconds: total time of the repeats."""
    overrides = (f"experiment={row}", f"trainer.compile={KINDS[kind]}")
    cost = measure(ours(overrides, device, batch_size).step, device, seconds)
    gc.collect()
    return cost._asdict()


@cache
def estimated_bytes(row: str, device: str, batch_size: int) -> int:
    """Estimated peak bytes of a row's training step on a ``cpu`` or a ``cuda`` GPU, which this machine need not have."""
    cfg = composed(f"experiment={row}", f"trainer.batch_size={batch_size}")
    absent = choose_device(cfg, device)
    return training_memory(parse(cfg), ABSENT_GPU if absent else None)


def tables(record: dict[str, Any]) -> list[Table]:
    """The table of a record: a line per row."""
    batch_size, device = record["batch"], record["device"]
    published = published_rows()
    kinds = [kind for kind in KINDS if any(kind in costs for costs in record["rows"].values())] or ["plain"]

    def digits(cost: dict[str, Any] | None, key: str, scale: float, places: int) -> str:
        return f"{cost[key] * scale:,.{places}f}" if cost else "–"

    lines = []
    for row, costs in record["rows"].items():
        cells = [digits(costs.get(kind), "seconds", 1e3, 1) for kind in kinds]
        cells += [digits(costs.get(kinds[0]), "seconds", IMAGES / batch_size, 0)]
        # PyTorch does not count allocations of a replayed CUDA graph; the reserved memory includes its pool.
        cells += [digits(costs.get(kind), "reserved" if kind == "graphs" else "allocated", 1e-9, 2) for kind in kinds]
        estimate = estimated_bytes(row, device["type"], batch_size)
        lines.append((row, *cells, f"{estimate / 1e9:.2f}", published[row]["published_gpu_gb"]))
    heads = (
        *("row", *(f"ms, {kind}" for kind in kinds), "s per epoch"),
        *(*(f"GB, {kind}" for kind in kinds), "GB, estimated", "GB, the paper's"),
    )
    return [Table(f"Training steps of the published rows, batch size {batch_size}, on {device['name']}", heads, lines, 1)]


def show(path: Path) -> None:
    """Print the table of a kept record. Raises UserError where there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--show {path}: {error.strerror}; pass a file that python -m benchmarks.rows wrote") from error
    for table in tables(record):
        table.print()
    for gap in (*record["refused"], *record.get("errors", ())):
        print(f"not measured: {gap['row']}, {gap['kind']}: {gap['reason']}")


def main() -> None:
    """The command."""
    every = list(published_rows())
    options = parser("python -m benchmarks.rows", "Training steps of the published rows.")
    options.add_argument("--batch", type=int, help="images per step (default: 64, the paper's; 2 with --quick)")
    options.add_argument("--rows", nargs="+", choices=every, default=every, metavar="ROW", help="rows (default: all)")
    options.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=["plain"], help="not compiled, compiled, with CUDA graphs (default: plain)"
    )
    options.add_argument("--show", type=user_path, metavar="FILE", help="print the table of an earlier measurement")
    chosen = options.parse_args()
    if chosen.show:
        show(chosen.show)
        return
    device = chosen_device(chosen.device)
    torch.set_num_threads(chosen.threads)
    batch_size = chosen.batch or (2 if chosen.quick else 64)
    rows: dict[str, Any] = {row: {} for row in chosen.rows}
    refused: list[dict[str, str]] = []
    errors: list[dict[str, str]] = []
    for row, kind in product(chosen.rows, chosen.kinds):
        print(f"{row}, {kind}", file=sys.stderr)
        try:
            rows[row][kind] = row_cost(row, device, batch_size, kind, 0.02 if chosen.quick else 1.0)
        except (RuntimeError, UserError) as error:  # an error in one row does not lose the others
            memory = out_of_memory(error)
            gap = {"row": row, "kind": kind, "reason": "out of memory" if memory else str(error).partition("\n")[0]}
            (refused if memory or isinstance(error, UserError) else errors).append(gap)
        part = {*chosen.rows} != {*every} or "plain" not in chosen.kinds or bool(chosen.batch)
        record = {"batch": batch_size, "rows": rows, "refused": refused, "errors": errors}
        path = write("rows", device, chosen, record, part=part)  # so that none is lost
    show(path)
    print(f"Written: {path}")
    exit_with_errors(errors)


if __name__ == "__main__":
    errors_in_one_line(main)
