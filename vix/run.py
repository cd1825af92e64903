"""A run's directory: results, checkpoint, TensorBoard events, and when an earlier run in it is continued."""

import io
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vix.checks import ConfigError, UserError
from vix.distributed import highest, processes, rank
from vix.files import write_json, write_whole
from vix.results import flat

log = logging.getLogger(__name__)

# Where a run happens or how much is shown, not what it computes: these may differ when a run is continued.
NOT_IDENTITY = (
    "rerun",
    "fail_fast",
    "data.root",
    "trainer.device",
    "trainer.resume",
    "trainer.probe",
    "trainer.checkpoint_every",
    "trainer.eval_batch_size",
    "optimizer.fused",
)
# What a run costs, not what it computes: these may differ, too, but sweeps compare them, so each has a directory of its own.
COST = ("trainer.compile", "trainer.recompute")

KEPT = ("results.json", "checkpoint.pt", "checkpoint.previous.pt", "nonfinite.pt")


@dataclass
class Position:
    """How far a run has come; with the state dicts, all that is needed to continue it.

    ``batch``, ``train_seconds`` and ``loss_sum`` are of the epoch that has begun; ``rate`` is the last step's learning rate;
    ``best_model`` holds the weights, on the CPU, of the epoch in ``best``.
    """

    loss_sum: Tensor
    epoch: int = 0
    batch: int = 0
    rate: float = 0.0
    train_seconds: float = 0.0
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    best_model: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def end_epoch(self, row: dict[str, Any], model: nn.Module) -> None:
        """Add the epoch's row to the history, keep the weights if they are the best so far, and go on to the next epoch."""
        self.epoch, self.batch, self.train_seconds, self.loss_sum = self.epoch + 1, 0, 0.0, torch.zeros_like(self.loss_sum)
        self.history.append({"epoch": self.epoch, **row})
        if row["top1"] > self.best.get("best_top1", -1.0):
            self.best = {"best_top1": row["top1"], "best_top5": row["top5"], "best_epoch": self.epoch}
            self.best_model = {name: t.detach().to("cpu", copy=True) for name, t in model.state_dict().items()}


class Run:
    """What one training run writes into its directory.

    directory: exists already, and holds what an earlier start of the same run left.
    identity: the fields of results.json that are known before training.
    config: the composed config as plain containers.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], config: dict[str, Any]) -> None:
        self.directory, self.config = directory, config
        self.results_path, self.checkpoint_path = directory / "results.json", directory / "checkpoint.pt"
        self.previous_path = directory / "checkpoint.previous.pt"
        self.identity = identity
        self.earlier = read_results(self.results_path)
        kept = {k: v for k, v in self.earlier.items() if k not in ("error", "traceback")}
        self.results = {**kept, "status": "running", **identity, "config": config}

    def finished(self, resume: str) -> dict[str, Any] | None:
        """The results of an earlier start that finished this very run, else None.

        Raises ConfigError where it finished with another config and ``resume`` is ``auto``.
        """
        if self.earlier.get("status") != "finished":
            return None
        changed = self.refuse_other_config(self.earlier["config"], resume)
        return None if changed else self.earlier

    def refuse_other_config(self, saved: dict[str, Any], resume: str) -> list[str]:
        """The keys in which this config differs from the saved one. Raises ConfigError if there are any, unless forced."""
        then, now = flat(saved), flat(self.config)
        changed = [k for k in sorted({*then, *now}) if then.get(k) != now.get(k) and k not in (*NOT_IDENTITY, *COST)]
        if changed and resume != "force":
            keys = ", ".join(f"{k} was {then.get(k)} and is {now.get(k)}" for k in changed)
            raise ConfigError(
                f"trainer.resume: {self.directory} holds a run with another config ({keys}); "
                "start over with rerun=true, or continue all the same with trainer.resume=force"
            )
        return changed

    def write_results(self, **fields: Any) -> None:
        """Add fields to results.json and write it, whole or not at all."""
        self.results |= fields
        if rank() == 0:
            write_json(self.results_path, self.results)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write checkpoint.pt, whole or not at all, and keep the one before it as checkpoint.previous.pt."""
        if rank() > 0:
            return
        if self.checkpoint_path.exists():
            link = self.directory / ".checkpoint.previous.tmp"
            link.unlink(missing_ok=True)
            os.link(self.checkpoint_path, link)  # so there is a checkpoint.pt at every moment
            link.replace(self.previous_path)
            link.unlink(missing_ok=True)  # still there where both names were one file, after a kill at this very place
        write_tensors(self.checkpoint_path, {**state, "config": self.config})

    def load_checkpoint(self, resume: str) -> dict[str, Any] | None:
        """State to continue from, or None to start; from checkpoint.previous.pt where checkpoint.pt is damaged.

        Raises ConfigError where it was trained with another config (unless ``resume`` is ``force``), and UserError where no
        checkpoint can be read. Nothing in a checkpoint is ever executed.
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
            self.refuse_other_config(state["config"], resume)
            return state
        if damaged:
            raise UserError(f"{'; '.join(damaged)}; start over with rerun=true")
        return None

    def discard_if_empty(self) -> None:
        """Remove the directory that Hydra made for a run that was refused before it wrote anything."""
        if rank() == 0 and not self.results_path.exists() and not self.checkpoint_path.exists():
            shutil.rmtree(self.directory / ".hydra", ignore_errors=True)
            for name in (".lock", "train.log"):
                (self.directory / name).unlink(missing_ok=True)
            with suppress(OSError):  # something else is in there: it stays
                self.directory.rmdir()
                self.directory.parent.rmdir()

    def set_aside(self) -> None:
        """Move what an earlier run left in the directory into ``previous-1``, ``previous-2``, …; nothing is deleted."""
        old = [p for p in self.directory.iterdir() if p.name in KEPT or p.name.startswith("events.")]
        if old:
            number = 1 + sum(1 for _ in self.directory.glob("previous-*"))
            aside = self.directory / f"previous-{number}"
            aside.mkdir()
            for path in old:
                path.rename(aside / path.name)
            log.info("The earlier run was moved to %s", aside)
        self.earlier = {}
        self.results = {"status": "running", **self.identity, "config": self.config}


def read_results(path: Path) -> dict[str, Any]:
    """The contents of a results.json; nothing where it is absent or no such file."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) and "config" in results and "status" in results else {}


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """``trainable_params``: all that receive a gradient; ``weight_bias_params``: the paper's count, which takes only
    parameters called weight or bias (position tables, class tokens and Linformer's projections are none)."""
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    counted = sum(n for name, n in trainable.items() if name.rpartition(".")[2] in ("weight", "bias"))
    return {"trainable_params": sum(trainable.values()), "weight_bias_params": counted}


def saved_megabytes(state: dict[str, Tensor]) -> float:
    """Size of a state dict as torch.save writes it, in MB (10⁶ bytes)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell() / 1e6


def write_tensors(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` as torch.save does, whole or not at all. Raises UserError."""
    buffer = io.BytesIO()  # written by itself torch.save reports a full disk without saying so
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint.pt, on the CPU. Raises UserError, naming the file, where it is no sound checkpoint."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        reason = "it holds code, which is never run" if "weights_only" in str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or no checkpoint ({reason})") from error
    if not (isinstance(state, dict) and {"model", "best_model", "config", "position"} <= set(state)):
        raise UserError(f"{path} is damaged or no checkpoint (it is of another program)")
    return state


class StopRequest:
    """Notes SIGINT and SIGTERM in its context, so that a run can stop between two steps with everything saved.

    In a thread other than the main one, where a program may keep its runs, Python hears no signals and none are noted.
    """

    signal: int | None = None
    breaks_off = False

    def __enter__(self) -> Self:
        heard = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM) if threading.current_thread() is threading.main_thread() else ()
        self.before = {number: signal.signal(number, self.note) for number in heard}
        return self

    def note(self, number: int, _: object) -> None:
        if number != signal.SIGALRM:
            self.signal = number
        if self.breaks_off and self.signal:
            # Python drops what is raised where it frees an object or is called from C: again in a second, until it does not.
            signal.setitimer(signal.ITIMER_REAL, 1.0)
            raise SystemExit(128 + self.signal)

    @contextmanager
    def at_once(self, leave: Callable[[], None]) -> Iterator[None]:
        """Context of what takes long and can be broken off: a signal does so, and ``leave`` is called."""
        self.breaks_off = True
        try:
            yield
        except SystemExit:
            self.breaks_off = False  # a second signal does not break off the saving
            leave()
            raise
        finally:
            self.breaks_off = False
            if self.signal:
                signal.setitimer(signal.ITIMER_REAL, 0.0)

    def agreed(self, ask: bool) -> int | None:
        """The signal that any process of this run was sent; None where that is not the moment to ``ask`` the others."""
        if processes() > 1:  # they stop together or not at all
            if not ask:
                return None
            self.signal = highest(self.signal or 0) or None
        return self.signal

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
