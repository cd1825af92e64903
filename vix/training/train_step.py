"""One training step: forward and backward in micro-batches under autocast, then the optimizer's step."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vix.layers.checkpointing import ActivationCheckpointing, set_activation_checkpointing
from vix.system.distributed import all_reduce_sum, shard, world_size, wrap_ddp
from vix.training.state import TrainState


@dataclass
class TrainStep:
    """Trains a :class:`vix.training.state.TrainState` by one batch at a time.

    micro_batch: images at a time, whose gradients add up to the batch's; None computes the batch at once.
    clip_norm: largest norm of the gradient; None does not clip.
    label_smoothing: of the cross-entropy, in [0, 1).
    activation_checkpointing: of the model's blocks (:mod:`vix.layers.checkpointing`).
    distributed: whether the batch is split over the processes of this run.
    """

    state: TrainState
    micro_batch: int | None = None
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    activation_checkpointing: ActivationCheckpointing = None
    distributed: bool = True
    hooks: list[Callable[[int], None]] = field(init=False)
    autocast: torch.autocast = field(init=False)
    forward: nn.Module = field(init=False)  # the model, wrapped for several processes
    compiled: Callable[..., Tensor] | None = field(init=False, default=None)  # mean_loss, for micro-batches of one size only
    compiled_size: int = field(init=False, default=0)
    uses_cuda_graphs: bool = field(init=False, default=False)  # then the next call of ``compiled`` overwrites the gradients
    found_nonfinite: Tensor = field(init=False)  # on the device: whether any loss or gradient so far was not finite

    def __post_init__(self) -> None:
        model, device, dtype = self.state.model, self.state.device, self.state.dtype
        set_activation_checkpointing(model, self.activation_checkpointing)
        self.hooks = [getattr(m, "on_train_step") for m in model.modules() if hasattr(m, "on_train_step")]  # noqa: B009
        self.autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)
        self.found_nonfinite = torch.zeros((), dtype=torch.bool, device=device)
        self.forward = wrap_ddp(model) if self.distributed else model

    def forward_backward(self, number: int, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the gradients of the mean loss, clipped, and return that loss (a scalar on the device).

        labels: (B,) or, for mixed images, class probabilities (B, K).
        number: steps of the run before this one, for mixers that do something every few steps.
        """
        for hook in self.hooks:
            hook(number)
        loss = torch.zeros((), device=images.device)
        batch, copies = len(labels), 1
        if self.distributed:
            # DistributedDataParallel takes the mean of the gradients, which scales each process's down.
            images, labels, copies = shard_batch(images, labels)
        size = self.micro_batch or len(labels)
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        if self.uses_cuda_graphs and len(parts) > 1:
            for p in self.state.model.parameters():  # memory of their own, to which each part's gradients are added
                p.grad = torch.zeros_like(p)
        for i, (part_images, part_labels) in enumerate(parts, 1):
            with self.maybe_no_sync(i == len(parts)):
                with self.autocast:
                    compute = self.compiled if self.compiled and len(part_labels) == self.compiled_size else mean_loss
                    part = compute(self.forward, part_images, part_labels, self.label_smoothing)
                    part = part * (len(part_labels) * copies / batch)
                self.state.scaler.scale(part).backward()
            loss += part.detach().float()
        if self.distributed:
            loss = all_reduce_sum(loss) / world_size()
        self.state.scaler.unscale_(self.state.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.state.model.parameters() if p.grad is not None])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.state.model.parameters(), self.clip_norm, norm)
        # Overflowing gradients are normal in float16: the scaler skips the step and lowers the scale.
        is_finite = loss.isfinite() if self.state.scaler.is_enabled() else loss.isfinite() & norm.isfinite()
        self.found_nonfinite |= ~is_finite
        return loss

    def maybe_no_sync(self, last: bool) -> AbstractContextManager[None]:
        """Context of a micro-batch: gradients are averaged over the processes in the last one only."""
        return self.forward.no_sync() if isinstance(self.forward, DistributedDataParallel) and not last else nullcontext()

    def optimizer_step(self) -> None:
        """Step the optimizer, clear the gradients, step the learning rate and update the EMA.

        On a GPU the host does not wait to learn whether float16's scaling skipped the step: ``TrainState.sync_lr_scheduler``
        takes the learning rate back later. Optimizers without a fused kernel do wait, within ``GradScaler.step``.
        """
        state = self.state
        state.scaler.step(state.optimizer)
        if state.scaler.is_enabled():
            (found_inf,) = state.scaler._found_inf_per_device(state.optimizer).values()
            state.skipped_steps += found_inf > 0
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.skipped_steps.is_cpu:
            state.sync_lr_scheduler(due=1)
        else:
            state.lr_scheduler.step()
        if state.ema:
            state.ema.update(state.model)


def mean_loss(model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)


def shard_batch(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """This process's shard of a batch and the number of shares; one image with weight 0 where none is left for it."""
    if len(shard(labels)):
        return shard(images), shard(labels), world_size()
    return images[:1], labels[:1], 0
