"""The training loop, top to bottom."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from vix.checks import ConfigError, Fraction, NotNegative, NotNegativeFloat, Positive, PositiveFloat
from vix.compilation import Compile, compile_step, refuse_graphs
from vix.data.dataset import ImageData
from vix.distributed import from_first, processes, rank, seed_epoch
from vix.learner import Learner, largest_micro_batch
from vix.memory import check_memory_limit, limit_memory
from vix.metrics import PeakMemory, accuracy
from vix.models.recompute import Recompute
from vix.nonfinite import find
from vix.progress import EpochBar, tell_epoch
from vix.resume import refuse_misfit
from vix.run import Position, Run, StopRequest, parameter_counts, saved_megabytes
from vix.runtime import get_rng_state, hardware, resolve_device, resolve_precision, set_rng_state
from vix.schedule import rate_factor
from vix.tensorboard import TensorBoard

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trainer:
    """Trains a model on an image set, tests it after every epoch, and keeps the last and the best weights.

    epochs, batch_size, eval_batch_size: passes over the training images; images a step, and at a time when testing.
    micro_batch: images at a time within a step, whose gradients add up to the batch's; null all at once, auto what fits.
    memory_limit_gb: cap (10⁹ bytes): the GPU memory that PyTorch takes, or what a CPU run takes beside image set and model.
    precision: of forward and loss: bf16, fp16 (with gradient scaling), fp32; auto: bf16 if native, else fp16 (on a CPU fp32).
    device: auto (CUDA where there is one, else the CPU), or a PyTorch device such as cpu or cuda:1.
    schedule, warmup_epochs: constant, or down to 0 on a line or a half cosine; epochs in which the rate first rises from 0.
    clip_norm: largest norm of the gradient; null does not clip.
    label_smoothing, ema_decay: of the training loss, and of the average of the weights that is tested and kept (null: none is).
    compile, recompute: forward and backward by torch.compile (auto: in long runs), and what of the blocks is computed twice to
        save memory (vix/models/recompute.py).
    checkpoint_every: also save every so many steps within an epoch; 0 saves at the ends of epochs only.
    probe: log each epoch how far every layer of an approximate mixer is from softmax attention.
    resume: auto continues an interrupted run and skips a finished one; force does so although its config was another, with the
        options of this config. One that cannot change in the middle of a run is refused (vix/resume.py).
    """

    epochs: Positive = 40
    batch_size: Positive = 64
    eval_batch_size: Positive = 256
    micro_batch: Positive | Literal["auto"] | None = None
    recompute: Recompute = None
    memory_limit_gb: PositiveFloat | None = None
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    device: str = "auto"
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_epochs: NotNegativeFloat = 0.0
    clip_norm: PositiveFloat | None = None
    label_smoothing: Fraction = 0.0
    ema_decay: Fraction | None = None
    compile: Compile = "auto"
    checkpoint_every: NotNegative = 0
    probe: bool = False
    resume: Literal["auto", "force"] = "auto"

    def __post_init__(self) -> None:
        if self.warmup_epochs > self.epochs:
            raise ConfigError(f"trainer.warmup_epochs={self.warmup_epochs}: must be at most trainer.epochs={self.epochs}")
        self.torch_device = resolve_device(self.device)
        check_memory_limit(self.torch_device, self.memory_limit_gb)
        refuse_graphs(self.torch_device, self.compile)

    def fit(
        self, model: nn.Module, make_optimizer: Callable[..., torch.optim.Optimizer], data: ImageData, run: Run, seed: int
    ) -> dict[str, Any]:
        """Train, writing ``run``'s files as it goes, and return the results.

        Continues from the run's checkpoint where there is one: on a CPU, to the bit as if it had never stopped.
        Raises DataError where the data cannot be read, and SystemExit where a signal asked to stop and all is saved.
        """
        device = self.torch_device
        saved = from_first(lambda: run.load_checkpoint(self.resume))
        changed = run.resume_from(saved)
        refuse_misfit(changed, make_optimizer, model, saved, run.directory)
        dtype = resolve_precision(run.precision(self.precision, changed), device)
        train, test = data.load(device)
        optimizer = make_optimizer(model := model.to(device))
        limit_memory(device, self.memory_limit_gb)
        steps_per_epoch = math.ceil(len(train) / self.batch_size)
        warmup_steps, steps = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        schedule = LambdaLR(optimizer, rate_factor(self.schedule, warmup_steps, steps))
        options = self.clip_norm, self.label_smoothing, self.ema_decay, self.recompute
        learner = Learner(model, optimizer, schedule, dtype, None, *options)
        first_batch = next(train.shuffled(self.batch_size, seed, epoch=0))
        learner.micro_batch = largest_micro_batch(learner, *first_batch) if self.micro_batch == "auto" else self.micro_batch
        memory = PeakMemory(device, train.nbytes + test.nbytes, graphs=self.compile == "cuda_graphs")
        at, stop = Position(loss_sum=torch.zeros((), device=device)), StopRequest()

        def restore(saved: dict[str, Any]) -> None:
            vars(at).update(saved["position"], loss_sum=saved["position"]["loss_sum"].to(device))
            learner.load_state_dict(saved, at.epoch * steps_per_epoch + at.batch)
            memory.load_state_dict(saved["memory"])
            set_rng_state(saved["rng"])

        def checkpoint() -> None:
            state = {**learner.state_dict(), "best_model": at.best_model, "memory": memory.state_dict()}
            run.save_checkpoint({**state, "rng": get_rng_state(), "position": vars(at)})

        def stop_if_broken() -> None:
            if learner.broken:
                restore(from_first(lambda: run.load_checkpoint("force") or {}))
                batches = train.shuffled(self.batch_size, seed, at.epoch, at.batch)
                raise find(learner, batches, at.epoch * steps_per_epoch + at.batch, run.directory, run.config)

        def test_batches() -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in test.in_order(self.eval_batch_size):
                if stop.signal and processes() == 1:
                    leave()  # the test of this epoch is what continues it
                yield images, labels

        def leave() -> None:
            checkpoint()
            run.write_results(status="interrupted", epochs=at.epoch, **memory.gigabytes)
            log.warning("Stopped by signal %d; the same command continues from here", stop.signal)
            raise SystemExit(128 + (stop.signal or 0))

        if saved:
            restore(saved)
            log.info("Continuing after %d epochs and %d steps", at.epoch, at.batch)
        else:
            checkpoint()
        run.write_results(
            status="running",
            **parameter_counts(model),
            checkpoint_mb=saved_megabytes(model.state_dict()),
            **hardware(device, dtype),
            train_images=len(train),
            test_images=len(test),
            tested_on=data.tested_on,
            micro_batch=learner.micro_batch,
        )
        shown = learner.kept, test, data.class_names, self.probe
        with stop, TensorBoard(run, at.epoch + 1, *shown) if rank() == 0 else nullcontext() as board:
            with stop.at_once(leave):
                at.seconds += compile_step(learner, self.compile, steps, *first_batch)
            del first_batch  # the trials' alone
            run.write_results(compiled=learner.compiled is not None)
            while at.epoch < self.epochs:
                model.train()
                memory.start()
                seed_epoch(seed, at.epoch)
                clock = time.perf_counter()
                with EpochBar(at.epoch, self.epochs, len(train), at.history) as bar:
                    for images, labels in train.shuffled(self.batch_size, seed, at.epoch, at.batch):
                        loss = learner.gradients(at.epoch * steps_per_epoch + at.batch, images, labels)
                        at.rate = learner.rate
                        learner.update()
                        at.loss_sum += loss * len(labels)
                        at.batch += 1
                        bar.step(len(labels), loss)
                        looks = device.type == "cpu" or at.batch % 100 == 0  # on a GPU, looking is waiting
                        if looks:
                            stop_if_broken()
                            learner.sync_schedule()
                        asked = stop.agreed(looks)
                        wanted = self.checkpoint_every and at.batch % self.checkpoint_every == 0
                        if asked or (wanted and at.batch < steps_per_epoch):
                            stop_if_broken()
                            at.train_seconds += time.perf_counter() - clock
                            memory.stop()
                            leave() if asked else checkpoint()
                            clock = time.perf_counter()
                stop_if_broken()
                mean_loss = at.loss_sum.item() / len(train)  # waits for the device: the epoch's time ends here
                at.train_seconds += time.perf_counter() - clock
                memory.stop()
                clock = time.perf_counter()
                scores = accuracy(learner.kept, test_batches(), learner.autocast)
                at.seconds += (seconds := at.train_seconds + time.perf_counter() - clock)
                row = {"train_loss": mean_loss, **scores, "lr": at.rate, "images_per_second": len(train) / at.train_seconds}
                at.end_epoch(row, learner.kept)
                run.write_results(
                    epochs=at.epoch,
                    **(scores | at.best | memory.gigabytes),
                    train_loss=mean_loss,
                    images_per_second=statistics.median(h["images_per_second"] for h in at.history),
                    skipped_steps=learner.skipped,
                    seconds=at.seconds,
                    history=at.history,
                )
                if board:
                    board.epoch(at.history[-1], memory.gigabytes)
                tell_epoch(at.history[-1], self.epochs, seconds)
                checkpoint()
            limit_memory(device, None)
            if board:
                board.finish(run.results, test_batches(), learner.autocast)
        run.write_results(status="finished")
        return run.results
