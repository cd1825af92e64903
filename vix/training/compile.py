"""Compilation of forward and backward with torch.compile, in runs that are long enough to earn back the compilation time."""

import logging
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vix.errors import ConfigError, UserError
from vix.models.counts import training_flops
from vix.system.memory import out_of_memory
from vix.system.rng import get_rng_state
from vix.training.micro_batch import dry_run
from vix.training.train_step import TrainStep, mean_loss, shard_batch

log = logging.getLogger(__name__)
# PyTorch warns about in-place operations under trainer.activation_checkpointing=selective, although the gradients are correct
# (tests/layers/test_activation_checkpointing.py).
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

# Compilation takes 30 to 60 s. On a CPU it makes steps up to 50 % faster, so that about five minutes of training earn it back:
# 5e13 FLOPs at the 1.5e11 FLOP/s of two cores. On a GPU it saves 4 to 10 % of the memory and little time (docs/performance.md).
MIN_FLOPS_ON_CPU, MIN_STEPS_ON_GPU = 5e13, 10_000
MIN_IMAGES = 20_000  # in shorter runs the FLOPs are not counted

# Dropout draws the random numbers of the uncompiled step, with which the compiled one is compared. g++ 12.2 compiles some
# transpositions of bfloat16 in vectors of 512 bits wrongly, by the pass that is switched off; steps were not slower without it.
# PyTorch has no option for the compiler's flags, but passes on this one's value as it is.
OPTIONS_ON_CPU: dict[str, Any] = {
    "fallback_random": True,
    "cpp.enable_floating_point_contract_flag": "off -fno-tree-slp-vectorize",
}

# Of the norm of a parameter's gradient; between two roundings to bfloat16 it is a few percent
# (tests/training/test_gradients.py). Gradients of less than the second share of the whole are not compared: some are zero but
# for rounding.
MAX_DIFFERENCE, SMALL_GRADIENT = 0.3, 1e-3

# Of the loader of libraries, for a file below the compiler's cache.
INCOMPLETE = re.compile(r"(/\S*\.so): (?:file too short|invalid ELF header|cannot read file data)")

Compile = bool | Literal["auto", "cuda_graphs"]


def check_cuda_graphs(device: torch.device, how: Compile) -> None:
    """Check that the device supports CUDA graphs, where they are requested.

    device: the run's device.
    how: the option ``trainer.compile``.

    Raises ConfigError where it does not.
    """
    if how == "cuda_graphs" and device.type != "cuda":
        raise ConfigError(
            f"trainer.compile=cuda_graphs: needs a CUDA GPU, but this run uses the {device.type}; use auto, true or false"
        )


def worth_compiling(model: nn.Module, images: Tensor, steps: int) -> bool:
    """Whether a run is long enough to be compiled under ``trainer.compile=auto``.

    The decision depends on the config and the type of the device, not on measured times, so that the same command always
    computes the same result.

    model: the model.
    images: a batch of images (B, C, Y, X).
    steps: steps of the whole run.
    """
    if images.device.type == "cuda":
        return steps >= MIN_STEPS_ON_GPU
    trained = steps * len(images)
    return images.is_cpu and trained >= MIN_IMAGES and trained * training_flops(model, images.shape[1:]) >= MIN_FLOPS_ON_CPU


def release_compiled() -> None:
    """Release what earlier runs of this process compiled, which keeps their weights and CUDA graphs in memory."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class DryRun(NamedTuple):
    """What a dry run computed.

    gradients: of all parameters that have one.
    finite: whether loss and gradients are; in float16, where gradients may overflow, only the loss must be.
    random: whether it drew random numbers.
    """

    gradients: list[Tensor]
    finite: bool
    random: bool


def dry_run_gradients(step: TrainStep, images: Tensor, labels: Tensor) -> DryRun:
    """Gradients of a batch, in a dry run with the random numbers that the next step will use."""
    with dry_run(step):
        before = get_rng_state()
        step.forward_backward(0, images, labels)
        after = get_rng_state()
        drawn = any(before[name] is not None and not before[name].equal(after[name]) for name in ("torch", "cuda"))
        gradients = [p.grad for p in step.state.model.parameters() if p.grad is not None]
        return DryRun(gradients, not step.found_nonfinite, drawn)


def compiler_fault(step: TrainStep, images: Tensor, labels: Tensor, same_numbers: bool) -> str:
    """How gradients of the compiled step differ from those of the uncompiled one; empty where only by rounding.

    same_numbers: whether a compiled step draws the random numbers of the uncompiled one. If not, only whether the gradients are
        finite is compared for steps that draw some, such as for dropout.

    Nothing is compared where memory suffices for the compiled step alone.
    """
    found = dry_run_gradients(step, images, labels)
    compiled, step.compiled = step.compiled, None
    try:
        expected = dry_run_gradients(step, images, labels)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return ""
    finally:
        step.compiled = compiled
    if not expected.finite:
        return ""
    if not found.finite:
        return "the compiled step is not finite, but the uncompiled one is"
    return "" if expected.random and not same_numbers else describe_difference(found.gradients, expected.gradients)


def describe_difference(gradients: list[Tensor], expected: list[Tensor]) -> str:
    """The first gradient that differs by more than rounding, as a message; empty where none does."""
    norms = [g.float().norm() for g in expected]
    total = torch.stack(norms).norm()
    for gradient, exact, norm in zip(gradients, expected, norms, strict=True):
        distance = (gradient.float() - exact.float()).norm()
        if norm > SMALL_GRADIENT * total and distance > MAX_DIFFERENCE * norm and distance.isfinite():
            return f"gradients of the compiled step differ by {distance.item() / norm.item():.0%} from the uncompiled ones"
    return ""


def compile_loss(device: torch.device, how: Compile) -> Callable[..., Tensor]:
    """The compiled loss of a micro-batch; nothing is compiled before its first call."""
    if device.type != "cpu":
        return torch.compile(mean_loss, dynamic=False, mode="reduce-overhead" if how == "cuda_graphs" else "default")
    return torch.compile(mean_loss, dynamic=False, options=OPTIONS_ON_CPU)


def compile_and_compare(step: TrainStep, how: Compile, images: Tensor, labels: Tensor) -> None:
    """Compile forward and backward. Arguments as for ``compile_step``.

    Raises RuntimeError where the compiled step computes something else than the uncompiled one, and what compilers raise.
    """
    while True:
        step.compiled = compile_loss(images.device, how)
        try:
            fault = compiler_fault(step, images, labels, same_numbers=images.is_cpu)
            break
        except Exception as error:
            if not removed_from_cache(error):
                raise
            release_compiled()
    if fault:
        raise RuntimeError(f"{fault}: a fault of the compiler")


def removed_from_cache(error: Exception) -> bool:
    """Remove a library from the compiler's cache that is incomplete, since a run was killed while it was compiled.

    error: of the compiler.   Returns whether it was such an error.
    """
    found = INCOMPLETE.search(str(error))
    if not found or not (library := Path(found[1])).exists():
        return False
    log.warning("Compiling again what is incomplete in the compiler's cache: %s", library)
    library.unlink()
    return True


def compile_step(step: TrainStep, how: Compile, steps: int, images: Tensor, labels: Tensor) -> float:
    """Compile forward and backward of a micro-batch, and return the time that this took, in seconds.

    Only micro-batches of the usual size use the compiled code; others, such as the last one of an epoch, run eagerly. If the
    compiler fails under ``auto``, or what it compiles computes something else than the uncompiled step, all run eagerly.

    step: the training step.
    how: the option ``trainer.compile``. ``auto`` compiles in long runs; ``cuda_graphs`` also records and replays the kernel
        launches with CUDA graphs.
    steps: steps of the whole run.
    images, labels: a batch for the dry run that triggers the compilation; the run's state does not change.

    Raises UserError where the compiler fails under another option than ``auto``.
    """
    if not (worth_compiling(step.state.model, images, steps) if how == "auto" else how):
        return 0.0
    release_compiled()
    clock = time.perf_counter()
    step.uses_cuda_graphs = how == "cuda_graphs"
    at_once = len(shard_batch(images, labels)[1])
    step.compiled_size = min(step.micro_batch or at_once, at_once)
    # TF32 is disabled on purpose (vix/system/device.py).
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    log.info("Compiling the step, which takes 30 to 60 s, or a few seconds with a compiler cache")
    try:
        compile_and_compare(step, how, images, labels)
    except Exception as error:  # compilers raise various exceptions; an error in the model is raised again without the compiler
        step.compiled = None
        if out_of_memory(error):
            raise
        lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("backend=")]
        reason = lines[0].strip() if lines else type(error).__name__
        if how != "auto":
            raise UserError(f"trainer.compile={str(how).lower()}: {reason}; use trainer.compile=false") from error
        log.warning("Continuing without compilation, which only takes longer: %s", reason)
    return time.perf_counter() - clock
