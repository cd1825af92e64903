"""One training step: gradients in micro-batches under autocast, then the update."""

import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from vix.distributed import highest, parallel, processes, share, total
from vix.ema import ModelEMA
from vix.memory import out_of_memory, release_memory
from vix.models.recompute import Recompute, recompute_blocks
from vix.resume import load_optimizer, parameter_names, scheduler_at
from vix.runtime import get_rng_state, set_rng_state

log = logging.getLogger(__name__)

SPARE_BYTES = 2**25  # for what a run takes beside its steps: threads that write events, a checkpoint, gaps between blocks


@dataclass
class Learner:
    """A model with what trains it: forward, loss and backward of a batch, then the optimizer's update.

    micro_batch: images at a time, whose gradients add up to the whole batch's; None takes the batch at once.
    clip_norm: largest norm of the gradient; None does not clip.
    ema_decay: decay of the exponential moving average of the weights (:class:`vix.ema.ModelEMA`). None keeps no average.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    dtype: torch.dtype  # of autocast; float32 does without
    micro_batch: int | None
    clip_norm: float | None
    label_smoothing: float
    ema_decay: float | None = None
    recompute: Recompute = None  # of the model's blocks
    alone: bool = False  # whether to take no notice of the other processes of this run
    hooks: list[Callable[[int], None]] = field(init=False)
    autocast: torch.autocast = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    forward: nn.Module = field(init=False)  # the model, among the processes of this run
    average: ModelEMA | None = field(init=False, default=None)
    skipped_steps: Tensor = field(init=False)  # on the device: steps that float16's scaling skipped as a gradient overflowed
    unscheduled: int = field(init=False, default=0)  # of these, the ones for which the schedule did not step
    compiled: Callable[..., Tensor] | None = field(init=False, default=None)  # mean_loss, for micro-batches of one size only
    compiled_size: int = field(init=False, default=0)
    graphed: bool = field(init=False, default=False)  # whether compiled's next call overwrites the gradients of its last
    broken: Tensor = field(init=False)  # on the device: whether a loss or gradient was not finite in any step so far

    def __post_init__(self) -> None:
        recompute_blocks(self.model, self.recompute)
        modules = self.model.modules()
        self.hooks = [getattr(m, "on_train_step") for m in modules if hasattr(m, "on_train_step")]  # noqa: B009
        device = next(self.model.parameters()).device
        self.broken = torch.zeros((), dtype=torch.bool, device=device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.autocast = torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)
        self.scaler = self.new_scaler()
        self.forward = self.model if self.alone else parallel(self.model)
        if self.ema_decay is not None:
            self.average = ModelEMA(self.model, self.ema_decay)

    def new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.autocast.device, enabled=self.dtype is torch.float16)

    @property
    def kept(self) -> nn.Module:
        """The model that is tested and kept: the average where there is one."""
        return self.average.module if self.average else self.model

    @property
    def rate(self) -> float:
        """Learning rate of the coming step."""
        return float(self.schedule.get_last_lr()[0])

    def gradients(self, number: int, images: Tensor, labels: Tensor) -> Tensor:
        """Leave the gradients of the mean loss in the parameters, clipped, and return that loss (a scalar on the device).

        labels: (B,) or, for mixed images, the classes' shares (B, K).
        number: steps of the run before this one, for mixers that do something every so many.
        """
        for hook in self.hooks:
            hook(number)
        loss = torch.zeros((), device=images.device)
        batch, copies = len(labels), 1
        if not self.alone:
            # The mean over the processes' gradients makes so much less of each one's.
            images, labels, copies = own_share(images, labels)
        size = self.micro_batch or len(labels)
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        if self.graphed and len(parts) > 1:
            for p in self.model.parameters():  # memory of their own, to which each part's gradients are added
                p.grad = torch.zeros_like(p)
        for i, (some_images, some_labels) in enumerate(parts, 1):
            with self.gradients_meet(i == len(parts)):
                with self.autocast:
                    compute = self.compiled if self.compiled and len(some_labels) == self.compiled_size else mean_loss
                    part = compute(self.forward, some_images, some_labels, self.label_smoothing)
                    part = part * (len(some_labels) * copies / batch)
                self.scaler.scale(part).backward()
            loss += part.detach().float()
        if not self.alone:
            loss = total(loss) / processes()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm, norm)
        # An overflowing gradient is float16's everyday business: its scaler skips the step and lowers the scale.
        healthy = loss.isfinite() if self.scaler.is_enabled() else loss.isfinite() & norm.isfinite()
        self.broken |= ~healthy
        return loss

    def gradients_meet(self, last: bool) -> AbstractContextManager[None]:
        """Context of a micro-batch: the processes' gradients are brought together in the last one's."""
        return self.forward.no_sync() if isinstance(self.forward, DistributedDataParallel) and not last else nullcontext()

    def update(self) -> None:
        """Move the parameters along their gradients, forget these, and go on to the next learning rate.

        On a GPU the host does not wait to learn whether float16's scaling skipped the step: ``sync_schedule`` takes the
        schedule back later. Optimizers without a fused kernel do wait, within ``GradScaler.step``.
        """
        self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            (found_inf,) = self.scaler._found_inf_per_device(self.optimizer).values()
            self.skipped_steps += found_inf > 0
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_steps.is_cpu:
            self.sync_schedule(coming=1)
        else:
            self.schedule.step()
        if self.average:
            self.average.update(self.model)

    @property
    def skipped(self) -> int:
        """Steps that float16's scaling skipped. Waits for the device."""
        return int(self.skipped_steps)

    def sync_schedule(self, coming: int = 0) -> None:
        """Let the schedule be as many steps on as the optimizer, which some steps skipped. Waits for the device.

        coming: steps of the schedule that are due besides.
        """
        skipped = self.skipped if self.scaler.is_enabled() else self.unscheduled
        move = coming + self.unscheduled - skipped
        self.unscheduled = skipped
        if move:
            self.schedule.last_epoch += move - 1
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint must hold of it; ``model`` is the kept one, and ``trained_model`` that behind an average."""
        self.sync_schedule()
        parts = {name: getattr(self, name).state_dict() for name in ("optimizer", "schedule", "scaler")}
        state = {"model": self.kept.state_dict(), **parts, "skipped": self.skipped}
        state["optimizer_params"] = parameter_names(self.optimizer, self.model)
        if self.average:
            state |= {"trained_model": self.model.state_dict(), "averaged_steps": self.average.updates}
        return state

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go on from a checkpoint before step number ``step``, with the options that this learner was made with."""
        names = parameter_names(self.optimizer, self.model)
        load_optimizer(self.optimizer, names, state["optimizer"], state["optimizer_params"])
        self.schedule = scheduler_at(self.schedule, step - state["skipped"])
        if state["scaler"]:  # empty where another precision did without
            self.scaler.load_state_dict(state["scaler"])
        # Without an average any more it is the weights behind it that train on.
        self.kept.load_state_dict(state["model"] if self.average else state.get("trained_model", state["model"]))
        if self.average:
            # Absent where trainer.resume=force begins to average in the middle of a run.
            self.model.load_state_dict(state.get("trained_model", state["model"]))
            self.average.updates = state.get("averaged_steps", 0)
        self.skipped_steps.fill_(state["skipped"])
        self.unscheduled = self.skipped
        self.broken.zero_()


def mean_loss(model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)


def own_share(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """This process's share of a batch and the number of shares; an image with a 0 where there is none left for it."""
    if len(share(labels)):
        return share(images), share(labels), processes()
    return images[:1], labels[:1], 0


@contextmanager
def without_trace(learner: Learner) -> Iterator[None]:
    """Context for a trial: gradients, buffers, gradient scaling and random generators are afterwards as they were."""
    rng, buffers = get_rng_state(), [buffer.clone() for buffer in learner.model.buffers()]
    scaler, trial_scaler = learner.scaler, learner.new_scaler()
    if scaler.is_enabled():
        trial_scaler.load_state_dict(scaler.state_dict())
    learner.scaler = trial_scaler  # it notes that gradients were unscaled, and does so once for each update
    try:
        yield
    finally:
        learner.scaler = scaler
        learner.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(learner.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        learner.broken.zero_()
        set_rng_state(rng)


def largest_micro_batch(learner: Learner, images: Tensor, labels: Tensor) -> int:
    """The largest of the batch size, its half, its quarter, … at which the gradients of this batch fit the device's memory.

    Tries them, with room for an Adam's state and a little more, and leaves no trace. Raises the device's out-of-memory error
    where not even single images fit.
    """
    images, labels, _ = own_share(images, labels)
    size = len(labels)
    try:
        while not fits(learner, size, images, labels):
            size = math.ceil(size / 2)
            release_memory(images.device)
    finally:
        release_memory(images.device)
    size = -highest(-size)  # the lowest
    log.info("Micro-batch: %d images of %d fit the memory", size, len(labels))
    return size


def fits(learner: Learner, size: int, images: Tensor, labels: Tensor) -> bool:
    """Whether the memory suffices for the gradients of a batch in micro-batches of this size, and what a run needs besides.

    Raises the out-of-memory error where the size is 1. All that a failed trial holds, also by the error's traceback, is
    released with the frame of this function.
    """
    adam_bytes = 2 * sum(p.nbytes for p in learner.model.parameters())
    try:
        with without_trace(learner):
            room = torch.empty(adam_bytes + SPARE_BYTES, dtype=torch.uint8, device=images.device)
            replace(learner, micro_batch=size, ema_decay=None, alone=True).gradients(0, images, labels)
            del room
    except Exception as error:
        if size == 1 or not out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()  # frames and errors that refer to one another
    return True
