"""``python -m vix report [DIR …]``: accuracy, memory and time of the runs below directories, next to the published figures.

Reads only each run's ``results.json``, and imports no torch: 1,000 runs take about a second.
"""

import argparse
import csv
import difflib
import hashlib
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vix.errors import UserError
from vix.reporting.console import protect_output
from vix.reporting.table import Table
from vix.runs.results import (
    INFERENCE_FIELDS,
    INFERENCE_ON,
    Group,
    Row,
    RunRecord,
    filter_runs,
    find_runs,
    group_seeds,
    join_names,
    published_rows,
    shared_overrides,
)
from vix.system.files import atomic_write, user_path


class Column(NamedTuple):
    """Format of a column: its heading, the number of decimals, and whether positive numbers get a plus sign."""

    head: str
    digits: int = 0
    signed: bool = False


# Columns of report.csv, in this order, and valid arguments of --sort.
COLUMNS = {
    "experiment": Column("experiment"),
    "seeds": Column("seeds"),
    "folds": Column("folds"),
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
    "latency_ms": Column("latency\nms", 2),
    "latency_p95_ms": Column("latency\n95 % ms", 2),
    "inference_images_per_second": Column("inference\nimages/s"),
    "inference_gb": Column("inference\nGB", 3),
    "inference_on": Column("inference on"),
    "published_top1": Column("paper's\ntop-1 %", 2),
    "top1_difference": Column("ours −\npaper", 2, signed=True),
    "published_top5": Column("paper's\ntop-5 %", 2),
    "top5_difference": Column("ours −\npaper", 2, signed=True),
    "published_params": Column("paper's\ncount"),
    "params_difference": Column("ours −\npaper", signed=True),
    "published_gpu_gb": Column("paper's\nGPU GB", 1),
    "gpu_difference": Column("ours −\npaper", 1, signed=True),
    "published_size_mb": Column("paper's\n“size” MB", 2),
    "device": Column("device"),
    "precision": Column("precision"),
}
COUNTS = ("weight_bias_params", "trainable_params")
# Column of a difference → the columns of our value and the paper's.
DIFFERENCES = {
    "top1_difference": ("best_top1", "published_top1"),
    "top5_difference": ("best_top5", "published_top5"),
    "params_difference": ("weight_bias_params", "published_params"),
    "gpu_difference": ("gpu_gb", "published_gpu_gb"),
}
INFERENCE = ("latency_ms", "inference_images_per_second", "inference_gb")
OURS = (
    *("experiment", "seeds", "folds", "epochs", "top1", "top5", "best_top1", "weight_bias_params", "trainable_params"),
    *("checkpoint_mb", "gpu_gb", "images_per_second", "minutes"),
    *INFERENCE,
)
PAPER_COMPARISON = (
    *("experiment", "best_top1", "published_top1", "top1_difference", "best_top5", "published_top5", "top5_difference"),
    *("weight_bias_params", "published_params", "params_difference", "gpu_gb", "published_gpu_gb", "gpu_difference"),
    "published_size_mb",
)

HOW_TO_READ = (
    "One line per run, for all of its seeds. Last epoch: percent of the test set, or of the images held out by "
    "data.validation_size, mean ± sample standard deviation over the seeds. Best of all: the highest top-1 after any epoch of "
    "any seed. Peak GPU GB: PyTorch's peak allocated memory in the training steps, without the data set, in 10⁹ bytes. "
    "Epochs, training images/s and total minutes are means over the seeds. Weights and biases is the paper's count; trainable "
    "adds position embeddings, class tokens, Linformer's projections and the norms of CvT."
)
HOW_TO_READ_FOLDS = (
    "A line with folds is a cross-validation (data.folds): mean and standard deviation are over all of its runs, one per seed "
    "and fold, and each was evaluated on its own part of the training images, not on the test set."
)
SEVERAL_VERSIONS = "Averages of runs of several commits or versions of PyTorch (`python -m vix diff RUN_A RUN_B` shows which): "
HOW_TO_READ_INFERENCE = (
    "Latency (median time of one image), inference images/s (at the best batch size) and inference GB (peak memory at batch "
    "size 64) were measured by `python -m vix cost`, in the variant, compiled or not, with the lower latency, on "
)
HEADING = "# Report"  # first line of report.md
SIGNATURE = "\n<!-- unchanged since written: "  # begins its last line
PROTOCOL = (
    "The paper's protocol differs from ours. Each published accuracy is the best test epoch of one unseeded run without a "
    "validation split (the text says best of three), so it is compared with our best over all epochs and seeds. Both are "
    "optimistic; the mean of the last epoch is the unbiased figure.",
    "The paper averages the accuracies of batches, which gives a short last batch too much weight; ours count every test image "
    "once.",
    "The paper trained with AdamW at a constant learning rate of 1e-3 (the text says Adam), for about 16 to 40 epochs, with a "
    "batch size of 64 for ViT, 128 for ViP, ViN and the hybrids, and 192 to 640 for others; ours is 64 unless a line says "
    "otherwise. The paper's GPU memory is for 64.",
    "The paper computed in float32: its automatic mixed precision covered only the loss. Ours uses 16 bits on a GPU, and "
    "softmax attention does not store the tokens × tokens matrix unless attention.implementation=explicit, so it needs less "
    "memory.",
    "The paper's “size” estimates the activations of one image, not the size of a file, so it is not compared. Its count of "
    "LeViP's parameters, 662,410, is a misprint of 622,410; table 5 contains no counts.",
)


def columns(group: Group) -> Row:
    """A group's row of the table: column → value, None where it is unknown."""
    best, seconds, epochs = group.best, group.mean("seconds"), group.mean("epochs") or 0.0
    row: Row = {
        "experiment": group.name,
        "seeds": len({run.seed for run in group.runs}),
        "folds": len({run.fold for run in group.runs} - {None}) or None,
        "epochs": int(epochs) if epochs.is_integer() else epochs,
        "gpu_gb": max(group.values("peak_gpu_allocated_gb"), default=None),
        "gpu_reserved_gb": max(group.values("peak_gpu_reserved_gb"), default=None),
        "images_per_second": group.mean("images_per_second"),
        "minutes": None if seconds is None else seconds / 60,
        **{key: group.mean(key) for key in INFERENCE_FIELDS},
        INFERENCE_ON: next((run.results[INFERENCE_ON] for run in group.runs if INFERENCE_ON in run.results), None),
    }
    for key in ("top1", "top5"):
        row |= {key: group.mean(key), f"{key}_std": group.std(key)}
    for key in ("best_top1", "best_top5", *COUNTS, "checkpoint_mb", "device", "precision"):
        row[key] = best.get(key)
    for key, text in group.published.items():
        if key.startswith("published_"):
            row[key] = float(text) if text else None
    for key, (ours, published) in DIFFERENCES.items():
        known = row[ours] is not None and row.get(published) is not None
        row[key] = row[ours] - row[published] if known else None
    return {column: row.get(column) for column in COLUMNS}


def sort_rows(rows: list[Row], column: str) -> list[Row]:
    """Rows sorted by a column, descending if its name begins with a minus; rows without a value come last.

    Raises UserError for an unknown column.
    """
    key = column.removeprefix("-")
    if key not in COLUMNS:
        near = difflib.get_close_matches(key, COLUMNS, 1)
        raise UserError(f"--sort {column}: unknown column{f' ({near[0]}?)' if near else ''}; valid: {', '.join(COLUMNS)}")
    known = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key], reverse=column.startswith("-"))
    return known + [row for row in rows if row[key] is None]


def cell(row: Row, key: str) -> str:
    """A value as formatted in the tables."""
    value, column = row[key], COLUMNS[key]
    if value is None or isinstance(value, str):
        return value or "–"
    digits = 1 if key == "epochs" and isinstance(value, float) else column.digits
    text = f"{value:{'+' if column.signed else ''},.{digits}f}".replace("-", "−")
    std = row.get(f"{key}_std")
    return text if std is None else f"{text} ± {std:.{column.digits}f}"


def tables(rows: Sequence[Row], labels: Mapping[str, str], others: Sequence[RunRecord]) -> list[Table]:
    """The tables of results, of the comparison with the paper, and of other runs; empty tables are omitted.

    labels: a group's name in the tables, by its name in the rows.
    """
    rows = [row | {"experiment": labels[row["experiment"]]} for row in rows]

    def make_table(title: str, keys: Sequence[str], rows: Sequence[Row]) -> Table:
        return Table(title, [COLUMNS[key].head for key in keys], [[cell(row, key) for key in keys] for row in rows], 1)

    optional = {key for key in ("folds", *INFERENCE) if all(row[key] is None for row in rows)}
    ours = make_table("Runs", [key for key in OURS if key not in optional], rows)
    compared = [row for row in rows if row["published_top1"] is not None]
    comparison = make_table("Comparison with the paper", PAPER_COMPARISON, compared)
    rest = Table("Not in the table", ("run", "status", "error"), [(str(r.path.parent), r.status, r.error) for r in others], 3)
    return [table for table in (ours, comparison, rest) if table.lines]


def notes(rows: Sequence[Row], common: Sequence[str], several_versions: Sequence[str]) -> list[str]:
    """The footnotes of the tables; empty without rows.

    common: overrides that all runs share.
    several_versions: names of the groups whose runs are of several commits or versions of PyTorch.
    """
    published = any(row["published_top1"] is not None for row in rows)
    inference = dict.fromkeys(row[INFERENCE_ON] for row in rows if row[INFERENCE_ON] is not None)
    return [
        *([f"All runs have {' '.join(common)}"] if common else []),
        *([HOW_TO_READ] if rows else []),
        *([HOW_TO_READ_FOLDS] if any(row["folds"] for row in rows) else []),
        *([f"{SEVERAL_VERSIONS}{join_names(several_versions)}."] if several_versions else []),
        *([f"{HOW_TO_READ_INFERENCE}{' and '.join(inference)}."] if inference else []),
        *(PROTOCOL if published else []),
    ]


def as_csv(rows: Iterable[Row]) -> str:
    """The rows as CSV with all columns, unrounded; a missing value is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_files(out: Path, files: Mapping[str, bytes]) -> None:
    """Write files atomically into a directory, which is created if necessary.

    files: name → contents.

    Raises UserError where that fails, or a file would be replaced that is not of an earlier report, or was edited.
    """
    page = out / "report.md"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot create this directory ({error.strerror}); choose another with --out") from error
    way_out = "choose another directory with --out, or use --no-files"
    try:
        earlier = page.read_bytes() if page.is_file() else None
    except OSError as error:
        raise UserError(f"{page}: {error.strerror}; {way_out}") from error
    if earlier is None and (others := [name for name in files if os.path.lexists(out / name)]):
        raise UserError(f"{out / others[0]}: is not of a report of this command; {way_out}")
    if earlier is not None and not earlier.startswith(HEADING.encode()):
        raise UserError(f"{page}: is not a report of this command; {way_out}")
    if earlier is not None and was_edited(earlier):
        raise UserError(f"{page}: was edited, and would be replaced; move it elsewhere, {way_out}")
    for name, content in files.items():
        atomic_write(out / name, content)


def signed(page: str) -> str:
    """A page with a last line that contains the digest of the lines above."""
    return f"{page}{SIGNATURE}{digest(page.encode(errors='backslashreplace'))} -->\n"


def was_edited(page: bytes) -> bool:
    """Whether a page is not the one that was signed; pages of earlier versions have no signature."""
    above, signature, end = page.rpartition(SIGNATURE.encode())
    return bool(signature) and end != f"{digest(above)} -->\n".encode()


def digest(content: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 hash."""
    return hashlib.sha256(content).hexdigest()[:16]


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The options of the command; the fields are directories, where, sort, out and no_files."""
    description = "Accuracy, memory and time of runs, next to the published figures."
    parser = argparse.ArgumentParser(prog="python -m vix report", description=description)
    parser.add_argument(
        "directories",
        metavar="DIR",
        nargs="*",
        type=user_path,
        default=[Path("outputs")],
        help="directories that are searched for runs (default: outputs)",
    )
    parser.add_argument(
        "--where",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="only runs with this value of a field of results.json or a key of the config, such as attention=nystrom or "
        "trainer.epochs=10; repeatable",
    )
    parser.add_argument(
        "--sort",
        metavar="COLUMN",
        help=f"sort by a column, -COLUMN in descending order (default: the paper's order); columns: {', '.join(COLUMNS)}",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=user_path, help="directory of report.md, report.csv and figures (default: the first DIR)"
    )
    parser.add_argument("--no-files", action="store_true", help="print the report, but write no files")
    # argparse would take a separate -COLUMN for an option, so it is joined with --sort.
    for i in range(len(arguments) - 1, 0, -1):
        if arguments[i - 1] == "--sort" and arguments[i].startswith("-"):
            arguments[i - 1 : i + 1] = [f"--sort={arguments[i]}"]
    return parser.parse_args(arguments)


def report(options: argparse.Namespace) -> None:
    """Print the tables and write the files. Raises UserError for invalid options and unreadable or unwritable directories.

    options: of :func:`parse_arguments`.
    """
    if options.sort:
        sort_rows([], options.sort)  # reports an unknown column before runs are read
    runs = filter_runs(find_runs(options.directories), options.where)
    if not runs:
        print(f"No results.json below {join_names(options.directories)}: start a run with python train.py experiment=NAME")
        return
    groups, others = group_seeds(runs)
    rows = [columns(group) for group in groups]
    in_order = sort_rows(rows, options.sort) if options.sort else rows
    common = shared_overrides(groups)
    labels = {group.name: group.name_without(common) for group in groups}
    shown, footnotes = tables(in_order, labels, others), notes(rows, common, [labels[g.name] for g in groups if g.versions > 1])
    for table in shown:
        table.print()
    window = shutil.get_terminal_size((120, 0)).columns
    for note in footnotes:
        lines = textwrap.wrap(
            f"* {note}", min(window, 120), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        print("\n".join(lines))
    if not options.no_files:
        from vix.reporting.plots import pictures  # matplotlib takes a second to import

        images = pictures(groups, rows, published_rows())
        links = [f"![{title}]({name})\n" for name, (title, _) in images.items()]
        text = [f"{HEADING}\n", *(table.markdown() for table in shown), *(f"* {note}" for note in footnotes), "", *links]
        texts = {"report.md": signed("\n".join(text)), "report.csv": as_csv(in_order)}
        # A directory's name need not be valid UTF-8.
        files = {name: content.encode(errors="backslashreplace") for name, content in texts.items()}
        files |= {name: png for name, (_, png) in images.items()}
        out = options.out or options.directories[0]
        write_files(out, files)
        print(f"\nWritten to {out}: {', '.join(files)}")


def main() -> None:
    """The command."""
    protect_output()
    report(parse_arguments(sys.argv[1:]))
