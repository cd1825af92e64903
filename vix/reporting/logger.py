"""Base class of the loggers (conf/logger/): what is logged of a run; subclasses write it to TensorBoard, MLflow or W&B."""

import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from vix.attention.inspection import class_token_maps, softmax_error
from vix.data.loader import Split, normalize
from vix.errors import ConfigError, UserError
from vix.overrides import settings
from vix.runs.identity import IGNORED_ON_RESUME, is_of_the_run
from vix.runs.results import flatten
from vix.runs.run import LOGGER_FILE, RunDirectory
from vix.system.files import write_json
from vix.system.memory import process_peak_gb

log = logging.getLogger(__name__)

CHOICES = ("experiment", "model", "attention", "embedding", "posenc", "data", "image_set", "optimizer", "init_weights")
METRICS = (
    *("top1", "top5", "best_top1", "train_loss", "test_loss"),
    *("trainable_params", "images_per_second", "seconds", "peak_gpu_allocated_gb"),
)
PROBED, SHOWN, WORST = 16, 6, 40  # number of test images for the probe, for attention maps, and with the highest loss


@dataclass
class LoggedRun:
    """What a logger logs.

    run: directory and identity of the run.
    first_epoch: the next epoch, counted from 1.
    model: evaluated for the probe and the attention maps.
    test, class_names: the evaluation images and the names of their classes.
    probe: log the error of each approximate mixer against softmax attention
        (:func:`vix.attention.inspection.softmax_error`).
    """

    run: RunDirectory
    first_epoch: int
    model: nn.Module
    test: Split
    class_names: Sequence[str]
    probe: bool


class RunLogger:
    """Context manager that logs the scalars of every epoch, the config as parameters, and final metrics and images.

    Subclasses implement ``open``, ``scalars``, ``pictures``, ``flush``, ``end`` and ``close``. Their options are keyword
    arguments of the constructor.
    """

    package: ClassVar[str] = ""  # the package that the logger needs in addition to those of this program

    def __init__(self, logged: LoggedRun) -> None:
        self.logged, self.run = logged, logged.run
        self.ended = False

    @classmethod
    def check_package(cls) -> None:
        """Raises ConfigError where the package of this logger is not installed."""
        if cls.package and importlib.util.find_spec(cls.package) is None:
            raise ConfigError(
                f"logger: {cls.__name__} needs the package {cls.package}: pip install -r requirements-loggers.txt; "
                "or use logger=tensorboard"
            )

    def open(self) -> None:
        """Begin or continue the log of the run, with its parameters."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at a step."""

    def pictures(self, drawn: Mapping[str, np.ndarray], step: int) -> None:
        """Log images (Y, X, C) of uint8 at a step."""

    def flush(self) -> None:
        """Make sure that what was logged so far is stored."""

    def end(self) -> None:
        """Record that the run is finished."""

    def close(self) -> None:
        """Close the log."""

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # ``flush`` has already reported the error
            self.close()

    def epoch(self, row: dict[str, Any], memory: dict[str, float | None]) -> None:
        """Log an epoch.

        row: of the history.   memory: :attr:`vix.system.memory.PeakMemory.gigabytes`.
        """
        values = {
            "loss/train": row["train_loss"],
            "loss/test": row["test_loss"],
            "accuracy/top1": row["top1"],
            "accuracy/top5": row["top5"],
            "train/lr": row["lr"],
            "train/images_per_second": row["images_per_second"],
            "memory/process_peak_gb": process_peak_gb(),
            **{f"memory/{name}": value for name, value in memory.items() if value is not None},
        }
        if self.logged.probe:
            evaluated = self.logged.test.images
            step = max(1, len(evaluated) // PROBED)
            errors = softmax_error(self.logged.model, normalize(evaluated[::step][:PROBED]))
            values |= {f"probe/softmax_error/layer_{i}": error for i, error in enumerate(errors)}
        self.scalars(values, row["epoch"])
        self.flush()

    def finish(self, results: dict[str, Any], loss: Tensor, predicted: Tensor) -> None:
        """Log the final metrics, and images of the predictions.

        results: of the finished run.
        loss, predicted: cross-entropy (nats) and predicted class of every test image, (count,) on the CPU.

        Never raises: the model is already trained, so an error is only logged as a warning.
        """
        try:
            final = {f"final/{name}": results[name] for name in METRICS if results[name] is not None}
            self.scalars(final, results["epochs"])
            self.end()
            self.ended = True
            self.pictures({f"test/{name}": picture for name, picture in self.draw(loss, predicted).items()}, results["epochs"])
            self.flush()
        except Exception as error:  # full disk, GPU out of memory, missing fonts, …
            log.warning("%s lacks the final metrics (%s: %s)", type(self).__name__, type(error).__name__, error)

    def draw(self, loss: Tensor, predicted: Tensor) -> dict[str, np.ndarray]:
        """The confusion matrix, the worst-classified images, and attention maps where the model has a class token.

        loss, predicted: of every test image, (count,) on the CPU.
        """
        from vix.reporting import images  # imports matplotlib, which every command would wait for

        labels, names = self.logged.test.labels.cpu(), self.logged.class_names
        true, guesses = labels.numpy(), predicted.numpy()
        # An array of indices keeps its dimension, even with one element.
        worst = loss.argsort(descending=True, stable=True)[:WORST].numpy()
        drawn = {
            "confusion_matrix": images.confusion_matrix(true, guesses, names),
            "worst_images": images.worst_images(self.pixels(worst), true[worst], guesses[worst], loss.numpy()[worst], names),
        }
        # One image of each of the first classes that the test images contain.
        examples = torch.stack([(labels == k).nonzero()[0, 0] for k in labels.unique()[:SHOWN]]).numpy()
        maps = [
            m.float().cpu().numpy() for m in class_token_maps(self.logged.model, normalize(self.logged.test.images[examples]))
        ]
        if maps:
            drawn["class_token_attention"] = images.attention_maps(
                self.pixels(examples), true[examples], guesses[examples], maps, names
            )
        return drawn

    def pixels(self, which: Any) -> Any:
        """Test images as an array (count, Y, X, C) of uint8."""
        return self.logged.test.images[which].permute(0, 2, 3, 1).cpu().numpy()


class StoreLogger(RunLogger):
    """Base class of loggers that write to a store outside of the run's directory, under an id that the directory keeps.

    An error at the start ends the run. Later ones do not: one warning says that the log is incomplete.
    """

    failed = False

    @property
    def store_id(self) -> str | None:
        """The run's id in the store, if an earlier start of the run has been logged."""
        try:
            return str(json.loads((self.run.directory / LOGGER_FILE).read_text())[type(self).__name__])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep_id(self, store_id: str) -> None:
        """Keep the run's id for later starts."""
        write_json(self.run.directory / LOGGER_FILE, {type(self).__name__: store_id})

    def __enter__(self) -> Self:
        try:
            return super().__enter__()
        except Exception as error:
            raise UserError(
                f"logger: {type(self).__name__} cannot be used ({type(error).__name__}: {' '.join(str(error).split())}); "
                "fix the cause, or use logger=tensorboard"
            ) from error

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        except Exception as error:
            self.report(error)

    def epoch(self, row: dict[str, Any], memory: dict[str, float | None]) -> None:
        try:
            super().epoch(row, memory)
        except Exception as error:
            self.report(error)

    def report(self, error: Exception) -> None:
        """Log the first error as a warning."""
        if not self.failed:
            log.warning("%s is incomplete from here on (%s: %s)", type(self).__name__, type(error).__name__, error)
        self.failed = True


def hyperparameters(run: RunDirectory) -> dict[str, str | int | float]:
    """The parameters of a run in every log: the chosen options of the groups, and every key that affects the results.

    Keys that are null are omitted unless the command set them: null usually means the default, and would turn a numeric column
    into text.
    """
    columns = {name: run.identity[name] for name in CHOICES if run.identity.get(name)}
    given = settings(run.identity.get("overrides", ())).keys()
    for key, value in flatten(run.config).items():
        ignored = key in IGNORED_ON_RESUME or not is_of_the_run(key)
        if ignored or key.endswith("_target_") or (value is None and key not in given):
            continue
        number_or_text = isinstance(value, int | float | str) and not isinstance(value, bool)
        columns[key] = value if number_or_text else json.dumps(value)
    return columns
