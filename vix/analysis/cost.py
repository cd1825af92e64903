"""Cost of a run before it starts: peak memory estimated from shapes, or memory and time measured over a few steps."""

import statistics
import time
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vix.build import Experiment
from vix.layers.checkpointing import set_activation_checkpointing
from vix.system.device import resolve_precision
from vix.training.state import TrainState

WARMUP_STEPS, MEASURED_STEPS = 3, 5


class AllocationCounter(TorchDispatchMode):
    """Track the bytes of all tensors that are allocated within its context.

    ``alive`` is the current number of bytes, ``peak`` the largest so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, storage: int, size: int) -> None:
        """Subtract a freed storage of ``size`` bytes."""
        self.known.discard(storage)
        self.alive -= size


class FusedAttention(torch.autograd.Function):
    """Allocates what fused attention saves for its backward pass: q, k, v, the output and one float32 per query.

    The gradient of a bias is computed per image before it is summed over the batch.
    """

    @staticmethod
    def forward(ctx: Any, q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, bias_1HNM: Tensor | None) -> Tensor:
        out_BHNE = q_BHNE.new_empty(*q_BHNE.shape[:-1], v_BHME.shape[-1])
        ctx.bias = bias_1HNM
        ctx.save_for_backward(q_BHNE, k_BHME, v_BHME, out_BHNE, q_BHNE.new_empty(q_BHNE.shape[:-1], dtype=torch.float32))
        return out_BHNE

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        q_BHNE, k_BHME, v_BHME = ctx.saved_tensors[:3]
        bias = None
        if ctx.needs_input_grad[3]:
            bias = ctx.bias.new_empty(*q_BHNE.shape[:3], k_BHME.shape[2]).sum_to_size(ctx.bias.shape)
        return *(torch.empty_like(t) for t in (q_BHNE, k_BHME, v_BHME)), bias


def fused_attention(q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Replacement for ``F.scaled_dot_product_attention`` that allocates the same memory without computing.

    On a CPU, PyTorch uses its unfused implementation for a bias that requires a gradient.
    """
    if q_BHNE.is_cpu and attn_mask is not None and attn_mask.requires_grad:
        return torch.ops.aten._scaled_dot_product_attention_math(q_BHNE, k_BHME, v_BHME, attn_mask)[0]
    return FusedAttention.apply(q_BHNE, k_BHME, v_BHME, attn_mask)


def peak_memory(experiment: Experiment) -> int:
    """Estimated peak memory of a run's training steps in bytes, without the image set. Nothing is computed.

    The estimate excludes temporary memory within PyTorch's operations and memory that the allocator reserves.

    experiment: the parsed config.
    """
    model = experiment.build_model()
    trainer, data = experiment.trainer, experiment.data
    set_activation_checkpointing(model, trainer.activation_checkpointing)
    device = trainer.torch_device
    dtype = resolve_precision(trainer.precision, device)
    size = trainer.batch_size
    if isinstance(trainer.micro_batch, int):
        size = min(trainer.micro_batch, size)
    fused = F.scaled_dot_product_attention
    with FakeTensorMode(allow_non_fake_inputs=True), AllocationCounter() as allocations:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty_like(parameter.detach(), device=device)
                    module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty_like(buffer, device=device) if buffer is not None else None
        for tensor in (*model.parameters(), *model.buffers()):
            allocations.count(tensor)
        images = torch.empty(size, data.channels, data.image_size, data.image_size, device=device)
        labels = torch.empty(size, dtype=torch.int64, device=device)
        adam = [(torch.empty_like(p), torch.empty_like(p)) for p in model.parameters()]
        F.scaled_dot_product_attention = fused_attention  # type: ignore[assignment]
        try:
            for _ in range(2):  # with micro-batches, gradients exist from the start of the second pass
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                    loss = F.cross_entropy(model(images), labels)
                loss.backward()
                if size == trainer.batch_size:
                    model.zero_grad()
        finally:
            F.scaled_dot_product_attention = fused
        del adam
    return allocations.peak


def measure_step(experiment: Experiment) -> tuple[float, int | None]:
    """Measure the median duration of a training step in seconds, and its peak GPU memory in bytes (None on a CPU).

    Trains a new model on random images for a few steps; reads no data and writes no files.

    experiment: the parsed config.
    """
    trainer, data = experiment.trainer, experiment.data
    device = trainer.torch_device
    model = experiment.build_model().to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    optimizer = experiment.build_optimizer(model)
    dtype = resolve_precision(trainer.precision, device)
    step = trainer.build_step(TrainState(model, optimizer, LambdaLR(optimizer, lambda _: 1.0), dtype))
    images = torch.rand(trainer.batch_size, data.channels, data.image_size, data.image_size, device=device) * 2 - 1
    labels = torch.randint(data.classes, (trainer.batch_size,), device=device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = []
    for number in range(WARMUP_STEPS + MEASURED_STEPS):
        clock = time.perf_counter()
        step.forward_backward(number, images, labels)
        step.optimizer_step()
        wait()
        seconds.append(time.perf_counter() - clock)
    return statistics.median(seconds[WARMUP_STEPS:]), torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
