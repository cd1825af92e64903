"""``python -m vix diff RUN_A RUN_B``: compare the configs, versions and results of two runs.

Reads only the two ``results.json``, and imports no torch.
"""

import argparse
from pathlib import Path
from typing import Any

from vix.errors import UserError, permission_errors
from vix.reporting.console import protect_output
from vix.reporting.table import Table
from vix.runs.identity import with_defaults
from vix.runs.results import Row, as_text, flatten, read_run
from vix.system.files import user_path

VERSIONS = (
    *("git_commit", "torch", "device", "precision", "threads", "processes", "compiled", "micro_batch"),
    "init_weights",  # digest of the weights of trainer.init_from
)
RESULTS = (
    *("status", "error", "epochs", "top1", "top5", "best_top1", "best_top5", "best_epoch", "train_loss", "test_loss"),
    *(
        "trainable_params",
        "weight_bias_params",
        "checkpoint_mb",
        "image_set",
        "train_images",
        "test_images",
        "tested_on",
        "images_per_second",
    ),
    *("peak_gpu_allocated_gb", "peak_gpu_reserved_gb", "resident_data_gb", "seconds"),
)
ABSENT = "–"


@permission_errors()
def load(directory: Path) -> Row:
    """The results of a run, finished or not. Raises UserError where the directory contains none."""
    path = directory / "results.json"
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; pass the directory of a run, such as outputs/vin/seed=0")
    if not path.is_file():
        below = [str(p.parent) for p in sorted(directory.rglob("results.json"))]
        raise UserError(f"{directory}: contains no results.json; subdirectories with one: {', '.join(below) or 'none'}")
    run = read_run(path)
    if not isinstance(run.results.get("config"), dict):
        raise UserError(f"{path} is {run.status} ({run.error or 'it contains no config'})")
    return run.results


def differences(a: Row, b: Row) -> list[tuple[str, str, str, str]]:
    """(key, value in a, value in b, b − a) for every key whose values differ; b − a is empty unless both are numbers."""
    lines = []
    for key in [*a, *(key for key in b if key not in a)]:
        if key not in a or key not in b or a[key] != b[key]:
            shown = [as_text(row[key]) if key in row else ABSENT for row in (a, b)]
            lines.append((key, *shown, change(a.get(key), b.get(key))))
    return lines  # type: ignore[return-value]


def change(a: Any, b: Any) -> str:
    """b − a with a sign; empty unless both are numbers."""
    if any(isinstance(x, bool) or not isinstance(x, int | float) for x in (a, b)):
        return ""
    return f"{b - a:+,}" if isinstance(b - a, int) else f"{b - a:+.6g}"


def first_different_epoch(a: Row, b: Row) -> int | None:
    """The first epoch whose loss or accuracy differs; None where all epochs that both runs have agree."""
    for one, other in zip(a.get("history") or (), b.get("history") or (), strict=False):
        if any(one[key] != other[key] for key in ("train_loss", "top1", "top5")):
            return int(one["epoch"])
    return None


def diff(run_a: Path, run_b: Path) -> None:
    """Print the differences of two runs' directories. Raises UserError where a directory contains no run."""
    a, b = load(run_a), load(run_b)
    print(f"A: {run_a}\nB: {run_b}\n")

    def chosen(results: Row, keys: tuple[str, ...]) -> Row:
        return {key: results[key] for key in keys if key in results}

    of_a, of_b = flatten(a["config"]), flatten(b["config"])
    parts = {
        "Config": (with_defaults(of_a, a, of_b), with_defaults(of_b, b, of_a)),
        "Versions": (chosen(a, VERSIONS), chosen(b, VERSIONS)),
        "Results": (chosen(a, RESULTS), chosen(b, RESULTS)),
    }
    for title, rows in parts.items():
        if lines := differences(*rows):
            Table(title, ("key", "A", "B", "B − A"), lines, words=3).print()
        else:
            print(f"{title}: no difference\n")
    for name, results in (("A", a), ("B", b)):
        if results.get("config_changes"):
            print(
                f"{name} was resumed under another config: its own is that of its last epochs (config_changes in results.json)."
            )
    epoch, both = first_different_epoch(a, b), min(len(a.get("history") or ()), len(b.get("history") or ()))
    if epoch:
        print(f"Loss and accuracy differ from epoch {epoch} on.")
    elif both:
        print(f"Loss and accuracy are identical in all epochs that both runs have ({both}).")


def main() -> None:
    """The command."""
    protect_output()
    description = "Compare the configs, versions and results of two runs."
    parser = argparse.ArgumentParser(prog="python -m vix diff", description=description)
    parser.add_argument("run_a", metavar="RUN_A", type=user_path, help="a run's directory, such as outputs/vin/seed=0")
    parser.add_argument("run_b", metavar="RUN_B", type=user_path, help="the directory of the other run")
    options = parser.parse_args()
    diff(options.run_a, options.run_b)
