"""TensorBoard events of a run, written to the run's directory."""

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import FileWriter, SummaryWriter
from torch.utils.tensorboard.summary import hparams

from vix.errors import UserError
from vix.reporting.logger import RunLogger, hyperparameters


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


class TensorBoard(RunLogger):
    """Event files, with the config as text and a row of the HParams page."""

    def open(self) -> None:
        # Purge epochs that an earlier start logged after its last checkpoint: they are repeated.
        self.writer = EventWriter(str(self.run.directory), purge_step=self.logged.first_epoch)
        self.writer.add_text("config", f"```json\n{json.dumps(self.run.config, indent=2)}\n```")
        # PyTorch's list of all columns is omitted: TensorBoard would use one run's list for all runs, whose keys may differ.
        _, start, self.last = hparams(hyperparameters(self.run), {})
        self.write_hparams(start)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def pictures(self, drawn: Mapping[str, np.ndarray], step: int) -> None:
        for name, picture in drawn.items():
            self.writer.add_image(name, picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Write the buffered events to disk. Raises UserError where that fails."""
        try:
            self.writer.flush()
        except OSError as error:
            raise UserError(f"cannot write TensorBoard's events into {self.run.directory} ({error.strerror})") from error

    def end(self) -> None:
        self.write_hparams(self.last)

    def close(self) -> None:
        self.writer.close()

    def write_hparams(self, summary: Any) -> None:
        """Write the first or the last event of the run's row of the HParams page."""
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(summary)
