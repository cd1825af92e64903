"""The training loop, top to bottom."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from vix.checks import ConfigError, Fraction, NotNegative, NotNegativeFloat, Positive, PositiveFloat
from vix.data.dataset import ImageData
from vix.metrics import PeakMemory, accuracy
from vix.progress import EpochBar, TensorBoard
from vix.run import Interrupted, Run, StopRequest, parameter_counts, saved_megabytes
from vix.runtime import device_name, get_rng_state, resolve_device, resolve_precision, set_rng_state
from vix.schedule import rate_factor

log = logging.getLogger(__name__)


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
    resume: auto continues an interrupted run and skips a finished one; force does so although its config was another;
        never starts over.
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
    resume: Literal["auto", "force", "never"] = "auto"

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
        Raises DataError where the data cannot be read, Interrupted where a signal asked to stop and all is saved.
        """
        device = self.torch_device
        dtype = resolve_precision(self.precision, device)
        saved = run.load_checkpoint(self.resume)
        train, test = data.load(device)
        model = model.to(device)
        optimizer = make_optimizer(params=model.parameters())
        steps_per_epoch = math.ceil(len(train) / self.batch_size)
        schedule = LambdaLR(
            optimizer, rate_factor(self.schedule, self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch)
        )
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)
        step_hooks: list[Callable[[int], None]] = [m.on_train_step for m in model.modules() if hasattr(m, "on_train_step")]  # type: ignore[misc]
        memory = PeakMemory(device, train.nbytes + test.nbytes)

        # Everything that changes while training and is not inside one of the objects above.
        epoch, batch, seconds = 0, 0, 0.0
        loss_sum = torch.zeros((), device=device)
        best: dict[str, Any] = {"best_top1": -1.0}
        best_model: dict[str, torch.Tensor] = {}
        history: list[dict[str, Any]] = []
        if saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            scaler.load_state_dict(saved["scaler"])
            set_rng_state(saved["rng"])
            epoch, batch, seconds = saved["epoch"], saved["batch"], saved["seconds"]
            loss_sum = saved["loss_sum"].to(device)
            best, best_model, history = saved["best"], saved["best_model"], saved["history"]
            memory.allocated, memory.reserved = saved["peak_bytes"]
            log.info("Continuing after %d epochs and %d steps", epoch, batch)

        def checkpoint() -> None:
            run.save_checkpoint(
                {
                    "model": model.state_dict(),
                    "best_model": best_model,
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "scaler": scaler.state_dict(),
                    "rng": get_rng_state(),
                    "epoch": epoch,
                    "batch": batch,
                    "seconds": seconds,
                    "loss_sum": loss_sum,
                    "best": best,
                    "history": history,
                    "peak_bytes": (memory.allocated, memory.reserved),
                }
            )

        run.write_results(
            status="running",
            **parameter_counts(model),
            checkpoint_mb=saved_megabytes(model.state_dict()),
            precision=str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp"),
            device=device_name(device),
            torch=torch.__version__,
            train_images=len(train),
            test_images=len(test),
        )
        board = TensorBoard(run)
        stop = StopRequest()
        with stop.listening(), board:
            while epoch < self.epochs:
                model.train()
                memory.start()
                started, first_batch = time.perf_counter(), batch
                with EpochBar(epoch, self.epochs, len(train), history) as bar:
                    for images, labels in train.shuffled(self.batch_size, seed, epoch, first_batch=batch):
                        for hook in step_hooks:
                            hook(epoch * steps_per_epoch + batch)
                        with autocast:
                            loss = F.cross_entropy(model(images), labels, label_smoothing=self.label_smoothing)
                        scaler.scale(loss).backward()
                        if self.clip_norm is not None:
                            scaler.unscale_(optimizer)
                            nn.utils.clip_grad_norm_(model.parameters(), self.clip_norm)
                        rate = schedule.get_last_lr()[0]
                        scaler.step(optimizer)
                        scaler.update()
                        schedule.step()
                        optimizer.zero_grad(set_to_none=True)
                        loss_sum += loss.detach().float() * len(labels)
                        batch += 1
                        bar.step(len(labels), loss)
                        wanted = self.checkpoint_every and batch % self.checkpoint_every == 0
                        if stop.signal or (wanted and batch < steps_per_epoch):
                            seconds += time.perf_counter() - started
                            checkpoint()
                            started = time.perf_counter()
                        if stop.signal:
                            run.write_results(status="interrupted", epochs=epoch, **memory.gigabytes, seconds=seconds)
                            log.warning("Stopped by signal %d; the same command continues from here", stop.signal)
                            raise Interrupted(128 + stop.signal)
                    mean_loss = loss_sum.item() / len(train)  # waits for the device: the epoch's time ends here
                memory.stop()
                trained = min(len(train), batch * self.batch_size) - first_batch * self.batch_size
                epoch_seconds = time.perf_counter() - started

                scores = accuracy(model, test.in_order(self.eval_batch_size), autocast)
                epoch, batch = epoch + 1, 0
                loss_sum = torch.zeros((), device=device)
                if scores["top1"] > best["best_top1"]:
                    best = {"best_top1": scores["top1"], "best_top5": scores["top5"], "best_epoch": epoch}
                    best_model = {name: t.detach().to("cpu", copy=True) for name, t in model.state_dict().items()}
                seconds += time.perf_counter() - started
                speed = trained / epoch_seconds
                history.append({"epoch": epoch, "train_loss": mean_loss, **scores, "lr": rate, "images_per_second": speed})
                run.write_results(
                    epochs=epoch,
                    **scores,
                    **best,
                    train_loss=mean_loss,
                    images_per_second=sum(h["images_per_second"] for h in history) / len(history),
                    **memory.gigabytes,
                    seconds=seconds,
                    history=history,
                )
                board.epoch(history[-1], memory.gigabytes)
                left = seconds / epoch * (self.epochs - epoch)
                log.info(
                    "epoch %d/%d  loss %.4f  top-1 %.2f %%  top-5 %.2f %%  %.0f images/s  %.1f min left",
                    *(epoch, self.epochs, mean_loss, scores["top1"], scores["top5"], speed, left / 60),
                )
                checkpoint()
            board.finish(run.results)
        run.write_results(status="finished")
        return run.results
