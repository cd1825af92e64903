"""``python -m vix evaluate RUN … [key=value …]``: accuracy, loss and confusion matrix of trained runs.

Equal to the run's own figures on its own images; ``data=NAME`` and ``data.*`` choose other images of the same classes.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vix.analysis.trained_run import TRAINER_KEYS, check_keys, evaluate, load_trained_run, separate
from vix.cli.errors import error_of_run, one_line_errors, without_warnings
from vix.composition.command import add_flags, expand_arguments, flags_from
from vix.errors import UserError
from vix.reporting.console import protect_output
from vix.reporting.table import Table
from vix.system.files import nan_to_none
from vix.system.threads import use_given_cpus

SUMMARY = ("run", "weights", "epoch", "image_set", "tested_on", "test_images", "top1", "top5", "test_loss")
# Classes of a printed confusion matrix; with more, the classes that each is most often taken for are printed.
MOST_CLASSES, MOST_CONFUSED = 20, 3


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table of the runs, and for each run the accuracy and the confusions of its classes."""
    lines = [
        (
            *(row["run"], row["weights"], f"{row['tested_on']} images of {row['image_set']}"),
            *(str(row["epoch"]), f"{row['test_images']:,}"),
            *(f"{row['top1']:.2f}", f"{row['top5']:.2f}", f"{row['test_loss']:.4f}"),
        )
        for row in rows
    ]
    Table("Evaluation", ("run", "weights", "images", "epoch", "number", "top-1 %", "top-5 %", "loss"), lines, 3).print()
    for row in rows:
        names, counts = row["class_names"], row["confusion_matrix"]
        accuracy = [f"{value:.2f}" for value in row["class_accuracy"]]
        few = len(names) <= MOST_CLASSES
        heads = ("true class", "top-1 %", *names) if few else ("true class", "most often taken for", "top-1 %")
        cells = [
            (name, accuracy[i], *map(str, counts[i])) if few else (name, confused(names, counts[i], i), accuracy[i])
            for i, name in enumerate(names)
        ]
        Table(f"Predicted classes: {row['run']}, {row['weights']} weights", heads, cells, 1 if few else 2).print()


def confused(names: Sequence[str], counts: Sequence[int], true: int) -> str:
    """The classes that images of class ``true`` are most often taken for, with the numbers of images."""
    order = sorted((k for k, count in enumerate(counts) if count and k != true), key=lambda k: -counts[k])
    return ", ".join(f"{names[k]} ({counts[k]})" for k in order[:MOST_CONFUSED])


def print_csv(rows: Sequence[dict[str, Any]]) -> None:
    """Print a row per run and true class, with a column per predicted class."""
    columns = [*SUMMARY, "class", "class_accuracy"]
    columns += dict.fromkeys(f"predicted/{name}" for row in rows for name in row["class_names"])
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for name, value, counts in zip(row["class_names"], row["class_accuracy"], row["confusion_matrix"], strict=True):
            predicted = {f"predicted/{other}": count for other, count in zip(row["class_names"], counts, strict=True)}
            of_class = nan_to_none({"class": name, "class_accuracy": value})  # a class may have no images
            writer.writerow({key: row[key] for key in SUMMARY} | of_class | predicted)


def print_json(rows: Sequence[dict[str, Any]]) -> None:
    """Print a list with an object per run."""
    print(json.dumps(nan_to_none(rows), indent=2, allow_nan=False))


def main() -> None:
    """The command; exits with 1 where a run cannot be evaluated, after the others."""
    protect_output()
    description = "Accuracy, loss and confusion matrix of trained runs, on their own images or others of the same classes."
    parser = argparse.ArgumentParser(prog="python -m vix evaluate", description=description)
    parser.add_argument(
        "words",
        metavar="RUN",
        nargs="+",
        help="a run's directory, such as outputs/vin/seed=0; or key=value: data=NAME, data.*, trainer.device, "
        "trainer.precision, trainer.eval_batch_size, trainer.mirror_eval",
    )
    parser.add_argument("--weights", choices=("last", "best"), default="last", help="of which epoch (default: last)")
    parser.add_argument(
        "--split", choices=("test", "validation"), help="test images, or held-out training images (default: as in training)"
    )
    add_flags(parser)
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", dest="show", action="store_const", const=print_json, help="print JSON")
    formats.add_argument("--csv", dest="show", action="store_const", const=print_csv, help="print CSV: a row per run and class")
    options = parser.parse_intermixed_args(expand_arguments(sys.argv[1:]))
    (runs, overrides), flags = separate(options.words), flags_from(options)
    show: Callable[[Sequence[dict[str, Any]]], None] = options.show or print_tables
    use_given_cpus()
    rows, errors = [], []
    with one_line_errors(overrides, flags, batches="trainer.eval_batch_size"), without_warnings():
        check_keys(overrides, ("data", *TRAINER_KEYS))
        if not runs:
            raise UserError("RUN: pass the directory of a run, such as outputs/vin/seed=0")
        for run in runs:
            try:
                rows.append(evaluate(load_trained_run(Path(run), options.weights, overrides, flags), options.split))
            except UserError as error:
                errors.append(error_of_run(run, error))
    if rows:
        show(rows)
    sys.exit("\n".join(errors) if errors else 0)
