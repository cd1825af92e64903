"""Training steps for the benchmarks: ours, a package's model with correct autocast, and the paper's training procedure.

A step is forward, loss, backward and AdamW's update. Ours is :class:`vix.training.train_step.TrainStep`, with the model,
optimizer and options that ``train.py`` builds from the same overrides.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from vix.build import parse
from vix.composition.compose import compose
from vix.system.device import resolve_precision
from vix.training.compile import compile_step
from vix.training.lr_schedule import lr_lambda
from vix.training.state import TrainState

Batch = tuple[Tensor, Tensor]


class Training(NamedTuple):
    """A model on its device, and a function that performs one training step."""

    model: nn.Module
    step: Callable[[], object]


def composed(*overrides: str) -> DictConfig:
    """The config that ``python train.py OVERRIDES`` runs."""
    return compose(overrides)


def random_batch(device: torch.device, size: int, channels: int, side: int, classes: int = 10) -> Batch:
    """Random images (size, channels, side, side) in [−1, 1] and labels (size,), on the device."""
    images = torch.rand(size, channels, side, side, device=device) * 2 - 1
    return images, torch.randint(classes, (size,), device=device)


def ours(overrides: tuple[str, ...], device: torch.device, batch_size: int) -> Training:
    """The step of ``python train.py OVERRIDES``; with ``trainer.compile=auto`` as in a run on 50,000 images."""
    cfg = composed(*overrides, f"trainer.device={device}")
    experiment = parse(cfg)
    trainer, data = experiment.trainer, experiment.data
    dtype = resolve_precision(trainer.precision, device)
    model = experiment.build_model().to(device).train()
    optimizer = experiment.build_optimizer(model)
    lr_scheduler = LambdaLR(optimizer, lr_lambda(trainer.schedule, 0, 1))
    train_step = trainer.build_step(TrainState(model, optimizer, lr_scheduler, dtype))
    images, labels = random_batch(device, batch_size, data.channels, data.image_size, data.classes)
    steps = trainer.epochs * math.ceil(50_000 / batch_size)
    compile_step(train_step, trainer.compile, steps, images, labels)

    def step() -> None:
        train_step.forward_backward(0, images, labels)
        train_step.optimizer_step()

    return Training(model, step)


def package(model: nn.Module, image_size: int, device: torch.device, batch_size: int) -> Training:
    """The step of a package's model: forward and loss under autocast to the hardware's fast dtype, backward outside."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dtype = resolve_precision("auto", device)
    images, labels = random_batch(device, batch_size, 3, image_size)

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Training(model, step)


def papers_way(model: nn.Module, image_size: int, device: torch.device, batch_size: int) -> Training:
    """The paper's step: autocast around the loss only, so the model computes in float32; images from a worker process."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dtype = resolve_precision("auto", device)
    batches = from_worker(image_size, batch_size, device)

    def step() -> None:
        images, labels = (t.to(device) for t in next(batches))
        logits = model(images)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Training(model, step)


class RandomImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """50,000 random images, as many as CIFAR-10's training set, each with torchvision's ToTensor and Normalize."""

    def __init__(self, side: int) -> None:
        from torchvision import transforms

        self.images = torch.randint(256, (1000, side, side, 3), dtype=torch.uint8).numpy()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])

    def __len__(self) -> int:
        return 50_000

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index % len(self.images)]), index % 10


def from_worker(side: int, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """An endless stream of shuffled batches on the CPU, from one worker process."""
    loader = torch.utils.data.DataLoader(
        RandomImages(side), batch_size, shuffle=True, num_workers=1, drop_last=True, pin_memory=device.type == "cuda"
    )
    while True:
        yield from loader
