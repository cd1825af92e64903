"""A training step: forward and backward in micro-batches under autocast, then the optimizer step."""

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
    """Trains a :class:`vix.training.state.TrainState`, one batch per step.

    state: the state that is trained.
    micro_batch: images per forward and backward pass, whose gradients are accumulated; None: the whole batch.
    clip_norm: largest norm of the gradient; None: no clipping.
    label_smoothing: label smoothing of the cross-entropy, in [0, 1).
    activation_checkpointing: mode of the model's blocks (:mod:`vix.layers.checkpointing`).
    class_weights: weight of each class in the loss, (K,) on the device; None: all 1.
    distributed: whether batches are split over the processes of this run.

    Set during construction or compilation:

    hooks: methods ``on_train_step`` of the model's modules.
    autocast: autocast context of the forward pass.
    forward: the model, wrapped in DistributedDataParallel if there are several processes.
    compiled: compiled ``mean_loss``, for micro-batches of ``compiled_size`` images; None: not compiled.
    uses_cuda_graphs: whether ``compiled`` uses CUDA graphs; its next call then overwrites the gradients.
    found_nonfinite: whether any loss or gradient so far was not finite, on the device.
    """

    state: TrainState
    micro_batch: int | None = None
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    activation_checkpointing: ActivationCheckpointing = None
    class_weights: Tensor | None = None
    distributed: bool = True
    hooks: list[Callable[[int], None]] = field(init=False)
    autocast: torch.autocast = field(init=False)
    forward: nn.Module = field(init=False)
    compiled: Callable[..., Tensor] | None = field(init=False, default=None)
    compiled_size: int = field(init=False, default=0)
    uses_cuda_graphs: bool = field(init=False, default=False)
    found_nonfinite: Tensor = field(init=False)

    def __post_init__(self) -> None:
        model, device, dtype = self.state.model, self.state.device, self.state.dtype
        set_activation_checkpointing(model, self.activation_checkpointing)
        self.hooks = step_hooks(model)
        self.autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)
        self.found_nonfinite = torch.zeros((), dtype=torch.bool, device=device)
        self.forward = wrap_ddp(model) if self.distributed else model

    def forward_backward(self, number: int, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the clipped gradients of the mean loss, and return that loss, a scalar on the device.

        number: number of the step in the run, from 0.
        images: images (B, C, Y, X) in [−1, 1], the batch of all processes.
        labels: labels (B,) or, with MixUp or CutMix, class probabilities (B, K).
        """
        for hook in self.hooks:
            hook(number)
        loss = torch.zeros((), device=images.device)
        batch, copies = len(labels), 1
        if self.distributed:
            # DistributedDataParallel averages the gradients over the processes; the factor ``copies`` compensates for that.
            images, labels, copies = shard_batch(images, labels)
        size = self.micro_batch or len(labels)
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        if self.uses_cuda_graphs and len(parts) > 1:
            for p in self.state.model.parameters():  # separate memory in which the gradients are accumulated
                p.grad = torch.zeros_like(p)
        for i, (part_images, part_labels) in enumerate(parts, 1):
            with self.maybe_no_sync(i == len(parts)):
                with self.autocast:
                    compute = self.compiled if self.compiled and len(part_labels) == self.compiled_size else mean_loss
                    part = compute(self.forward, part_images, part_labels, self.label_smoothing, self.class_weights)
                    part = part * (len(part_labels) * copies / batch)
                self.state.scaler.scale(part).backward()
            loss += part.detach().float()
        if self.distributed:
            loss = all_reduce_sum(loss) / world_size()
        self.state.scaler.unscale_(self.state.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.state.model.parameters() if p.grad is not None])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.state.model.parameters(), self.clip_norm, norm)
        self.found_nonfinite |= ~(loss.isfinite() & (norm.isfinite() | self.may_overflow()))
        return loss

    def may_overflow(self) -> Tensor | bool:
        """Whether gradients that are not finite may be due to the scale of float16, which the scaler then lowers.

        At a scale below 1 they are not: they are too large, or NaN, without it.
        """
        scaler = self.state.scaler
        return scaler._scale >= 1 if scaler.is_enabled() and scaler._scale is not None else False

    def maybe_no_sync(self, last: bool) -> AbstractContextManager[None]:
        """Context of a micro-batch: only the last one of a step averages the gradients over the processes."""
        return self.forward.no_sync() if isinstance(self.forward, DistributedDataParallel) and not last else nullcontext()

    def optimizer_step(self) -> None:
        """Step the optimizer and the learning-rate schedule, clear the gradients and update the EMA.

        On a GPU the host does not wait for the result whether the gradient scaler skipped the step;
        ``TrainState.sync_lr_scheduler`` corrects the schedule later. Optimizers without a fused kernel wait in
        ``GradScaler.step``.
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


def step_hooks(model: nn.Module) -> list[Callable[[int], None]]:
    """The methods ``on_train_step`` of the model's modules, which are called before each step with its number."""
    return [getattr(m, "on_train_step") for m in model.modules() if hasattr(m, "on_train_step")]  # noqa: B009


def mean_loss(
    model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float, class_weights: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of the images; labels are (B,) or class probabilities (B, K).

    With class weights (K,), it is the sum of the weighted losses divided by the number of images, for both kinds of labels.
    PyTorch's mean divides by the sum of the labels' weights, so that the gradient would depend on the size of micro-batches.
    """
    logits_BK = model(images)
    if class_weights is None:
        return F.cross_entropy(logits_BK, labels, label_smoothing=label_smoothing)
    total = F.cross_entropy(logits_BK, labels, class_weights, label_smoothing=label_smoothing, reduction="sum")
    return total / len(labels)


def shard_batch(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """This process's shard of a batch, and the factor of its loss.

    The factor is the number of processes. A process whose shard is empty gets one image with factor 0.
    """
    if len(shard(labels)):
        return shard(images), shard(labels), world_size()
    return images[:1], labels[:1], 0
