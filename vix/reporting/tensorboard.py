"""TensorBoard events of a run, written to the run's directory."""

import json
import logging
import os
import re
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.utils.tensorboard import FileWriter, SummaryWriter
from torch.utils.tensorboard.summary import hparams

from vix.attention.inspection import class_token_maps, softmax_error
from vix.data.loader import Split, normalize
from vix.errors import UserError
from vix.overrides import settings
from vix.runs.identity import IGNORED_ON_RESUME
from vix.runs.results import flatten
from vix.runs.run import RunDirectory
from vix.system.memory import process_peak_gb

log = logging.getLogger(__name__)

CHOICES = ("experiment", "model", "attention", "embedding", "posenc", "data", "image_set", "optimizer")
METRICS = (
    *("top1", "top5", "best_top1", "train_loss"),
    *("trainable_params", "images_per_second", "seconds", "peak_gpu_allocated_gb"),
)
PROBED, SHOWN, WORST = 16, 6, 40  # number of test images for the probe, for attention maps, and with the highest loss


class EventFile:
    """A new event file whose name sorts after those of all existing event files of the directory.

    TensorBoard reads the files of a directory in the order of their names, and later events of a step replace earlier ones.
    The names of PyTorch's own files begin with the time. If the clock was set back, or another machine's clock is slow, the
    file of a resumed run would sort before that of the first start, and TensorBoard would show only part of the epochs. Here
    the number in the name is higher than in every existing file.

    Events are buffered until ``flush``, which raises OSError where they cannot be written.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        earlier = (re.match(r"events\.out\.tfevents\.(\d+)\.", name) for name in os.listdir(directory))
        # Compared as text, as TensorBoard does: a clock that is centuries ahead adds a digit.
        latest = max((found[1] for found in earlier if found), default="")
        number = f"{int(time.time()):010d}"
        if number <= latest:
            number = f"{int(latest) + 1:0{len(latest)}d}"
        path = Path(directory, f"events.out.tfevents.{number}.{socket.gethostname()}.{os.getpid()}.0")
        self.file = open(path, "xb")  # noqa: SIM115  (closed by ``close``)
        self.records = RecordWriter(self.file)
        self.pending = [Event(wall_time=time.time(), file_version="brain.Event:2")]

    def get_logdir(self) -> str:
        """The directory of the file; part of EventFileWriter's interface."""
        return self.directory

    def add_event(self, event: Event) -> None:
        """Buffer an event."""
        self.pending.append(event)

    def flush(self) -> None:
        """Write the buffered events. Raises OSError; unwritten events stay in the buffer."""
        while self.pending:
            self.records.write(self.pending[0].SerializeToString())
            del self.pending[0]
        self.file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        try:
            self.flush()
        finally:
            self.file.close()


class EventWriter(SummaryWriter):
    """PyTorch's SummaryWriter on an ``EventFile``."""

    def _get_file_writer(self) -> Any:
        if self.file_writer is None:
            writer = FileWriter.__new__(FileWriter)  # its constructor would create a file named after the time
            writer.event_writer = EventFile(self.log_dir)
            vars(self).update(file_writer=writer, all_writers={self.log_dir: writer})
            if self.purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                writer.add_event(Event(session_log=start), self.purge_step)
        return self.file_writer


class TensorBoard:
    """Context manager that writes the scalars of every epoch, the config as text, a row of the HParams page, and final images.

    run: directory and identity of the run.
    first_epoch: the next epoch, counted from 1.
    model: evaluated for the probe and the attention maps.
    test, class_names: the evaluation images and the names of their classes.
    probe: log the error of each approximate mixer against softmax attention
        (:func:`vix.attention.inspection.softmax_error`).
    """

    def __init__(
        self, run: RunDirectory, first_epoch: int, model: nn.Module, test: Split, class_names: Sequence[str], probe: bool
    ) -> None:
        self.run, self.first_epoch, self.model, self.test = run, first_epoch, model, test
        self.class_names, self.probe = class_names, probe

    def __enter__(self) -> "TensorBoard":
        # Purge epochs that an earlier start logged after its last checkpoint: they are repeated.
        self.writer = EventWriter(str(self.run.directory), purge_step=self.first_epoch)
        self.writer.add_text("config", f"```json\n{json.dumps(self.run.config, indent=2)}\n```")
        # PyTorch's list of all columns is omitted: TensorBoard would use one run's list for all runs, whose keys may differ.
        _, start, self.end = hparams(hyperparameters(self.run), {})
        self.write_hparams(start)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # ``flush`` has already reported the error
            self.writer.close()

    def flush(self) -> None:
        """Write the buffered events to disk. Raises UserError where that fails."""
        try:
            self.writer.flush()
        except OSError as error:
            raise UserError(f"cannot write TensorBoard's events into {self.run.directory} ({error.strerror})") from error

    def epoch(self, row: dict[str, Any], memory: dict[str, float | None]) -> None:
        """Log an epoch.

        row: of the history.   memory: :attr:`vix.system.memory.PeakMemory.gigabytes`.
        """
        scalars = {
            "loss/train": row["train_loss"],
            "accuracy/top1": row["top1"],
            "accuracy/top5": row["top5"],
            "train/lr": row["lr"],
            "train/images_per_second": row["images_per_second"],
            "memory/process_peak_gb": process_peak_gb(),
            **{f"memory/{name}": value for name, value in memory.items() if value is not None},
        }
        if self.probe:
            step = max(1, len(self.test) // PROBED)
            errors = softmax_error(self.model, normalize(self.test.images[::step][:PROBED]))
            scalars |= {f"probe/softmax_error/layer_{i}": error for i, error in enumerate(errors)}
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, row["epoch"])
        self.flush()

    def finish(self, results: dict[str, Any], loss: Tensor, predicted: Tensor) -> None:
        """Log the final metrics, and images of the predictions.

        results: of the finished run.
        loss, predicted: cross-entropy (nats) and predicted class of every test image, (count,) on the CPU.

        Never raises: the model is already trained, so an error is only logged as a warning.
        """
        try:
            for name in METRICS:
                if results[name] is not None:
                    self.writer.add_scalar(f"final/{name}", results[name], results["epochs"])
            self.write_hparams(self.end)
            self.pictures(loss, predicted, results["epochs"])
            self.flush()
        except Exception as error:  # full disk, GPU out of memory, missing fonts, …
            log.warning("TensorBoard lacks the final metrics (%s: %s)", type(error).__name__, error)

    def write_hparams(self, summary: Any) -> None:
        """Write the first or the last event of the run's row of the HParams page."""
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(summary)

    def pictures(self, loss: Tensor, predicted: Tensor, epoch: int) -> None:
        """Log the confusion matrix, the worst-classified images, and attention maps where the model has a class token.

        loss, predicted: of every test image, (count,) on the CPU.   epoch: step of the events.
        """
        from vix.reporting import images  # imports matplotlib, which every command would wait for

        labels, names = self.test.labels.cpu(), self.class_names
        true, guesses = labels.numpy(), predicted.numpy()
        # An array of indices keeps its dimension, even with one element.
        worst = loss.argsort(descending=True, stable=True)[:WORST].numpy()
        drawn = {
            "confusion_matrix": images.confusion_matrix(true, guesses, names),
            "worst_images": images.worst_images(self.pixels(worst), true[worst], guesses[worst], loss.numpy()[worst], names),
        }
        # One image of each of the first classes that the test images contain.
        examples = torch.stack([(labels == k).nonzero()[0, 0] for k in labels.unique()[:SHOWN]]).numpy()
        maps = [m.float().cpu().numpy() for m in class_token_maps(self.model, normalize(self.test.images[examples]))]
        if maps:
            drawn["class_token_attention"] = images.attention_maps(
                self.pixels(examples), true[examples], guesses[examples], maps, names
            )
        for name, picture in drawn.items():
            self.writer.add_image(f"test/{name}", picture, epoch, dataformats="HWC")

    def pixels(self, which: Any) -> Any:
        """Test images as an array (count, Y, X, C) of uint8."""
        return self.test.images[which].permute(0, 2, 3, 1).cpu().numpy()


def hyperparameters(run: RunDirectory) -> dict[str, str | int | float]:
    """The columns of the HParams page: the chosen options of the groups, and every key that affects the results.

    Keys that are null are omitted unless the command set them: null usually means the default, and would turn a numeric column
    into text.
    """
    columns = {name: run.identity[name] for name in CHOICES if run.identity.get(name)}
    given = settings(run.identity.get("overrides", ())).keys()
    for key, value in flatten(run.config).items():
        if key in IGNORED_ON_RESUME or key.endswith("_target_") or (value is None and key not in given):
            continue
        number_or_text = isinstance(value, int | float | str) and not isinstance(value, bool)
        columns[key] = value if number_or_text else json.dumps(value)
    return columns
