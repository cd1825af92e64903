"""The training loop."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from vix.data.augment import Augmentation
from vix.data.dataset import ImageData
from vix.data.loader import Split
from vix.errors import ConfigError, UserError
from vix.layers.checkpointing import ActivationCheckpointing, Block
from vix.models.counts import parameter_counts
from vix.reporting.logger import LoggedRun, RunLogger
from vix.reporting.progress import EpochBar, log_epoch
from vix.reporting.tensorboard import TensorBoard
from vix.runs.checkpoint import saved_megabytes
from vix.runs.run import RunDirectory, training_is_over
from vix.system.device import hardware, resolve_device, resolve_precision
from vix.system.distributed import broadcast_buffers, broadcast_from_rank0, rank, seed_rank, world_size
from vix.system.memory import PeakMemory, check_memory_limit, limit_memory
from vix.system.signals import SignalHandler
from vix.training.compile import Compile, check_cuda_graphs, compile_step
from vix.training.evaluate import accuracy, predictions
from vix.training.init_from import fit_weights
from vix.training.lr_schedule import lr_lambda
from vix.training.micro_batch import largest_micro_batch, micro_batch_sizes
from vix.training.nonfinite import NonFiniteError, locate_step
from vix.training.resume import check_state_fits, restore
from vix.training.state import Progress, TrainState
from vix.training.train_step import TrainStep, shard_batch
from vix.types import Fraction, NotNegative, NotNegativeFloat, Positive, PositiveFloat

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trainer:
    """Trains a model on an image set, evaluates it after every epoch, and keeps the last and the best weights.

    epochs, batch_size, eval_batch_size: passes over the training images; images per training step and per evaluation step.
    patience: stop after this many epochs without a higher top-1 accuracy on the evaluated split; null: never.
    init_from: directory of a run, or file, whose weights a new run starts from (vix/training/init_from.py); null: random ones.
    mirror_eval: evaluate the mean of the logits of each image and its mirror image.
    micro_batch: images per forward and backward pass, whose gradients are accumulated; null: the whole batch; auto: the most
        that fit the memory.
    activation_checkpointing: recompute activations in the backward pass instead of storing them (vix/layers/checkpointing.py).
    memory_limit_gb: limit in GB (10⁹ bytes) on the GPU memory that PyTorch allocates, or on the memory that a CPU run
        allocates in addition to the image set and the model.
    precision: of forward and loss: bf16, fp16 (with gradient scaling) or fp32; auto: bf16 where the hardware computes in it,
        else fp16 on a GPU and fp32 on a CPU.
    device: auto (CUDA where available, else the CPU), or a PyTorch device such as cpu or cuda:1.
    schedule: learning rate after the warmup: constant, or decreasing to 0 linearly or as a half cosine.
    warmup_epochs: epochs over which the learning rate increases linearly from 0.
    clip_norm: largest norm of the gradient; null: no clipping.
    label_smoothing: of the training loss, in [0, 1).
    ema_decay: EMA decay per step, warmed up as min(decay, (1 + n) / (10 + n)); the EMA is evaluated and kept; null disables it.
    compile: compile forward and backward with torch.compile; cuda_graphs: also use CUDA graphs; auto: true in runs long enough
        to earn back the compilation time.
    checkpoint_every: save a checkpoint every this many steps within an epoch, in addition to the end of every epoch; 0: off.
    probe: log after each epoch the error of every approximate mixer relative to softmax attention.
    resume: auto continues an interrupted run and skips a finished one; force also continues a run with another config, under
        the options of this one. An option that cannot change in the middle of a run is refused (vix/runs/identity.py).
    """

    epochs: Positive
    patience: Positive | None = None
    init_from: str | None = None
    batch_size: Positive = 64
    eval_batch_size: Positive = 256
    mirror_eval: bool = False
    micro_batch: Positive | Literal["auto"] | None = None
    activation_checkpointing: ActivationCheckpointing = None
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
        check_cuda_graphs(self.torch_device, self.compile)

    def fit(
        self,
        model: nn.Module,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        data: ImageData,
        augmentation: Augmentation,
        run: RunDirectory,
        seed: int,
        make_logger: Callable[[LoggedRun], RunLogger] = TensorBoard,
    ) -> dict[str, Any]:
        """Train, write the files of ``run``, and return the results.

        Continues from the run's checkpoint if there is one. On a CPU the result is bit-identical to an uninterrupted run.

        model: the untrained model.
        build_optimizer: builds the optimizer of a model.
        data: the image set.
        augmentation: options of the augmentation.
        run: the run's directory.
        seed: seed of the order and augmentation of the images.
        make_logger: constructor of the logger.

        Raises DataError where the images cannot be read, NonFiniteError where a loss or gradient is not finite, and SystemExit
        after a signal, when the state is saved; during compilation, and while a step is located, the last checkpoint stays.
        """
        session = self.start(model, build_optimizer, data, augmentation, run, seed)
        state = session.state
        logged = LoggedRun(run, state.progress.epoch + 1, state.eval_model, session.test, data.class_names, self.probe)
        with session.signals, make_logger(logged) if rank() == 0 else nullcontext() as board:
            if not self.is_over(state.progress):
                self.compile_train_step(session)
            try:
                while not self.is_over(state.progress):
                    loss = self.train_epoch(session)
                    self.end_epoch(session, loss, self.evaluate(session), board)
                    self.save_checkpoint(session)
            except NonFiniteError:
                raise self.locate_nonfinite(session) from None
            limit_memory(self.torch_device, None)
            if board:
                # Rank 0 evaluates all images, but no more at once than its share of a batch in ``evaluate``.
                batches = self.eval_batches(session, math.ceil(self.eval_batch_size / world_size()))
                predicted = predictions(state.eval_model, batches, session.step.autocast, self.mirror_eval)
                board.finish(run.results, predicted.loss, predicted.top[:, 0])
        stopped_early = state.progress.epoch < self.epochs
        if stopped_early:
            log.info("Stopped early: top-1 has not increased since epoch %d", state.progress.best["best_epoch"])
        run.write_results(status="finished", stopped_early=stopped_early)
        return run.results

    def is_over(self, progress: Progress) -> bool:
        """Whether all epochs are done, or ``patience`` ends the run."""
        return training_is_over(progress.epoch, progress.best, self.epochs, self.patience)

    def start(
        self,
        model: nn.Module,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        data: ImageData,
        augmentation: Augmentation,
        run: RunDirectory,
        seed: int,
    ) -> "Session":
        """Load the images, and create the state or restore it from the run's checkpoint. Arguments as in ``fit``."""
        device = self.torch_device
        saved = broadcast_from_rank0(lambda: run.load_checkpoint(self.resume))
        changed = run.resume_from(saved)
        check_state_fits(changed, build_optimizer, model, saved, run.directory)
        if not saved:
            if self.resume == "force":
                log.warning(
                    "trainer.resume=force: nothing to continue in %s, so training begins with the first epoch; name the "
                    "directory of an earlier run with hydra.run.dir=DIR",
                    run.directory,
                )
            weights, messages = fit_weights(model, self.init_from)
            model.load_state_dict(weights, strict=False)
            for message in messages:
                log.info(message)
        dtype = resolve_precision(run.precision(self.precision, changed), device)
        train, test = data.load(device)
        optimizer = build_optimizer(model := model.to(device))
        limit_memory(device, self.memory_limit_gb)
        steps_per_epoch = math.ceil(len(train) / self.batch_size)
        warmup_steps, steps = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        lr_scheduler = LambdaLR(optimizer, lr_lambda(self.schedule, warmup_steps, steps))
        peak_memory = PeakMemory(device, train.nbytes + test.nbytes, graphs=self.compile == "cuda_graphs")
        state = TrainState(model, optimizer, lr_scheduler, dtype, self.ema_decay, peak_memory)
        step = self.build_step(state)
        modes = [block.activation_checkpointing for block in model.modules() if isinstance(block, Block)]
        if self.activation_checkpointing and None in modes:
            option = f"trainer.activation_checkpointing={self.activation_checkpointing}"
            log.warning("%s has no effect on %d of %d blocks, which contain a BatchNorm", option, modes.count(None), len(modes))
        step.class_weights = data.loss_weights(train.labels)
        session = Session(run, data, augmentation, train, test, state, step, seed, steps_per_epoch)
        if self.micro_batch == "auto":
            images, labels, _ = shard_batch(*session.first_batch(self.batch_size))
            sizes = micro_batch_sizes(len(labels), self.batch_size, model, data)
            step.micro_batch = largest_micro_batch(step, images, labels, sizes)
        if saved:
            restore(state, saved, steps_per_epoch, run.directory)
            log.info("Continuing after %d epochs and %d steps", state.progress.epoch, state.progress.batch)
        else:
            self.save_checkpoint(session)
        run.write_results(
            status="running",
            **parameter_counts(model),
            checkpoint_mb=saved_megabytes(model.state_dict()),
            **hardware(device, dtype),
            train_images=len(train),
            test_images=len(test),
            tested_on=data.eval_split,
            class_names=list(data.class_names),
            micro_batch=step.micro_batch,
        )
        return session

    def build_step(self, state: TrainState) -> TrainStep:
        """A training step with this trainer's options; ``micro_batch=auto`` is resolved later."""
        micro_batch = None if self.micro_batch == "auto" else self.micro_batch
        return TrainStep(state, micro_batch, self.clip_norm, self.label_smoothing, self.activation_checkpointing)

    def compile_train_step(self, session: "Session") -> None:
        """Compile forward and backward if configured.

        A signal may interrupt the compilation, because all is saved before, and nothing is saved then: the dry runs of the
        compilation may not have been undone.
        """
        with session.signals.interruptible(lambda: self.exit_interrupted(session)):
            steps = self.epochs * session.steps_per_epoch
            session.state.progress.seconds += compile_step(
                session.step, self.compile, steps, *session.first_batch(self.batch_size)
            )
        session.run.write_results(compiled=session.step.compiled is not None)

    def train_epoch(self, session: "Session") -> float:
        """Train to the end of the current epoch and return its mean loss. Raises NonFiniteError."""
        state, step, progress = session.state, session.step, session.state.progress
        state.model.train()
        state.peak_memory.start()
        first = progress.epoch * session.steps_per_epoch
        clock = time.perf_counter()
        done = progress.batch * self.batch_size
        with EpochBar(progress.epoch, self.epochs, len(session.train), done, progress.history) as bar:
            for images, labels in session.train_batches(self.batch_size):
                loss = step.forward_backward(first + progress.batch, images, labels)
                progress.lr = state.lr
                step.optimizer_step()
                progress.loss_sum += loss * len(labels)
                progress.batch += 1
                bar.step(len(labels), loss)
                on_cpu = self.torch_device.type == "cpu"
                if on_cpu or progress.batch % 100 == 0:  # the host waits for the GPU
                    session.raise_if_nonfinite()
                    state.sync_lr_scheduler()
                # With several processes the hosts wait for each other, but not for the GPUs.
                communicate = on_cpu or progress.batch % 10 == 0 or progress.batch == session.steps_per_epoch
                signal_received = session.signals.received(communicate)
                checkpoint_due = self.checkpoint_every and progress.batch % self.checkpoint_every == 0
                if signal_received or (checkpoint_due and progress.batch < session.steps_per_epoch):
                    session.raise_if_nonfinite()
                    progress.train_seconds += time.perf_counter() - clock
                    state.peak_memory.stop()
                    if signal_received:
                        self.save_and_exit(session)
                    self.save_checkpoint(session)
                    clock = time.perf_counter()
        session.raise_if_nonfinite()
        mean_loss = progress.loss_sum.item() / len(session.train)  # waits for the device, so that the time is complete
        progress.train_seconds += time.perf_counter() - clock
        state.peak_memory.stop()
        return mean_loss

    def evaluate(self, session: "Session") -> dict[str, Any]:
        """Accuracy and loss on the evaluated split (:func:`vix.training.evaluate.scores`), and ``eval_seconds``."""
        clock = time.perf_counter()
        state, autocast = session.state, session.step.autocast
        broadcast_buffers(state.model)  # those that the checkpoint will contain
        if state.ema:
            broadcast_buffers(state.ema.module)
        batches = self.eval_batches(session, self.eval_batch_size)
        scores = accuracy(state.eval_model, batches, autocast, session.test.classes, self.mirror_eval)
        if not math.isfinite(scores["test_loss"]) and state.dtype is not torch.float16:  # which may overflow on single images
            raise UserError(
                f"the loss of the evaluation after epoch {state.progress.epoch + 1} is not finite: training has diverged; "
                "trainer.resume=force with a lower optimizer.lr continues from the last checkpoint, which is from before"
            )
        return {**scores, "eval_seconds": time.perf_counter() - clock}

    def eval_batches(self, session: "Session", batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the evaluated images.

        A signal between two batches saves and exits. The run then continues with this evaluation.
        """
        for images, labels in session.test.eval_batches(batch_size):
            if session.signals.signal and world_size() == 1:
                self.save_and_exit(session)
            yield images, labels

    def end_epoch(self, session: "Session", loss: float, scores: dict[str, Any], board: RunLogger | None) -> None:
        """Add the epoch's results to the history, results.json, the logger and the log."""
        state, progress, run = session.state, session.state.progress, session.run
        seconds = progress.train_seconds + scores.pop("eval_seconds")
        progress.seconds += seconds
        images_per_second = len(session.train) / progress.train_seconds
        row = {"train_loss": loss, **scores, "lr": progress.lr, "images_per_second": images_per_second}
        progress.end_epoch(row, state.eval_model)
        run.write_results(
            epochs=progress.epoch,
            **(scores | progress.best | state.peak_memory.gigabytes),
            train_loss=loss,
            images_per_second=statistics.median(h["images_per_second"] for h in progress.history),
            skipped_steps=int(state.skipped_steps),
            seconds=progress.seconds,
            history=progress.history,
        )
        if board:
            board.epoch(progress.history[-1], state.peak_memory.gigabytes)
        log_epoch(progress.history[-1], self.epochs, seconds)

    def save_checkpoint(self, session: "Session") -> None:
        """Save the state in the run's directory."""
        session.run.save_checkpoint(session.state.state_dict())

    def save_and_exit(self, session: "Session") -> NoReturn:
        """Save the state and exit with status 128 + the number of the received signal."""
        self.save_checkpoint(session)
        self.exit_interrupted(session)

    def exit_interrupted(self, session: "Session") -> NoReturn:
        """Exit with status 128 + the number of the received signal, after the state was saved."""
        progress, number = session.state.progress, session.signals.signal
        session.run.write_results(status="interrupted", epochs=progress.epoch, **session.state.peak_memory.gigabytes)
        log.warning("Stopped by signal %d; the same command continues the run", number)
        raise SystemExit(128 + (number or 0))

    def locate_nonfinite(self, session: "Session") -> NonFiniteError:
        """Repeat the steps since the last checkpoint until one is not finite, and return the error that names its layer."""
        saved = broadcast_from_rank0(lambda: session.run.load_checkpoint("force") or {})
        session.state.load_state_dict(saved, session.steps_per_epoch)
        session.step.found_nonfinite.zero_()
        progress = session.state.progress
        first = progress.epoch * session.steps_per_epoch + progress.batch
        log.info("A loss or gradient is not finite: repeating the steps since the last checkpoint to locate it")

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in session.train_batches(self.batch_size):
                if session.signals.received(communicate=True):
                    self.exit_interrupted(session)
                yield batch

        return locate_step(session.step, batches(), first, session.run.directory, session.run.config)


@dataclass
class Session:
    """The objects of one call of ``Trainer.fit``.

    run: the run's directory.
    data: the image set.
    augmentation: options of the augmentation.
    train, test: the training images and the evaluated images, on the device.
    state: the state that is trained and saved.
    step: the training step of ``state``.
    seed: seed of the run.
    steps_per_epoch: training steps per epoch.
    signals: receives the signals that stop a run.
    """

    run: RunDirectory
    data: ImageData
    augmentation: Augmentation
    train: Split
    test: Split
    state: TrainState
    step: TrainStep
    seed: int
    steps_per_epoch: int
    signals: SignalHandler = field(default_factory=SignalHandler)

    def first_batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The first batch of the run, for dry runs."""
        return next(self.train.train_batches(batch_size, self.seed, epoch=0, augmentation=self.augmentation))

    def train_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The remaining batches of the current epoch. Before each, the random generators of ranks above 0 are seeded."""
        epoch, first = self.state.progress.epoch, self.state.progress.batch
        batches = self.train.train_batches(batch_size, self.seed, epoch, first, self.augmentation)
        for number, batch in enumerate(batches, first):
            seed_rank(self.seed, epoch, number)
            yield batch

    def raise_if_nonfinite(self) -> None:
        """Raises NonFiniteError where a loss or gradient so far was not finite. Waits for the device."""
        if self.step.found_nonfinite:
            raise NonFiniteError("a loss or gradient is not finite")
