"""What a person sees of a run: a progress bar on a terminal, TensorBoard, and the table at the end."""

import json
import sys
import time
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from vix.checks import UserError
from vix.metrics import process_gigabytes
from vix.results import flat
from vix.run import Run


class EpochBar:
    """Progress of one epoch on a terminal (epoch, loss, accuracy, images/s, time left); nothing where output is piped.

    epoch, epochs: index of this one and number of all; images: in the whole epoch; history: of the epochs before.
    """

    def __init__(self, epoch: int, epochs: int, images: int, history: list[dict[str, Any]]) -> None:
        self.images = images
        self.shown = self.started = time.perf_counter()
        self.done = 0
        top1 = f"top-1 {history[-1]['top1']:.2f} %" if history else ""
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        # Transient: the bar gives way to the epoch's line in the log.
        self.progress = Progress(*columns, transient=True, disable=not sys.stdout.isatty())
        self.task = self.progress.add_task("", total=images, epoch=f"{epoch + 1}/{epochs}", note=top1)
        self.top1 = top1

    def __enter__(self) -> "EpochBar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, images: int, loss: Tensor) -> None:
        """Count a step. The loss is read off the device, which waits for it, twice a second at most."""
        self.done += images
        now = time.perf_counter()
        if self.progress.disable or now - self.shown < 0.5:
            return
        self.shown = now
        note = f"loss {loss.item():.3f}  {self.top1}  {self.done / (now - self.started):.0f} images/s"
        self.progress.update(self.task, completed=self.done, note=note)


class TensorBoard:
    """A run's events, in the run's own directory: a scalar per epoch, the config as text, and hparams with final metrics."""

    def __init__(self, run: Run, first_epoch: int) -> None:
        self.run, self.first_epoch = run, first_epoch

    def __enter__(self) -> "TensorBoard":
        # Purged: an epoch that an earlier start logged but did not save is done, and logged, again.
        self.writer = SummaryWriter(str(self.run.directory), purge_step=self.first_epoch)
        self.writer.add_text("config", f"```json\n{json.dumps(self.run.config, indent=2)}\n```")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what could not be written was told by ``flush``
            self.writer.close()

    def flush(self) -> None:
        """Wait for the events to be on the disk. Raises UserError where they cannot be."""
        try:
            self.writer.flush()
        except OSError as error:
            raise UserError(f"cannot write TensorBoard's events into {self.run.directory} ({error.strerror})") from error

    def epoch(self, row: dict[str, Any], memory: dict[str, float | None]) -> None:
        scalars = {
            "loss/train": row["train_loss"],
            "accuracy/top1": row["top1"],
            "accuracy/top5": row["top5"],
            "train/lr": row["lr"],
            "train/images_per_second": row["images_per_second"],
            "memory/process_peak_gb": process_gigabytes(),
            **{f"memory/{name}": value for name, value in memory.items() if value is not None},
        }
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, row["epoch"])
        self.flush()

    def finish(self, results: dict[str, Any]) -> None:
        """The HParams page's row of this run. ``run_name="."`` keeps it in this run instead of one nested below."""
        hparams = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in flat(self.run.config).items()}
        hparams |= {k: results[k] or "" for k in ("experiment", "model", "attention", "embedding", "posenc")}
        names = ["top1", "top5", "best_top1", "train_loss", "trainable_params", "checkpoint_mb", "images_per_second", "seconds"]
        names.append("peak_gpu_allocated_gb")
        metrics = {f"final/{name}": results[name] for name in names if results[name] is not None}
        self.writer.add_hparams(hparams, metrics, run_name=".", global_step=results["epochs"])


def show_results(results: dict[str, Any]) -> None:
    """Print a run's results as a table."""
    table = Table(title=results["name"], show_header=False)
    table.add_column()
    table.add_column(justify="right")

    def gigabytes(key: str) -> str:
        return "– (no GPU)" if results[key] is None else f"{results[key]:.2f} GB"

    for label, value in (
        ("top-1, last epoch", f"{results['top1']:.2f} %"),
        ("top-5, last epoch", f"{results['top5']:.2f} %"),
        ("top-1, best epoch", f"{results['best_top1']:.2f} % (epoch {results['best_epoch']} of {results['epochs']})"),
        ("training loss", f"{results['train_loss']:.4f}"),
        ("trainable parameters", f"{results['trainable_params']:,}"),
        ("weights and biases (the paper's count)", f"{results['weight_bias_params']:,}"),
        ("checkpoint", f"{results['checkpoint_mb']:.2f} MB"),
        ("peak GPU memory, allocated", gigabytes("peak_gpu_allocated_gb")),
        ("peak GPU memory, reserved", gigabytes("peak_gpu_reserved_gb")),
        ("speed", f"{results['images_per_second']:.0f} images/s"),
        ("time", f"{results['seconds'] / 60:.1f} min on {results['device']}, {results['precision']}"),
    ):
        table.add_row(label, value)
    Console().print(table)
