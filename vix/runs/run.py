"""A run's directory: results, checkpoints, TensorBoard events; and whether an earlier run in it is resumed."""

import csv
import io
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from vix.errors import ConfigError, UserError
from vix.runs.checkpoint import read_checkpoint, write_tensors
from vix.runs.identity import (
    IGNORED_ON_RESUME,
    PERFORMANCE_KEYS,
    Changes,
    changed_keys,
    changes_row,
    check_changeable,
    with_defaults,
)
from vix.runs.results import COST_FILE, UNFINISHED, flatten, wrong_fields
from vix.system.distributed import rank
from vix.system.files import atomic_write, link_or_copy, nan_to_none, write_json

log = logging.getLogger(__name__)

LOGGER_FILE = "logger.json"  # the run's id in a store outside of its directory (vix/reporting/logger.py)
KEPT = (
    "results.json",
    "metrics.csv",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "nonfinite.pt",
    COST_FILE,
    LOGGER_FILE,
    "model.onnx",
    "model.pt2",
)
STAGING = ".previous.tmp"  # temporary directory while an earlier run is archived
# Further fields that the table of a finished run requires.
SHOWN = ("name", "best_epoch", "train_loss", "checkpoint_mb", "images_per_second", "seconds", "device", "precision")
# Fields of results.json that a checkpoint stores elsewhere, or that describe only one start.
NOT_IN_CHECKPOINT = ("config", "error", "traceback")


class RunDirectory:
    """The directory of one run: its results.json and its checkpoints.

    directory: must exist; it may contain the files of an earlier start of the same run.
    identity: fields of results.json that are known before training.
    config: the composed config as plain containers.
    rerun_token: of the sweep with ``rerun=true`` that this run is a job of; empty for any other run.

    Of several processes, only rank 0 writes.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], config: dict[str, Any], rerun_token: str = "") -> None:
        self.directory, self.config, self.rerun_token = directory, config, rerun_token
        self.results_path, self.checkpoint_path = directory / "results.json", directory / "checkpoint.pt"
        self.previous_path = directory / "checkpoint.previous.pt"
        self.identity = identity
        self.begun = False  # whether this start has written results or a checkpoint
        self.checkpoint_damaged = False  # checkpoint.pt: then checkpoint.previous.pt is the only good one, and must stay
        self.results: dict[str, Any] = {}
        self.reset_results({})

    def reset_results(self, previous_results: dict[str, Any]) -> None:
        """Start from the results of an earlier start; empty for a new run."""
        kept = {key: value for key, value in previous_results.items() if key not in NOT_IN_CHECKPOINT}
        self.results = {**kept, "status": "running", **self.identity, "config": self.config}

    def add_identity(self, **fields: Any) -> None:
        """Add fields that are known before training, but not yet when the object is constructed."""
        self.identity |= fields
        self.results |= fields

    @cached_property
    def previous_results(self) -> dict[str, Any]:
        """Results of earlier starts: results.json, or where it is missing or damaged, the copy in the checkpoint.

        Empty where there is neither. Writes nothing.
        """
        results = read_results(self.results_path)
        if results:
            return results
        state = None
        with suppress(UserError):  # reported when the checkpoint is loaded
            state = self.read_newest_checkpoint()
        damaged = self.results_path.exists()
        if state is None:
            if damaged:
                log.warning("%s is damaged, or not a run's", self.results_path)
            return {}
        epoch, trainer = state["progress"]["epoch"], state["config"]["trainer"]
        done = training_is_over(epoch, state["progress"]["best"], trainer["epochs"], trainer.get("patience"))
        if done or damaged:
            log.warning("%s is %s: restored from the checkpoint", self.results_path, "damaged" if damaged else "missing")
        ending = {"status": "finished", "stopped_early": epoch < trainer["epochs"]} if done else {"status": "interrupted"}
        return {**state["results"], **ending, "config": state["config"]}

    def prepare(self, rerun: bool, resume: str, check: Callable[[], object]) -> dict[str, Any] | None:
        """Handle an earlier run in the directory, and return its results where this run is already finished, else None.

        Files that a new start would overwrite are archived, too, where nothing can continue them.

        rerun: archive the earlier run, unless it belongs to this rerun: then it is resumed, or already finished. Otherwise a
            command that a cluster scheduler repeats until it succeeds would never finish.
        resume: ``trainer.resume``.
        check: called before the earlier run is archived; raises where this run cannot start.

        Raises ConfigError where the earlier run cannot be resumed, and UserError where its files cannot be moved.
        """
        self.undo_archiving()
        belongs = rerun and self.belongs_to_rerun()
        if rerun and not belongs:
            self.check_weights_stay()
        if (rerun and not belongs) or self.cannot_be_continued():
            check()
            self.archive_previous()
        if rerun:
            self.add_identity(started_by_rerun=self.rerun_token or True)
        if rerun and not belongs:
            return None
        if belongs and self.previous_results.get("status", "finished") != "finished":
            log.info("Resuming an interrupted rerun; delete its checkpoint*.pt to start over")
        finished_results = self.finished_results(resume)
        if finished_results and finished_results["status"] != read_results(self.results_path).get("status"):
            write_json(self.results_path, finished_results)
        if not finished_results:
            self.reset_results(self.previous_results)
        return finished_results

    def check_weights_stay(self) -> None:
        """Raises ConfigError where ``trainer.init_from`` is one of this run's own files, which are to be archived."""
        source = self.config["trainer"].get("init_from")
        if source is None:
            return
        path = Path(source).expanduser()
        path = path / self.checkpoint_path.name if path.is_dir() else path
        if path.name in KEPT and path.parent.resolve() == self.directory.resolve():
            raise ConfigError(
                f"trainer.init_from={source}: rerun=true moves the files of that run; choose another directory for this one "
                "with hydra.run.dir=DIR"
            )

    def cannot_be_continued(self) -> bool:
        """Whether there are results without a checkpoint, of a run that is not finished, or that cannot be read."""
        if any(path.exists() for path in (self.checkpoint_path, self.previous_path)):
            return False
        if self.previous_results:
            trained = self.previous_results.get("epochs") or (self.directory / "metrics.csv").exists()
            lost = self.previous_results["status"] != "finished" and bool(trained)
        else:
            lost = any((self.directory / name).exists() for name in ("results.json", "metrics.csv"))
        if lost:
            log.warning("What is in %s cannot be continued, because there is no checkpoint", self.directory)
        return lost

    def finished_results(self, resume: str) -> dict[str, Any] | None:
        """The results where an earlier start finished this run, else None.

        Raises ConfigError where it finished with another config and ``resume`` is ``auto``, or on other images.
        """
        if self.previous_results.get("status") != "finished":
            return None
        changed = self.check_same_run(self.previous_results["config"], self.previous_results, resume)
        return None if changed else self.previous_results

    def belongs_to_rerun(self) -> bool:
        """Whether ``rerun=true`` started the earlier run, which has this config and image set, and is either interrupted, or
        finished as a job of the same rerun of a sweep."""
        previous_results = self.previous_results
        started_by, finished = previous_results.get("started_by_rerun"), previous_results.get("status") == "finished"
        if not started_by or (finished and started_by != self.rerun_token):
            return False
        try:
            self.check_same_run(previous_results["config"], previous_results, "auto")
            if not finished:
                self.load_checkpoint("auto")
        except UserError:  # another run, or damaged
            return False
        return True

    def check_same_run(self, config: dict[str, Any], results: Mapping[str, Any], resume: str) -> Changes:
        """The keys in which this config differs from that of the earlier run, with both values.

        config, results: of the earlier run.
        resume: ``trainer.resume``.

        Raises ConfigError where the configs differ and ``resume`` is ``auto``, or where the image sets or the initial weights
        differ.
        """
        here, image_set = self.identity.get("image_set"), results.get("image_set")
        changed = self.changes_since(config, results)
        if image_set and here and image_set != here:
            raise ConfigError(
                f"data.root: {self.directory} holds a run on other images ({image_set}, this run: {here}); start over "
                "with rerun=true, or choose another directory with hydra.run.dir=DIR"
            )
        if not self.has_initial_weights(config, results):
            source = self.config.get("trainer", {}).get("init_from")
            if source is not None and "init_weights" not in self.identity:
                reason = "contains no weights" if os.path.exists(Path(source).expanduser()) else "there is no such run or file"
                raise ConfigError(f"trainer.init_from={source}: {reason}; pass the directory of a run, or a checkpoint")
            began, begins = results.get("init_weights", "none"), self.identity.get("init_weights", "none")
            raise ConfigError(
                f"trainer.init_from: {self.directory} holds a run that started from other weights ({began}, this run: "
                f"{begins}); start over with rerun=true, or choose another directory with hydra.run.dir=DIR"
            )
        over = all(has_ended(results, trained) for trained in (config, self.config))
        if changed and (over or resume != "force"):
            keys = ", ".join(f"{key} was {then} and is {now}" for key, (then, now) in changed.items())
            resumable = self.checkpoint_path.exists() or self.previous_path.exists()
            other = "choose another directory with hydra.run.dir=DIR"
            if resumable and over:
                other = "train more epochs under the new config with trainer.epochs=N trainer.resume=force"
            elif resumable:
                other = "continue under the new config with trainer.resume=force"
            ended = ", whose epochs are all done" if over else ""
            raise ConfigError(
                f"trainer.resume: {self.directory} holds a run with another config ({keys}){ended}; "
                f"start over with rerun=true, or {other}"
            )
        return changed

    def changes_since(self, config: dict[str, Any], results: Mapping[str, Any]) -> Changes:
        """The keys in which this config differs from that of an earlier run. Arguments as for ``check_same_run``."""
        then, now = flatten(config), flatten(self.config)
        then, now = with_defaults(then, results, now), with_defaults(now, self.identity, then)
        return changed_keys(then, now, (*IGNORED_ON_RESUME, *PERFORMANCE_KEYS))

    def has_initial_weights(self, config: dict[str, Any], results: Mapping[str, Any]) -> bool:
        """Whether an earlier run started from the same weights as this one: by their content, or by the path where it is gone.

        config, results: of the earlier run.
        """
        began, begins = results.get("init_weights"), self.identity.get("init_weights")
        if began and begins:
            return bool(began == begins)
        source, earlier = (c.get("trainer", {}).get("init_from") for c in (self.config, config))
        return bool(source == earlier)

    def write_results(self, **fields: Any) -> None:
        """Add fields to results.json and write it atomically, and metrics.csv, which has a row per epoch of the history."""
        self.begun = True
        self.results |= fields
        if rank() == 0:
            # results.json last: once it says that the run is finished, everything else is written.
            if history := self.results.get("history"):
                atomic_write(self.directory / "metrics.csv", metrics_csv(history, self.results.get("class_names", ())))
            write_json(self.results_path, self.results)

    def write_failure(self, **fields: Any) -> None:
        """``write_results`` for a start that failed.

        Where it failed before it resumed or archived an earlier run, the results of that run are kept: only the status of an
        unfinished one changes, and of a file that cannot be read, nothing.
        """
        if not self.begun and (self.results_path.exists() or self.previous_results):
            if self.previous_results.get("status", "finished") == "finished":
                return
            self.results = dict(self.previous_results)
        self.write_results(**fields)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write checkpoint.pt atomically, and keep the previous one as checkpoint.previous.pt.

        The checkpoint includes the results so far, so that results.json can be restored from it.
        """
        self.begun = True
        if rank() > 0:
            return
        if self.checkpoint_path.exists() and not self.checkpoint_damaged:
            link_or_copy(self.checkpoint_path, self.previous_path)  # checkpoint.pt exists at all times
        kept = {key: value for key, value in self.results.items() if key not in NOT_IN_CHECKPOINT}
        plain = json.loads(json.dumps(nan_to_none(kept)))  # types that weights_only=True can load
        write_tensors(self.checkpoint_path, {**state, "config": self.config, "results": plain})
        self.checkpoint_damaged = False

    def read_newest_checkpoint(self) -> dict[str, Any] | None:
        """Load checkpoint.pt, or checkpoint.previous.pt where the former is damaged or missing; None where both are missing.

        Raises UserError where neither can be read.
        """
        damaged = []
        for path in (self.checkpoint_path, self.previous_path):
            if not path.exists():
                continue
            try:
                state = read_checkpoint(path)
            except UserError as error:
                damaged.append(str(error))
                continue
            for message in damaged:
                log.warning("%s; continuing from %s instead", message, path.name)
            self.checkpoint_damaged = bool(damaged)
            return state
        if damaged:
            raise UserError(f"{'; '.join(damaged)}; start over with rerun=true")
        return None

    def load_checkpoint(self, resume: str) -> dict[str, Any] | None:
        """The checkpoint to resume from, or None for a new run; checkpoint.previous.pt where checkpoint.pt is damaged.

        resume: ``trainer.resume``.

        Raises ConfigError where the config differs (with ``resume=force`` only for options that cannot change) or the images
        differ, and UserError where no checkpoint can be read. Code in a checkpoint is never executed.
        """
        state = self.read_newest_checkpoint()
        if state is None:
            if self.previous_results.get("status") == "finished":
                raise ConfigError(
                    f"trainer.resume={resume}: the run in {self.directory} is finished and its checkpoint is missing, so it "
                    "cannot be continued; start over with rerun=true"
                )
            return None
        changed = self.check_same_run(state["config"], state["results"], resume)
        check_changeable(changed, state["progress"]["epoch"], state["progress"]["batch"], self.directory)
        return state

    def resume_from(self, state: dict[str, Any] | None) -> Changes:
        """Load the results so far from a checkpoint, and add an entry to ``config_changes`` where the config differs.

        state: the checkpoint; None where there is none, and training starts at the first epoch.

        Returns the changed keys.
        """
        if state is None:
            self.reset_results({key: value for key, value in self.results.items() if key == "started_by_rerun"})
            return {}
        self.reset_results(state["results"])
        changed = self.changes_since(state["config"], state["results"])
        if changed:
            row = changes_row(changed, state["progress"]["epoch"], state["progress"]["batch"])
            self.results["config_changes"] = [*self.results.get("config_changes", ()), row]
        return changed

    def precision(self, name: str, changed: Changes) -> str:
        """``trainer.precision``; with ``auto``, a resumed run keeps its precision even on other hardware."""
        begun = self.results.get("precision")
        return begun if name == "auto" and begun and "trainer.precision" not in changed else name

    def archive_previous(self) -> None:
        """Move the files of an earlier run into ``previous-N``, where N is one more than the highest existing number.

        Either all files are moved or, with a UserError, none. If the process is killed meanwhile, the next start calls
        ``undo_archiving``.
        """
        old = [p for p in self.directory.iterdir() if p.name in KEPT or p.name.startswith("events.")]
        if old:
            staging = self.directory / STAGING
            try:
                staging.mkdir()
                for path in old:
                    path.rename(staging / path.name)
                archive = self.make_archive()
                staging.rename(archive)  # over the empty directory
            except OSError as error:
                self.undo_archiving()
                raise UserError(
                    f"cannot archive the earlier run in {self.directory} ({error.filename}: {error.strerror}); it is "
                    "unchanged. Fix the cause and run the same command again"
                ) from error
            log.info("The earlier run was moved to %s", archive)
        self.previous_results = {}
        self.reset_results({})

    def make_archive(self) -> Path:
        """A new, empty directory ``previous-N``."""
        while True:
            numbers = [int(found[1]) for p in self.directory.iterdir() if (found := re.fullmatch(r"previous-(\d+)", p.name))]
            archive = self.directory / f"previous-{max(numbers, default=0) + 1}"
            with suppress(FileExistsError):  # another process has just created it
                archive.mkdir()
                return archive

    def undo_archiving(self) -> None:
        """Move the files of a partly archived run back."""
        staging = self.directory / STAGING
        if not staging.is_dir():
            return
        moved = [(path, self.directory / path.name) for path in staging.iterdir()]
        if any(back.exists() for _, back in moved):  # without locks, another run may have started meanwhile
            staging.rename(self.make_archive())
            return
        for path, back in moved:
            path.rename(back)
        staging.rmdir()


def has_ended(results: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a run with these results has nothing left to train with this config."""
    trainer = config.get("trainer", {})
    epochs = trainer.get("epochs")
    return epochs is not None and training_is_over(results.get("epochs", 0), results, epochs, trainer.get("patience"))


def training_is_over(epoch: int, best: Mapping[str, Any], epochs: int, patience: int | None) -> bool:
    """Whether a run has done all of its epochs, or stops early.

    epoch: completed epochs.
    best: with ``best_epoch``, the epoch with the highest top-1 accuracy; empty before the first epoch.
    epochs, patience: options of the trainer.
    """
    return epoch >= epochs or (patience is not None and epoch - best.get("best_epoch", 0) >= patience)


def metrics_csv(history: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> bytes:
    """The history as CSV: a row per epoch, with a column per class for its accuracy.

    history: rows of results.json's ``history``.
    class_names: names of the classes, in the order of the labels.
    """
    rows = []
    for epoch in history:
        row = {key: value for key, value in epoch.items() if key != "class_accuracy"}
        of_classes = zip(class_names, epoch.get("class_accuracy", ()), strict=False)  # absent in epochs of older runs
        rows.append(nan_to_none(row | {f"class_accuracy/{name}": value for name, value in of_classes}))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")  # a folder's name need not be valid UTF-8


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json; empty where it is missing or damaged. Raises UserError where reading is not permitted."""
    try:
        results = json.loads(path.read_bytes())
    except PermissionError as error:
        raise UserError(f"{path}: permission denied; change its permissions, or choose another directory") from error
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(results, dict) or not isinstance(results.get("config"), dict):
        return {}
    if results.get("status") not in UNFINISHED:
        whole = results.get("status") == "finished" and not any(wrong_fields(results))
        return results if whole and not any(results.get(key) is None for key in SHOWN) else {}
    return results
