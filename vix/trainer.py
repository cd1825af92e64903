"""The training loop, top to bottom."""

import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from vix.checks import ConfigError, Fraction, NotNegative, NotNegativeFloat, Positive, PositiveFloat
from vix.data.dataset import ImageData
from vix.metrics import PeakMemory, accuracy
from vix.progress import EpochBar, TensorBoard
from vix.run import Run, StopRequest, parameter_counts, saved_megabytes
from vix.runtime import device_name, get_rng_state, resolve_device, resolve_precision, set_rng_state
from vix.schedule import rate_factor

log = logging.getLogger(__name__)


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


@dataclass(kw_only=True)
class Trainer:
    """Trains a model on an image set, tests it after every epoch, and keeps the last and the best weights.

    epochs: passes over the training images.
    batch_size, eval_batch_size: images a step, and images at a time when testing.
    precision: of forward and loss: bf16, fp16 (with gradient scaling), fp32, or auto: bf16 where the hardware computes in it
        (on a GPU without it, fp16), else fp32.
    device: auto (CUDA where there is one, else the CPU), or a PyTorch device such as cpu or cuda:1.
    schedule: of the learning rate after the warm-up: constant, or down to 0 on a line or a half cosine.
    warmup_epochs: epochs, or a part of one, over which the rate rises from 0 on a line.
    clip_norm: largest norm of the gradient; null does not clip.
    label_smoothing: of the training loss.
    checkpoint_every: also save every so many steps within an epoch; 0 saves at the ends of epochs only.
    resume: auto continues an interrupted run and skips a finished one; force does so although its config was another.
    """

    epochs: Positive = 40
    batch_size: Positive = 64
    eval_batch_size: Positive = 256
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    device: str = "auto"
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_epochs: NotNegativeFloat = 0.0
    clip_norm: PositiveFloat | None = None
    label_smoothing: Fraction = 0.0
    checkpoint_every: NotNegative = 0
    resume: Literal["auto", "force"] = "auto"

    def __post_init__(self) -> None:
        if self.warmup_epochs > self.epochs:
            raise ConfigError(f"trainer.warmup_epochs={self.warmup_epochs}: must be at most trainer.epochs={self.epochs}")
        self.torch_device = resolve_device(self.device)

    def fit(
        self,
        model: nn.Module,
        make_optimizer: Callable[..., torch.optim.Optimizer],
        data: ImageData,
        run: Run,
        seed: int,
    ) -> dict[str, Any]:
        """Train, writing ``run``'s files as it goes, and return the results.

        Continues from the run's checkpoint where there is one: on a CPU, to the bit as if it had never stopped.
        Raises DataError where the data cannot be read, and SystemExit where a signal asked to stop and all is saved.
        """
        device = self.torch_device
        dtype = resolve_precision(self.precision, device)
        saved = run.load_checkpoint(self.resume)
        train, test = data.load(device)
        model = model.to(device)
        optimizer = make_optimizer(params=model.parameters())
        steps_per_epoch = math.ceil(len(train) / self.batch_size)
        warmup_steps, steps = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        schedule = LambdaLR(optimizer, rate_factor(self.schedule, warmup_steps, steps))
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)
        step_hooks = [getattr(m, "on_train_step") for m in model.modules() if hasattr(m, "on_train_step")]  # noqa: B009
        memory = PeakMemory(device, train.nbytes + test.nbytes)
        parts: Any = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler, "memory": memory}
        at = Position(loss_sum=torch.zeros((), device=device))
        if saved:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            set_rng_state(saved["rng"])
            at = Position(**saved["position"])
            at.loss_sum = at.loss_sum.to(device)
            log.info("Continuing after %d epochs and %d steps", at.epoch, at.batch)

        def checkpoint() -> None:
            states = {name: part.state_dict() for name, part in parts.items()}
            run.save_checkpoint({**states, "best_model": at.best_model, "rng": get_rng_state(), "position": vars(at)})

        run.write_results(
            status="running",
            **parameter_counts(model),
            checkpoint_mb=saved_megabytes(model.state_dict()),
            precision={torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype],
            device=device_name(device),
            torch=torch.__version__,
            train_images=len(train),
            test_images=len(test),
        )
        with StopRequest() as stop, TensorBoard(run, first_epoch=at.epoch + 1) as board:
            while at.epoch < self.epochs:
                model.train()
                memory.start()
                clock = time.perf_counter()
                with EpochBar(at.epoch, self.epochs, len(train), at.history) as bar:
                    for images, labels in train.shuffled(self.batch_size, seed, at.epoch, first_batch=at.batch):
                        for hook in step_hooks:
                            hook(at.epoch * steps_per_epoch + at.batch)
                        with autocast:
                            loss = F.cross_entropy(model(images), labels, label_smoothing=self.label_smoothing)
                        scaler.scale(loss).backward()
                        if self.clip_norm is not None:
                            scaler.unscale_(optimizer)
                            nn.utils.clip_grad_norm_(model.parameters(), self.clip_norm)
                        scaler.step(optimizer)
                        scaler.update()
                        optimizer.zero_grad(set_to_none=True)
                        at.rate = float(schedule.get_last_lr()[0])
                        schedule.step()
                        at.loss_sum += loss.detach().float() * len(labels)
                        at.batch += 1
                        bar.step(len(labels), loss)
                        wanted = self.checkpoint_every and at.batch % self.checkpoint_every == 0
                        if stop.signal or (wanted and at.batch < steps_per_epoch):
                            at.train_seconds += time.perf_counter() - clock
                            memory.stop()
                            checkpoint()
                            clock = time.perf_counter()
                        if stop.signal:
                            run.write_results(status="interrupted", epochs=at.epoch, **memory.gigabytes)
                            log.warning("Stopped by signal %d; the same command continues from here", stop.signal)
                            raise SystemExit(128 + stop.signal)
                mean_loss = at.loss_sum.item() / len(train)  # waits for the device: the epoch's time ends here
                at.train_seconds += time.perf_counter() - clock
                memory.stop()

                clock = time.perf_counter()
                scores = accuracy(model, test.in_order(self.eval_batch_size), autocast)
                at.seconds += at.train_seconds + time.perf_counter() - clock
                speed = len(train) / at.train_seconds
                at.epoch += 1
                at.batch, at.train_seconds, at.loss_sum = 0, 0.0, torch.zeros((), device=device)
                if scores["top1"] > at.best.get("best_top1", -1.0):
                    at.best = {"best_top1": scores["top1"], "best_top5": scores["top5"], "best_epoch": at.epoch}
                    at.best_model = {name: t.detach().to("cpu", copy=True) for name, t in model.state_dict().items()}
                row = {"train_loss": mean_loss, **scores, "lr": at.rate, "images_per_second": speed}
                at.history.append({"epoch": at.epoch, **row})
                run.write_results(
                    epochs=at.epoch,
                    **scores,
                    **at.best,
                    train_loss=mean_loss,
                    images_per_second=statistics.median(h["images_per_second"] for h in at.history),
                    **memory.gigabytes,
                    seconds=at.seconds,
                    history=at.history,
                )
                board.epoch(at.history[-1], memory.gigabytes)
                log.info(
                    "epoch %d/%d  loss %.4f  top-1 %.2f %%  top-5 %.2f %%  %.0f images/s  %.1f min left",
                    *(at.epoch, self.epochs, mean_loss, scores["top1"], scores["top5"], speed),
                    at.seconds / at.epoch * (self.epochs - at.epoch) / 60,
                )
                checkpoint()
            board.finish(run.results)
        run.write_results(status="finished")
        return run.results
