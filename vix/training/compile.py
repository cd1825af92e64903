"""torch.compile of a step's forward and backward, where a run is long enough to earn the compilation back."""

import logging
import sys
import time
import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from vix.errors import ConfigError, UserError
from vix.models.counts import training_flops
from vix.system.memory import out_of_memory
from vix.training.micro_batch import dry_run
from vix.training.train_step import TrainStep, mean_loss, shard_batch

log = logging.getLogger(__name__)
# It warns of in-place operations under trainer.activation_checkpointing=selective, which compute the right gradients
# (tests/layers/test_activation_checkpointing.py).
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

# Compiling takes half a minute to a minute, and a CPU's steps gain up to 50 %: at some 1.5e11 FLOP/s, which two cores do, ten
# minutes of training earn it back. On a GPU the host is what small models wait for, some milliseconds a step.
FLOPS_ON_CPU, STEPS_ON_GPU = 1e14, 10_000
MIN_IMAGES = 20_000  # for fewer it is not even worked out

Compile = bool | Literal["auto", "cuda_graphs"]


def check_cuda_graphs(device: torch.device, how: Compile) -> None:
    """Raises ConfigError where CUDA graphs are asked for and the device knows none."""
    if how == "cuda_graphs" and device.type != "cuda":
        raise ConfigError(
            f"trainer.compile=cuda_graphs: this run is on no GPU but the {device.type}; auto, true and false work"
        )


def worth_compiling(model: nn.Module, images: Tensor, steps: int) -> bool:
    """Whether a run of so many steps on such batches is long enough for ``trainer.compile=auto``.

    It follows from the config and the kind of device, not from a clock: the same command must compute the same.
    """
    if images.device.type == "cuda":
        return steps >= STEPS_ON_GPU
    trained = steps * len(images)
    return images.is_cpu and trained >= MIN_IMAGES and trained * training_flops(model, images.shape[1:]) >= FLOPS_ON_CPU


def release_compiled() -> None:
    """Forget what runs of this process compiled: it holds their weights, and on a GPU the memory of their CUDA graphs."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def compile_step(step: TrainStep, how: Compile, steps: int, images: Tensor, labels: Tensor) -> float:
    """Compile forward and backward of a micro-batch where ``how`` says so, and return the seconds that it took.

    how: True, or ``cuda_graphs``, which on a GPU also records what the host launches and replays it; ``auto`` compiles where
        ``steps``, those of the whole run, are enough.
    images, labels: a first batch, in whose trial step the compilation happens; it leaves no trace. Micro-batches of other
        sizes, such as an epoch's last, are computed as before, and so are all where the compiler fails under ``auto``.

    Raises UserError where it fails otherwise.
    """
    if not (worth_compiling(step.state.model, images, steps) if how == "auto" else how):
        return 0.0
    release_compiled()
    clock = time.perf_counter()
    mode = "reduce-overhead" if how == "cuda_graphs" else "default"
    step.compiled = torch.compile(mean_loss, dynamic=False, mode=mode)
    step.uses_cuda_graphs = how == "cuda_graphs"
    at_once = len(shard_batch(images, labels)[1])
    step.compiled_size = min(step.micro_batch or at_once, at_once)
    # Float32 is computed in float32 here: vix/system/device.py.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    log.info("Compiling the step: half a minute to a minute, or some seconds if it was compiled before")
    try:
        with dry_run(step):
            step.forward_backward(0, images, labels)
    except Exception as error:  # compilers fail in many ways, and a model's own mistake comes again without one
        step.compiled = None
        if out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if how != "auto":
            raise UserError(f"trainer.compile={str(how).lower()}: {reason}; trainer.compile=false does without") from error
        log.warning("Not compiled, which only costs time: %s", reason)
    return time.perf_counter() - clock
