"""Progress of a run on a terminal: a progress bar, a log line per epoch, and a table of results."""

import logging
import sys
import time
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from vix.reporting.console import console
from vix.system.distributed import rank

log = logging.getLogger(__name__)


class EpochBar:
    """Progress bar of one epoch (epoch, loss, accuracy, images/s, time left); hidden where output is not a terminal.

    epoch, epochs: index of this epoch, from 0, and number of epochs.
    images: in the epoch.
    done: how many of them earlier starts have trained on.
    history: rows of the previous epochs.
    """

    def __init__(self, epoch: int, epochs: int, images: int, done: int, history: list[dict[str, Any]]) -> None:
        self.images = images
        self.shown = self.started = time.perf_counter()
        self.first = self.done = done
        top1 = f"top-1 {history[-1]['top1']:.2f} %" if history else ""
        columns = (
            TextColumn("epoch {task.fields[epoch]}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
        )
        # Transient: the log line of the epoch replaces the bar.
        hidden = rank() > 0 or not sys.stdout.isatty()
        self.progress = Progress(*columns, console=console(), transient=True, disable=hidden)
        self.task = self.progress.add_task("", total=images, completed=done, epoch=f"{epoch + 1}/{epochs}", note=top1)
        self.top1 = top1

    def __enter__(self) -> "EpochBar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, images: int, loss: Tensor) -> None:
        """Count a step of ``images`` images. Reads the loss at most twice per second, because that synchronizes the device."""
        self.done += images
        now = time.perf_counter()
        if self.progress.disable or now - self.shown < 0.5:
            return
        self.shown = now
        note = f"loss {loss.item():.3f}  {self.top1}  {(self.done - self.first) / (now - self.started):.0f} images/s"
        self.progress.update(self.task, completed=self.done, note=note)


def print_results(results: dict[str, Any]) -> None:
    """Print the fields of a finished run's results.json as a table."""
    table = Table(title=results["name"], show_header=False)
    table.add_column()
    table.add_column(justify="right")

    def gigabytes(key: str) -> str:
        return "– (no GPU)" if results[key] is None else f"{results[key]:.2f} GB"

    on = " on validation images" if results.get("tested_on") == "validation" else ""
    for label, value in (
        (f"top-1{on}, last epoch", f"{results['top1']:.2f} %"),
        (f"top-5{on}, last epoch", f"{results['top5']:.2f} %"),
        (f"top-1{on}, best epoch", f"{results['best_top1']:.2f} % (epoch {results['best_epoch']} of {results['epochs']})"),
        ("training loss", f"{results['train_loss']:.4f}"),
        *([("steps skipped by the gradient scaler", f"{skipped:,}")] if (skipped := results.get("skipped_steps")) else []),
        ("trainable parameters", f"{results['trainable_params']:,}"),
        ("weights and biases (the paper's count)", f"{results['weight_bias_params']:,}"),
        ("checkpoint", f"{results['checkpoint_mb']:.2f} MB"),
        ("peak GPU memory, allocated", gigabytes("peak_gpu_allocated_gb")),
        ("peak GPU memory, reserved", gigabytes("peak_gpu_reserved_gb")),
        ("speed", f"{results['images_per_second']:.0f} images/s"),
        ("time", f"{results['seconds'] / 60:.1f} min on {results['device']}, {results['precision']}"),
    ):
        table.add_row(label, value)
    console().print(table)


def log_epoch(row: dict[str, Any], epochs: int, seconds: float) -> None:
    """Log an epoch's row of the history, with the estimated time left.

    epochs: number of epochs.   seconds: duration of this epoch.
    """
    log.info(
        "epoch %d/%d  loss %.4f  top-1 %.2f %%  top-5 %.2f %%  %.0f images/s  %.1f min left",
        *(row["epoch"], epochs, row["train_loss"], row["top1"], row["top5"], row["images_per_second"]),
        seconds * (epochs - row["epoch"]) / 60,
    )
