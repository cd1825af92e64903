"""State of a training run: everything that changes during training and is saved in a checkpoint."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from vix.system.memory import PeakMemory
from vix.system.rng import get_rng_state, set_rng_state
from vix.training.ema import ModelEMA

SCORES = ("top1", "top5", "test_loss", "class_accuracy")  # results of an evaluation


@dataclass
class Progress:
    """Progress of a run.

    loss_sum: sum of the losses of the current epoch's images, a scalar on the device.
    epoch: completed epochs.
    batch: completed batches of the current epoch.
    lr: learning rate of the last step.
    train_seconds: training time of the current epoch.
    seconds: time of the completed epochs, with evaluation and compilation.
    best: ``best_epoch``, the epoch with the highest top-1 accuracy, and its results, with ``best_`` before their names.
    best_model: state dict of that epoch's model, on the CPU.
    history: one row of results per completed epoch.
    """

    loss_sum: Tensor
    epoch: int = 0
    batch: int = 0
    lr: float = 0.0
    train_seconds: float = 0.0
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    best_model: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def end_epoch(self, row: dict[str, Any], model: nn.Module) -> None:
        """Complete the current epoch.

        row: results of the epoch, which are added to the history.
        model: the evaluated model, whose weights are copied if they are the best so far.
        """
        self.epoch, self.batch, self.train_seconds, self.loss_sum = self.epoch + 1, 0, 0.0, torch.zeros_like(self.loss_sum)
        self.history.append({"epoch": self.epoch, **row})
        if row["top1"] > self.best.get("best_top1", -1.0):
            self.best = {f"best_{name}": row[name] for name in SCORES} | {"best_epoch": self.epoch}
            self.best_model = {name: t.detach().to("cpu", copy=True) for name, t in model.state_dict().items()}


class TrainState:
    """Model, optimizer, learning-rate schedule, gradient scaler, EMA, progress, peak memory and random generators.

    model: the model that is trained, on its device.
    optimizer, lr_scheduler: its optimizer and the schedule of that optimizer's learning rate.
    dtype: autocast dtype; with float16 the gradients are scaled.
    ema_decay: decay of the EMA of the weights (:class:`vix.training.ema.ModelEMA`); None: no EMA.
    peak_memory: records the peak memory of the training steps; None: not recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LambdaLR,
        dtype: torch.dtype = torch.float32,
        ema_decay: float | None = None,
        peak_memory: PeakMemory | None = None,
    ) -> None:
        self.model, self.optimizer, self.lr_scheduler, self.dtype = model, optimizer, lr_scheduler, dtype
        self.device = next(model.parameters()).device
        self.scaler = self.new_scaler()
        self.ema = ModelEMA(model, ema_decay) if ema_decay is not None else None
        self.peak_memory = peak_memory or PeakMemory(torch.device("cpu"), 0)
        self.progress = Progress(loss_sum=torch.zeros((), device=self.device))
        # On the device: number of steps that the gradient scaler skipped because a float16 gradient overflowed.
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=self.device)
        self.unscheduled = 0  # skipped steps for which the learning-rate schedule has been corrected

    def new_scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler, enabled only with float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated and kept: the EMA if enabled, else the trained model."""
        return self.ema.module if self.ema else self.model

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.lr_scheduler.get_last_lr()[0])

    def sync_lr_scheduler(self, due: int = 0) -> None:
        """Set the schedule to the number of steps that were not skipped by the gradient scaler. Waits for the device.

        due: further steps by which the schedule advances.
        """
        skipped = int(self.skipped_steps) if self.scaler.is_enabled() else self.unscheduled
        move = due + self.unscheduled - skipped
        self.unscheduled = skipped
        if move:
            self.lr_scheduler.last_epoch += move - 1
            self.lr_scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint, in types that ``torch.load(weights_only=True)`` reads.

        ``model`` is the evaluated model's state dict. With an EMA, ``trained_model`` is the trained model's.
        """
        self.sync_lr_scheduler()
        progress = {name: value for name, value in vars(self.progress).items() if name != "best_model"}
        state: dict[str, Any] = {
            "model": self.eval_model.state_dict(),
            "best_model": self.progress.best_model,
            "optimizer": self.optimizer.state_dict(),
            "optimizer_params": parameter_names(self.optimizer, self.model),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped_steps": int(self.skipped_steps),
            "progress": progress,
            "peak_memory": self.peak_memory.state_dict(),
            "rng": get_rng_state(),
        }
        if self.ema:
            state |= {"trained_model": self.model.state_dict(), "ema_updates": self.ema.updates}
        return state

    def load_state_dict(self, state: Mapping[str, Any], steps_per_epoch: int) -> None:
        """Restore the state from a checkpoint. Options, such as the learning rate, stay those of the current config.

        state: content of the checkpoint.
        steps_per_epoch: training steps per epoch, for the position in the learning-rate schedule.
        """
        progress = {**state["progress"], "best_model": state["best_model"]}
        self.progress = Progress(**{**progress, "loss_sum": progress["loss_sum"].to(self.device)})
        names = parameter_names(self.optimizer, self.model)
        load_optimizer(self.optimizer, names, state["optimizer"], state["optimizer_params"])
        step = self.progress.epoch * steps_per_epoch + self.progress.batch
        # With a larger batch size than before, an epoch may have fewer steps than were skipped.
        self.lr_scheduler = lr_scheduler_at(self.lr_scheduler, max(0, step - state["skipped_steps"]))
        if state["scaler"]:  # empty if saved with another precision
            self.scaler.load_state_dict(state["scaler"])
        # If the EMA was disabled since, training continues with the trained weights, not the averaged ones.
        trained_model = state.get("trained_model", state["model"])
        self.model.load_state_dict(trained_model)
        if self.ema:
            self.ema.module.load_state_dict(state["model"])
            # Absent if the EMA was enabled in the middle of a run (trainer.resume=force).
            self.ema.updates = state.get("ema_updates", 0)
        self.skipped_steps.fill_(state["skipped_steps"])
        self.unscheduled = state["skipped_steps"]
        self.peak_memory.load_state_dict(state["peak_memory"])
        set_rng_state(state["rng"])


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the optimizer's parameters, in the order of its state dict."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def load_optimizer(optimizer: torch.optim.Optimizer, names: list[str], saved: dict[str, Any], saved_names: list[str]) -> None:
    """Load the state of the parameters from a state dict by name, and keep the options of the current optimizer.

    The parameters may be grouped differently than in the saved optimizer.

    optimizer: the optimizer.
    names: names of its parameters, in the order of its state dict.
    saved: the saved state dict.
    saved_names: names of the saved parameters, in the order of ``saved``.
    """
    index = {name: i for i, name in enumerate(names)}
    state = {index[saved_names[i]]: values for i, values in saved["state"].items()}
    groups = optimizer.state_dict()["param_groups"]
    if names == saved_names and [len(g["params"]) for g in groups] == [len(g["params"]) for g in saved["param_groups"]]:
        # Entries of a group other than options and the scheduler's initial_lr are state of the optimizer.
        options = {*constructor_options(type(optimizer)), "params", "initial_lr"}
        pairs = zip(saved["param_groups"], groups, strict=True)
        groups = [{**old, **{key: value for key, value in new.items() if key in options}} for old, new in pairs]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for i, (parameter, group) in enumerate(parameters):
        # NAdam keeps it on the host, like the step, but load_state_dict copies it to the parameter's device, for which every
        # step would wait. With capturable=True it belongs there.
        if "mu_product" in state.get(i, {}) and not group.get("capturable"):
            optimizer.state[parameter]["mu_product"] = state[i]["mu_product"].cpu()


def constructor_options(kind: type[torch.optim.Optimizer]) -> set[str]:
    """Names of the arguments of an optimizer's constructor, and of those of its base classes, to which it may pass them on."""
    bases = [base for base in kind.__mro__ if issubclass(base, torch.optim.Optimizer)]
    return {name for base in bases for name in inspect.signature(base).parameters}


def lr_scheduler_at(lr_scheduler: LambdaLR, step: int) -> LambdaLR:
    """A scheduler with the same schedule as ``lr_scheduler``, at step ``step``."""
    return LambdaLR(lr_scheduler.optimizer, lr_scheduler.lr_lambdas, last_epoch=step - 1)
