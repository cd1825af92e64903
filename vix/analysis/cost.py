"""Cost of a run before it starts: peak memory estimated from shapes, or memory and time measured over a few steps."""

import heapq
import itertools
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import GraphExecGroup

from vix.analysis.measure import measure
from vix.build import Experiment
from vix.layers.checkpointing import ActivationCheckpointing, set_activation_checkpointing
from vix.system.device import resolve_precision
from vix.training.evaluate import evaluated_logits
from vix.training.state import TrainState

MEASURED_SECONDS = 1.0  # of the repeated steps, at least five


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
            bias = ctx.bias.new_empty(*q_BHNE.shape[:-1], k_BHME.shape[-2]).sum_to_size(ctx.bias.shape)
        return *(torch.empty_like(t) for t in (q_BHNE, k_BHME, v_BHME)), bias


def fused_attention(q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Replacement for ``F.scaled_dot_product_attention`` that allocates the same memory without computing.

    On a CPU, PyTorch uses its unfused implementation for a bias that requires a gradient.
    """
    if q_BHNE.is_cpu and attn_mask is not None and attn_mask.requires_grad:
        return torch.ops.aten._scaled_dot_product_attention_math(q_BHNE, k_BHME, v_BHME, attn_mask)[0]
    return FusedAttention.apply(q_BHNE, k_BHME, v_BHME, attn_mask)


class MemoryEstimate(NamedTuple):
    """Estimated memory of a run, in bytes.

    training: :func:`training_memory`.
    evaluation: :func:`evaluation_memory`.
    images: the image set, which is resident on the device.
    """

    training: int
    evaluation: int
    images: int

    @property
    def total(self) -> int:
        """The memory that the run needs."""
        return max(self.training, self.evaluation) + self.images


def estimate_memory(experiment: Experiment, device: torch.device | None = None) -> MemoryEstimate:
    """Estimate the memory of a run from the shapes of its tensors. Nothing is computed.

    experiment, device: as for :func:`pretended_run`.
    """
    data = experiment.data
    images = (data.train_images + data.eval_images) * (data.channels * data.image_size**2 + 8)
    return MemoryEstimate(training_memory(experiment, device), evaluation_memory(experiment, device), images)


def training_memory(
    experiment: Experiment,
    device: torch.device | None = None,
    micro_batch: int | None = None,
    activation_checkpointing: ActivationCheckpointing = None,
) -> int:
    """Estimated peak memory of the training steps in bytes: weights, gradients, optimizer state, EMA and activations.

    The estimate excludes temporary memory within PyTorch's operations and memory that the allocator reserves.

    experiment, device: as for :func:`pretended_run`.
    micro_batch, activation_checkpointing: instead of the trainer's; None: the trainer's.
    """
    trainer = experiment.trainer
    micro_batch = micro_batch or (trainer.micro_batch if isinstance(trainer.micro_batch, int) else trainer.batch_size)
    size = min(micro_batch, trainer.batch_size)
    with pretended_run(experiment, device) as (model, batch, autocast, allocations):
        set_activation_checkpointing(model, activation_checkpointing or trainer.activation_checkpointing)
        images, labels = batch(trainer.batch_size)  # allocated until the last micro-batch
        for _ in range(1 if size == trainer.batch_size else 2):  # gradients exist from the start of a second micro-batch
            with autocast:
                loss = F.cross_entropy(model(images[:size]), labels[:size])
            backward(loss)
    return allocations.peak


def evaluation_memory(experiment: Experiment, device: torch.device | None = None, eval_batch_size: int | None = None) -> int:
    """Estimated peak memory of the evaluation in bytes, with weights, optimizer state and EMA.

    experiment, device: as for :func:`pretended_run`.
    eval_batch_size: instead of the trainer's; None: the trainer's.
    """
    trainer = experiment.trainer
    with pretended_run(experiment, device) as (model, batch, autocast, allocations), torch.no_grad():
        images, _ = batch(min(eval_batch_size or trainer.eval_batch_size, experiment.data.eval_images))
        evaluated_logits(model.eval(), images, autocast, trainer.mirror_eval)
    return allocations.peak


Batches = Callable[[int], tuple[Tensor, Tensor]]


@contextmanager
def pretended_run(
    experiment: Experiment, device: torch.device | None
) -> Iterator[tuple[nn.Module, Batches, torch.autocast, AllocationCounter]]:
    """Context with the model of a run, its optimizer state (as of Adam) and EMA, as tensors without values.

    experiment: the parsed config.
    device: whose operations are estimated; a CUDA GPU need not exist. None: the trainer's device.

    Yields the model, a function that makes a batch of a size, the autocast context, and the counter of what is allocated.
    """
    trainer, data = experiment.trainer, experiment.data
    device = device or trainer.torch_device
    model = experiment.build_model()
    with pretended_tensors(device, trainer.precision) as (autocast, allocations):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty_like(parameter.detach(), device=device)
                    module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty_like(buffer, device=device) if buffer is not None else None
        tensors = [*model.parameters(), *model.buffers()]
        for tensor in tensors:
            allocations.count(tensor)

        def batch(size: int) -> tuple[Tensor, Tensor]:
            images = torch.empty(size, data.channels, data.image_size, data.image_size, device=device)
            return images, torch.empty(size, dtype=torch.int64, device=device)

        adam = [(torch.empty_like(p), torch.empty_like(p)) for p in model.parameters()]
        ema = [torch.empty_like(t) for t in tensors] if trainer.ema_decay is not None else []
        yield model, batch, autocast, allocations
        del adam, ema


@contextmanager
def pretended_tensors(device: torch.device, precision: str) -> Iterator[tuple[torch.autocast, AllocationCounter]]:
    """Context in which tensors have a shape, a dtype and a device, but no values.

    On a machine without a GPU, CUDA's autocast is enabled nevertheless, and ``precision=auto`` is bf16, as on GPUs of compute
    capability 8.0 and higher. (On older ones it is fp16, which needs the same memory.)

    device: of the tensors.   precision: ``trainer.precision``.

    Yields the autocast context of the run, and the counter of what is allocated.
    """
    absent = device.type == "cuda" and not torch.cuda.is_available()
    with ExitStack() as stack:
        if absent:
            stack.enter_context(patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
            stack.enter_context(patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True))
        dtype = resolve_precision("bf16" if absent and precision == "auto" else precision, device)
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", fused_attention))
        with FakeTensorMode(allow_non_fake_inputs=True), AllocationCounter() as allocations:
            yield autocast, allocations


def backward(loss: Tensor) -> None:
    """``loss.backward()`` for tensors without values; ``loss`` leaves the graph."""
    if loss.device.type == "cuda":
        PretendedEngine(loss).run()
    else:
        loss.backward()


class PretendedEngine:
    """PyTorch's backward pass without its engine, which asks CUDA's driver for streams.

    Nodes are executed in the engine's order, and each is freed, with the tensors that it saved, after its execution.

    loss: a scalar; it leaves the graph, which it would otherwise keep alive.
    """

    def __init__(self, loss: Tensor) -> None:
        root: Any = loss.grad_fn
        self.arrived: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
        self.awaited = edges_into(root)
        # A Python function's node is not kept alive by its Python object, but by its parents.
        self.parents: defaultdict[Any, list[Any]] = defaultdict(list)
        # The node that was created last comes first. The counter decides between equal numbers.
        self.counter = itertools.count()
        self.ready: list[tuple[float, int, Any]] = [(0.0, next(self.counter), root)]
        loss.detach_()

    def run(self) -> None:
        """Accumulate the gradients of all leaves."""
        with torch.no_grad(), GraphExecGroup():  # in activation checkpointing, the group stands for the engine's call
            while self.ready:
                self.execute_next()

    def execute_next(self) -> None:
        """Execute the next node, free it, and pass its results on."""
        node = heapq.heappop(self.ready)[2]
        gradients = self.arrived.pop(node, {})
        self.awaited.pop(node, None)
        parents = self.parents.pop(node, None)  # until the node is executed
        if hasattr(node, "variable"):
            leaf = node.variable
            leaf.grad = gradients[0] if leaf.grad is None else leaf.grad.add_(gradients[0])
            return
        call = node.apply if isinstance(node, BackwardCFunction) else node
        results = call(*(gradients.get(i) for i in range(len(node._input_metadata))))
        edges = node.next_functions
        for child, _ in edges:
            if isinstance(child, BackwardCFunction):
                self.parents[child].append(node)
        del node, call, gradients, parents
        for (child, i), gradient in zip(edges, results if isinstance(results, tuple) else (results,), strict=False):
            if child is not None:
                self.receive(child, i, gradient)

    def receive(self, node: Any, i: int, gradient: Tensor | None) -> None:
        """Add a gradient to input ``i`` of a node, which is ready when all have arrived."""
        if gradient is not None:
            expected = node._input_metadata[i]
            gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
            sums = self.arrived.setdefault(node, {})
            sums[i] = sums[i] + gradient if i in sums else gradient
        self.awaited[node] -= 1
        if not self.awaited[node]:
            created = math.inf if hasattr(node, "variable") else node._sequence_nr()
            heapq.heappush(self.ready, (-created, next(self.counter), node))


def edges_into(root: Any) -> Counter[Any]:
    """The number of gradients that every node below ``root`` waits for."""
    awaited: Counter[Any] = Counter()
    todo = [root]
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None:
                if node not in awaited:
                    todo.append(node)
                awaited[node] += 1
    return awaited


class Fit(NamedTuple):
    """Whether a run fits a memory, and what makes it fit.

    needed: estimated bytes of the run.
    fits: whether they fit.
    eval_batch_size: the largest one with which the evaluation fits, 0 where none does; None where it fits as it is.
    micro_batch: the largest one with which the training fits, 0 where none does; None where it fits as it is.
    checkpointing: where the training does not fit, the modes of activation checkpointing that the run could have, with their
        estimated bytes.
    micro_batch_full: the largest micro-batch with ``activation_checkpointing=full``, where neither is enough alone; else None.
    """

    needed: int
    fits: bool
    eval_batch_size: int | None = None
    micro_batch: int | None = None
    checkpointing: Mapping[str, int] = {}
    micro_batch_full: int | None = None


def fit_memory(experiment: Experiment, device: torch.device, limit: float, memory: MemoryEstimate) -> Fit:
    """Whether a run fits ``limit`` bytes; if not, the largest micro-batch and whether activation checkpointing is enough.

    experiment, device: as for :func:`pretended_run`.
    memory: of the run, from :func:`estimate_memory`.
    """
    trainer = experiment.trainer
    room = limit - memory.images

    def largest_micro_batch(needed: int, mode: ActivationCheckpointing = None) -> int:
        return largest_size(trainer.batch_size, needed, room, lambda n: training_memory(experiment, device, n, mode))

    eval_batch_size = micro_batch = micro_batch_full = None
    tried: dict[str, int] = {}
    if memory.evaluation > room:
        most = min(trainer.eval_batch_size, experiment.data.eval_images)
        eval_batch_size = largest_size(most, memory.evaluation, room, lambda n: evaluation_memory(experiment, device, n))
    if memory.training > room:
        micro_batch = largest_micro_batch(memory.training)
        stronger: dict[Any, tuple[ActivationCheckpointing, ...]] = {None: ("selective", "full"), "selective": ("full",)}
        for mode in stronger.get(trainer.activation_checkpointing, ()):
            tried[str(mode)] = training_memory(experiment, device, activation_checkpointing=mode) + memory.images
        if tried and not micro_batch and min(tried.values()) > limit:
            micro_batch_full = largest_micro_batch(tried["full"] - memory.images, "full")
    trains = micro_batch is None or (trainer.micro_batch == "auto" and micro_batch > 0)
    return Fit(memory.total, trains and eval_batch_size is None, eval_batch_size, micro_batch, tried, micro_batch_full)


def largest_size(most: int, at_most: float, room: float, needed: Callable[[int], float]) -> int:
    """The largest batch size from 1 to ``most`` that needs at most ``room`` bytes; 0 where none does.

    Memory is almost a linear function of the batch size, so that interpolation finds it in few steps.

    at_most: bytes that ``most`` needs, more than ``room``.
    needed: the bytes of a batch size, which increase with it.
    """
    low, at_low = 1, needed(1)
    if at_low > room:
        return 0
    while most - low > 1:
        guess = low + int((most - low) * (room - at_low) / (at_most - at_low))
        guess = min(max(guess, low + 1), most - 1)
        at_guess = needed(guess)
        if at_guess <= room:
            low, at_low = guess, at_guess
        else:
            most, at_most = guess, at_guess
    return low


class MeasuredCost(NamedTuple):
    """What an epoch and its evaluation cost.

    epoch: seconds.
    allocated: peak memory of a training step in bytes, with weights, optimizer state and EMA.
    """

    epoch: float
    allocated: int


def measure_epoch(experiment: Experiment) -> MeasuredCost:
    """Measure the median durations of a training step and of the evaluation of a batch, and the memory of the former.

    Trains a new model on random images for a few uncompiled steps; reads no data and writes no files.

    experiment: the parsed config.
    """
    trainer, data = experiment.trainer, experiment.data
    device = trainer.torch_device
    model = experiment.build_model().to(device)
    optimizer = experiment.build_optimizer(model)
    dtype = resolve_precision(trainer.precision, device)
    state = TrainState(model, optimizer, LambdaLR(optimizer, lambda _: 1.0), dtype, trainer.ema_decay)
    train_step = trainer.build_step(state)

    def random_images(count: int) -> Tensor:
        return torch.rand(count, data.channels, data.image_size, data.image_size, device=device) * 2 - 1

    images = random_images(trainer.batch_size)
    labels = torch.randint(data.classes, (trainer.batch_size,), device=device)
    numbers = itertools.count()

    def step() -> None:
        train_step.forward_backward(next(numbers), images, labels)
        train_step.optimizer_step()

    def evaluation() -> None:
        with torch.no_grad():
            evaluated_logits(state.eval_model.eval(), evaluated, train_step.autocast, trainer.mirror_eval)

    trained = measure(step, device, seconds=MEASURED_SECONDS)
    evaluated = random_images(min(trainer.eval_batch_size, data.eval_images))
    tested = measure(evaluation, device, seconds=MEASURED_SECONDS)
    seconds = trained.seconds * data.train_images / trainer.batch_size + tested.seconds * data.eval_images / len(evaluated)
    return MeasuredCost(seconds, trained.allocated + (0 if device.type == "cuda" else state_bytes(state)))


def state_bytes(state: TrainState) -> int:
    """Bytes of weights, buffers, optimizer state and EMA."""
    models = [state.model, *([state.ema.module] if state.ema else [])]
    weights = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    values = (*weights, *tree_leaves(state.optimizer.state_dict()["state"]))
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
