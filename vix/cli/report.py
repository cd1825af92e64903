"""``python -m vix report [DIR …]``: what the runs below some directories reached and cost, beside the paper's figures.

Reads each run's ``results.json`` and nothing else, and never imports torch: 1,000 runs take about a second.
"""

import argparse
import csv
import difflib
import io
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vix.errors import UserError
from vix.reporting.console import protect_output
from vix.reporting.table import Table
from vix.runs.results import Group, Row, RunRecord, filter_runs, find_runs, group_seeds, join_names, published_rows
from vix.system.files import atomic_write, user_path


class Column(NamedTuple):
    """How a column of numbers looks: its head in a table, decimals, and whether a plus sign is written."""

    head: str
    digits: int = 0
    signed: bool = False


# What --sort takes and report.csv holds, in this order.
COLUMNS = {
    "experiment": Column("experiment"),
    "seeds": Column("seeds"),
    "epochs": Column("epochs"),
    "top1": Column("top-1 %\nlast epoch", 2),
    "top1_std": Column("±", 2),
    "top5": Column("top-5 %\nlast epoch", 2),
    "top5_std": Column("±", 2),
    "best_top1": Column("top-1 %\nbest of all", 2),
    "best_top5": Column("top-5 %\nsame epoch", 2),
    "weight_bias_params": Column("weights\nand biases"),
    "trainable_params": Column("trainable\nparameters"),
    "checkpoint_mb": Column("weights\nMB", 2),
    "gpu_gb": Column("peak\nGPU GB", 2),
    "gpu_reserved_gb": Column("reserved\nGPU GB", 2),
    "images_per_second": Column("images/s"),
    "minutes": Column("minutes", 2),
    "published_top1": Column("paper's\ntop-1 %", 2),
    "top1_difference": Column("differs\nby", 2, signed=True),
    "published_top5": Column("paper's\ntop-5 %", 2),
    "top5_difference": Column("differs\nby", 2, signed=True),
    "published_params": Column("paper's\ncount"),
    "params_difference": Column("differs\nby", signed=True),
    "published_gpu_gb": Column("paper's\nGPU GB", 1),
    "gpu_difference": Column("differs\nby", 1, signed=True),
    "published_size_mb": Column("paper's\n“size” MB", 2),
    "device": Column("device"),
    "precision": Column("precision"),
}
COUNTS = ("weight_bias_params", "trainable_params")
# Column: ours minus the paper's.
DIFFERENCES = {
    "top1_difference": ("best_top1", "published_top1"),
    "top5_difference": ("best_top5", "published_top5"),
    "params_difference": ("weight_bias_params", "published_params"),
    "gpu_difference": ("gpu_gb", "published_gpu_gb"),
}
OURS = (
    *("experiment", "seeds", "epochs", "top1", "top5", "best_top1", "weight_bias_params", "trainable_params"),
    *("checkpoint_mb", "gpu_gb", "images_per_second", "minutes"),
)
BESIDE_PAPER = (
    *("experiment", "best_top1", "published_top1", "top1_difference", "best_top5", "published_top5", "top5_difference"),
    *("weight_bias_params", "published_params", "params_difference", "gpu_gb", "published_gpu_gb", "gpu_difference"),
    "published_size_mb",
)

HOW_TO_READ = (
    "One line for all seeds of a run. Last epoch: percent of the whole test set, mean ± sample standard deviation over the "
    "seeds. Best of all: the highest top-1 after any epoch of any seed. Peak GPU GB: the most that PyTorch had allocated in "
    "a training step, without the images, in 10⁹ bytes. Images/s of training and minutes in all are means over the seeds. "
    "Weights and biases is the paper's count; trainable adds position tables, class tokens and Linformer's projections."
)
PROTOCOL = (
    "The paper's figures come from another protocol. Each is the best test epoch of one run without a seed or a validation "
    "split (the text says best of three), so it is set beside our best of all epochs and seeds; both flatter the model, and "
    "the last epoch's mean is the fair figure.",
    "Its accuracies are means of the batches' percentages, in which a short last batch weighs too much; ours count every test "
    "image once.",
    "It trained with AdamW at a constant rate of 1e-3 (the text says Adam), for some 16 to 40 epochs, with batches of 64 for "
    "ViT, 128 for ViP, ViN and the hybrids and 192 to 640 for others; ours are of 64 unless a line says otherwise. The "
    "paper's GPU memory is for 64.",
    "It computed in float32: its automatic mixed precision covered the loss alone. Ours use 16 bits on a GPU, and softmax "
    "attention does not store the tokens × tokens matrix unless attention.implementation=explicit, so they need less memory.",
    "Its “size” estimates the activations for one image and is not that of a file, so no difference is taken. Its count of "
    "LeViP's parameters, 662,410, is a misprint of 622,410; table 5 prints no counts.",
)


def columns(group: Group) -> Row:
    """A group's value for every column; None where there is none."""
    best, seconds = group.best, group.mean("seconds")
    row: Row = {
        "experiment": group.name,
        "seeds": len(group.runs),
        "gpu_gb": max(group.values("peak_gpu_allocated_gb"), default=None),
        "gpu_reserved_gb": max(group.values("peak_gpu_reserved_gb"), default=None),
        "images_per_second": group.mean("images_per_second"),
        "minutes": None if seconds is None else seconds / 60,
    }
    for key in ("top1", "top5"):
        row |= {key: group.mean(key), f"{key}_std": group.std(key)}
    for key in ("best_top1", "best_top5", "epochs", *COUNTS, "checkpoint_mb", "device", "precision"):
        row[key] = best.get(key)
    for key, text in group.published.items():
        if key.startswith("published_"):
            row[key] = float(text) if text else None
    for key, (ours, published) in DIFFERENCES.items():
        known = row[ours] is not None and row.get(published) is not None
        row[key] = row[ours] - row[published] if known else None
    return {column: row.get(column) for column in COLUMNS}


def sort_rows(rows: list[Row], column: str) -> list[Row]:
    """By a column, descending with a minus in front; rows without a value come last. Raises UserError for no such column."""
    key = column.removeprefix("-")
    if key not in COLUMNS:
        near = difflib.get_close_matches(key, COLUMNS, 1)
        raise UserError(f"--sort {column}: there is no such column{f' ({near[0]}?)' if near else ''}; {', '.join(COLUMNS)}")
    known = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key], reverse=column.startswith("-"))
    return known + [row for row in rows if row[key] is None]


def cell(row: Row, key: str) -> str:
    """A value as the tables show it."""
    value, column = row[key], COLUMNS[key]
    if value is None or isinstance(value, str):
        return value or "–"
    text = f"{value:{'+' if column.signed else ''},.{column.digits}f}".replace("-", "−")
    std = row.get(f"{key}_std")
    return text if std is None else f"{text} ± {std:.{column.digits}f}"


def tables(rows: Sequence[Row], others: Sequence[RunRecord]) -> list[Table]:
    """What was reached, beside the paper, and what is not in the table; without the empty ones."""

    def of(title: str, keys: Sequence[str], rows: Sequence[Row]) -> Table:
        return Table(title, [COLUMNS[key].head for key in keys], [[cell(row, key) for key in keys] for row in rows], 1)

    ours = of("Runs", OURS, rows)
    beside = of("Beside the paper", BESIDE_PAPER, [row for row in rows if row["published_top1"] is not None])
    rest = Table("Not in the table", ("run", "status", "error"), [(str(r.path.parent), r.status, r.error) for r in others], 3)
    return [table for table in (ours, beside, rest) if table.lines]


def notes(rows: Sequence[Row]) -> list[str]:
    """The footnotes that the tables need; none where there are no rows."""
    published = any(row["published_top1"] is not None for row in rows)
    return [*([HOW_TO_READ] if rows else []), *(PROTOCOL if published else [])]


def as_csv(rows: Iterable[Row]) -> str:
    """Every column, unrounded; empty where there is no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_files(out: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a directory, which is made if need be; each is whole or absent. Raises UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: this directory cannot be made ({error.strerror}); choose another with --out") from error
    for name, content in files.items():
        atomic_write(out / name, content)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vix report", description="Accuracy, memory and time of runs, as a table.")
    outputs = [Path("outputs")]
    parser.add_argument("directories", metavar="DIR", nargs="*", type=user_path, default=outputs, help="default: outputs")
    parser.add_argument(
        "--where",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="only runs with this field of results.json or key of the config: attention=nystrom, trainer.epochs=10; repeatable",
    )
    parser.add_argument("--sort", metavar="COLUMN", help=f"-COLUMN descends; default: the paper's order. {', '.join(COLUMNS)}")
    parser.add_argument(
        "--out", metavar="DIR", type=user_path, help="for report.md, report.csv and pictures; default: the first DIR"
    )
    parser.add_argument("--no-files", action="store_true", help="only print")
    # argparse takes -COLUMN for an option of its own, unless it hangs on --sort.
    for i in range(len(arguments) - 1, 0, -1):
        if arguments[i - 1] == "--sort" and arguments[i].startswith("-"):
            arguments[i - 1 : i + 1] = [f"--sort={arguments[i]}"]
    return parser.parse_args(arguments)


def report(options: argparse.Namespace) -> None:
    """Print the tables and write the files. Raises UserError."""
    if options.sort:
        sort_rows([], options.sort)  # a wrong name is told before anything is read
    runs = filter_runs(find_runs(options.directories), options.where)
    if not runs:
        print(f"No results.json below {join_names(options.directories)}: train something with python train.py experiment=NAME")
        return
    groups, others = group_seeds(runs)
    rows = [columns(group) for group in groups]
    in_order = sort_rows(rows, options.sort) if options.sort else rows
    shown, footnotes = tables(in_order, others), notes(rows)
    for table in shown:
        table.print()
    window = shutil.get_terminal_size((120, 0)).columns
    for note in footnotes:
        print(textwrap.fill(f"* {note}", min(window, 120), subsequent_indent="  "))
    if not options.no_files:
        from vix.reporting.plots import pictures  # matplotlib takes a second to import

        images = pictures(groups, rows, published_rows())
        links = [f"![{title}]({name})\n" for name, (title, _) in images.items()]
        text = ["# Report\n", *(table.markdown() for table in shown), *(f"* {note}" for note in footnotes), "", *links]
        texts = {"report.md": "\n".join(text), "report.csv": as_csv(in_order)}
        # A directory's name need not be valid UTF-8.
        files = {name: content.encode(errors="backslashreplace") for name, content in texts.items()}
        files |= {name: png for name, (_, png) in images.items()}
        out = options.out or options.directories[0]
        write_files(out, files)
        print(f"\nWritten to {out}: {', '.join(files)}")


def main() -> None:
    protect_output()
    try:
        report(parse_arguments(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
