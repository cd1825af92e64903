"""Tensors on the wrong device, and waits for it, found without a GPU.

PyTorch's fake tensors know shape, type and device, and hold no numbers. Everything that a step computes is on a pretended GPU
here, where an operation on two devices is an error as on a real one, or has no value that could be asked for.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import EXPERIMENTS
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim.lr_scheduler import LambdaLR

from vix.build import build_model, parse
from vix.data.augment import Augmentation, Mix
from vix.data.loader import Split
from vix.data.trivial_augment import TrivialAugment
from vix.training.state import TrainState

Compose = Callable[..., DictConfig]
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
BATCH = 4


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Autocast is switched on by hand: torch.autocast declines where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


def without_numbers(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with new, pretended tensors on the device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(empty_like(parameter, device), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else empty_like(buffer, device)
    return model


def empty_like(tensor: Tensor, device: torch.device = GPU) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def gradients(loss: Tensor) -> dict[Tensor, Tensor]:
    """Of every leaf behind ``loss``: PyTorch's backward pass, without its engine, which asks the driver for streams."""
    root: Any = loss.grad_fn
    awaited: Counter[Any] = Counter()
    found, todo = {root}, [root]
    while todo:
        for node, _ in todo.pop().next_functions:
            awaited[node] += 1
            if node is not None and node not in found:
                found.add(node)
                todo.append(node)
    arrived: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    leaves, ready = {}, [root]
    while ready:
        node = ready.pop()
        into = arrived.pop(node, {})
        if hasattr(node, "variable"):
            leaves[node.variable] = into[0]
            continue
        backward = getattr(node, "apply", node)  # that of a torch.autograd.Function, or PyTorch's own
        out = backward(*(into.get(i) for i in range(len(node._input_metadata))))
        for (following, i), gradient in zip(node.next_functions, out if isinstance(out, tuple) else (out,), strict=False):
            if following is None:
                continue
            if gradient is not None:
                expected = following._input_metadata[i]
                assert gradient.device == expected.device
                gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
                sums = arrived.setdefault(following, {})
                sums[i] = sums[i] + gradient if i in sums else gradient
            awaited[following] -= 1
            if not awaited[following]:
                ready.append(following)
    return leaves


def one_block_per_stage(cfg: DictConfig) -> DictConfig:
    """The config with one block in each stage, and two for windows, which every second one shifts: others compute the same."""
    depth = 2 if cfg.attention._target_.endswith(".WindowAttention") else 1
    stages = OmegaConf.select(cfg, "model.depth")
    cfg.model.depth = [depth] * len(stages) if OmegaConf.is_list(stages) else depth
    return cfg


def assert_a_step_is_on_the_gpu(model: nn.Module, *shape: int) -> None:
    """Of ``model``, on a batch of images (or other input) of this shape each."""
    with pretended_gpu():
        without_numbers(model, GPU).train()
        for module in model.modules():
            if hasattr(module, "on_train_step"):
                module.on_train_step(1)
        logits = model(torch.empty(BATCH, *shape, device=GPU))
        loss = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.int64, device=GPU))
        torch.set_autocast_enabled("cuda", False)
        found = gradients(loss)
    assert (loss.device, logits.dtype, loss.dtype) == (GPU, torch.bfloat16, torch.float32)
    assert found.keys() == {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter, gradient in found.items():
        assert (gradient.device, gradient.shape, gradient.dtype) == (GPU, parameter.shape, parameter.dtype)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_step_stays_on_the_gpu(compose_config: Compose, experiment: str) -> None:
    """Forward under autocast, loss and backward of every model, with whatever it does otherwise on a CPU."""
    cfg = one_block_per_stage(compose_config(f"experiment={experiment}"))
    data = parse(cfg).data
    assert_a_step_is_on_the_gpu(build_model(cfg), data.channels, data.image_size, data.image_size)


ZOO = (
    *(
        "convolution",
        "pooling",
        "identity",
        "random",
        "window",
        "cross_covariance",
        "agent",
        "spatial_reduction",
        "global_filter",
    ),
    *("gating", "neighbourhood", "focal", "mamba2", "latent", "external"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        ("attention=performer", "attention.kernel=relu", "attention.local_heads=2"),
        ("attention=performer", "attention.redraw_every=1"),
        ("attention=linear",),
        ("posenc=sincos",),
        ("posenc=relative2d", "attention=softmax"),
        ("posenc=rotary2d",),
        ("posenc=none",),
        *((f"attention={name}", "model.pool=mean", "embedding.patch_size=2") for name in ZOO),
    ],
    ids=" ".join,
)
def test_options_without_a_row_stay_on_the_gpu(compose_config: Compose, extra: tuple[str, ...]) -> None:
    assert_a_step_is_on_the_gpu(build_model(one_block_per_stage(compose_config("model=vit", *extra))), 3, 32, 32)


def test_batches_stay_on_the_gpu() -> None:
    with pretended_gpu():
        images = torch.empty(3 * BATCH + 1, 3, 32, 32, dtype=torch.uint8, device=GPU)
        labels = torch.zeros(len(images), dtype=torch.int64, device=GPU)
        split = Split(images, labels)
        augmentation = Augmentation(flip=True, crop_padding=4, random_erasing=0.5)
        batches = [*split.train_batches(BATCH, seed=0, epoch=0, augmentation=augmentation), *split.eval_batches(BATCH)]
    assert len(batches) == 8
    for some_images, some_labels in batches:
        assert (some_images.device, some_labels.device, some_images.dtype) == (GPU, GPU, torch.float32)


def test_trivial_augment_stays_on_the_gpu() -> None:
    """With draws made on the host, as in a run; all operations occur."""
    count = 200
    augment = TrivialAugment(1.0, count, count, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert all(augment.sizes[0])
    with pretended_gpu():
        augment.order, augment.amount = empty_like(augment.order), empty_like(augment.amount)
        changed = augment(torch.empty(count, 3, 32, 32, dtype=torch.uint8, device=GPU), 0)
    assert (changed.device, changed.dtype, changed.shape) == (GPU, torch.uint8, (count, 3, 32, 32))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, None), (None, 1.0)])
def test_mixed_images_stay_on_the_gpu(mixup: float | None, cutmix: float | None) -> None:
    mix = Mix(mixup, cutmix, 10, 1, 32, 32, torch.Generator().manual_seed(0))
    with pretended_gpu():
        images, labels = mix(torch.empty(BATCH, 3, 32, 32, device=GPU), torch.zeros(BATCH, dtype=torch.int64, device=GPU), 0)
    assert (images.device, labels.device, labels.shape) == (GPU, GPU, (BATCH, 10))


ALL_AT_ONCE = ("micro_batch=2", "clip_norm=1.0", "ema_decay=0.9", "label_smoothing=0.1", "activation_checkpointing=full")


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ALL_AT_ONCE], ids=["plain", "all options"])
@pytest.mark.parametrize("experiment", ["vit", "vip_rope", "hybrid_vil", "vin", "fnet", "mixer", "levit", "cct", "cvt", "pit"])
def test_a_step_waits_for_no_number(compose_config: Compose, experiment: str, options: tuple[str, ...]) -> None:
    """Gradients and update ask for the value of no tensor, so that the host runs ahead of a GPU."""
    overrides = (f"experiment={experiment}", "trainer.device=cpu", *(f"trainer.{option}" for option in options))
    cfg = one_block_per_stage(compose_config(*overrides))
    trainer, data = parse(cfg).trainer, parse(cfg).data
    model = build_model(cfg).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_numbers(model, CPU)
        assert_a_number_is_refused(next(model.parameters()))
        optimizer = parse(cfg).build_optimizer(model)
        schedule = LambdaLR(optimizer, lambda _: 1.0)
        step = trainer.build_step(TrainState(model, optimizer, schedule, torch.bfloat16, trainer.ema_decay))
        images = torch.empty(5, data.channels, data.image_size, data.image_size)
        for number in range(2):
            step.forward_backward(number, images, torch.empty(5, dtype=torch.int64))
            step.optimizer_step()


def assert_a_number_is_refused(tensor: Tensor) -> None:
    with pytest.raises(DataDependentOutputException):
        tensor.sum().item()


def test_a_tensor_on_the_host_is_found() -> None:
    """What these tests are for."""

    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + torch.arange(8))

    with pytest.raises(RuntimeError, match=r"(at least two|two different) devices"):
        assert_a_step_is_on_the_gpu(Forgetful(), 8)


def test_the_backward_pass_is_pytorchs() -> None:
    """``gradients`` on a CPU, with numbers, against the engine that it stands in for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 10))
    x = torch.rand(BATCH, 8)
    loss = F.cross_entropy(model(x + model(x)[:, :8]), torch.arange(BATCH))
    ours = gradients(loss)
    loss.backward()
    assert len(ours) == len(list(model.parameters()))
    for parameter, gradient in ours.items():
        torch.testing.assert_close(gradient, parameter.grad)
