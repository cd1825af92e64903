"""Cost of inference: latency, throughput over the batch size, and peak memory of a model."""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from vix.analysis.measure import Cost, measure, synchronize
from vix.build import Experiment
from vix.system.device import resolve_precision
from vix.system.memory import out_of_memory, release_memory
from vix.training.compile import release_compiled
from vix.training.evaluate import evaluated_logits

log = logging.getLogger(__name__)
WORTHWHILE, MAX_BATCH = 1.05, 4096  # the batch size is doubled as long as throughput rises by this factor, up to MAX_BATCH


class Inference:
    """Measures the evaluation of random images: forward passes without gradients, under the run's autocast, and with
    ``trainer.mirror_eval`` also of the mirror images.

    experiment: the parsed config.
    model: its model, which is moved to the trainer's device and set to eval mode.
    seconds: approximate time for the repeats of each measurement.
    compiled: compile the model with torch.compile, for each batch size separately.
    """

    def __init__(self, experiment: Experiment, model: nn.Module, seconds: float, compiled: bool) -> None:
        trainer, data = experiment.trainer, experiment.data
        self.device, self.shape = trainer.torch_device, (data.channels, data.image_size, data.image_size)
        dtype = resolve_precision(trainer.precision, self.device)
        self.autocast = torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32)
        self.mirror = trainer.mirror_eval
        self.model, self.seconds, self.compiled = model.to(self.device).eval(), seconds, compiled

    def forward(self, batch_size: int) -> Callable[[], object]:
        """A function that classifies a batch."""
        model = self.model
        if self.compiled:
            release_compiled()  # PyTorch recompiles a function only a few times
            model = cast(nn.Module, torch.compile(self.model, dynamic=False))
        images = torch.rand(batch_size, *self.shape, device=self.device) * 2 - 1

        def classify() -> None:
            with torch.no_grad():
                evaluated_logits(model, images, self.autocast, self.mirror)

        return classify

    def latency(self) -> Cost:
        """Cost of one image, from its submission to its logits; on a GPU, the host waits for each."""
        classify = self.forward(1)

        def wait_for_one() -> None:
            classify()
            synchronize(self.device)

        return measure(wait_for_one, self.device, self.seconds, fewest=20)

    def batch(self, batch_size: int) -> dict[str, float]:
        """Throughput and peak memory at a batch size: a row of :func:`inference_cost`'s ``batches``."""
        cost = measure(self.forward(batch_size), self.device, self.seconds)
        allocated = cost.allocated
        if self.device.type != "cuda":  # there, only what a step allocates is measured
            state = (*self.model.parameters(), *self.model.buffers())
            allocated += sum(t.nbytes for t in state) + 4 * batch_size * torch.Size(self.shape).numel()
        return {"batch_size": batch_size, "images_per_second": batch_size / cost.seconds, "peak_gb": allocated / 1e9}


def inference_cost(
    experiment: Experiment, model: nn.Module, batch_sizes: Sequence[int], seconds: float, compiled: bool
) -> dict[str, Any] | None:
    """Latency of one image in ms, throughput in images/s at the best batch size, and peak memory in GB (10⁹ bytes).

    experiment, model, seconds, compiled: as for :class:`Inference`.
    batch_sizes: ascending; if the model is not compiled, which takes long, doubled then as long as throughput rises. Sizes that
        do not fit the memory are left out.

    Returns None where the compiler fails.
    """
    measured = Inference(experiment, model, seconds, compiled)
    # TF32 is disabled on purpose (vix/system/device.py).
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    try:
        one = measured.latency()
        rows: list[dict[str, float]] = []
        try:
            for size in batch_sizes:
                rows.append(measured.batch(size))
            while not compiled and rises(rows) and (size := 2 * int(rows[-1]["batch_size"])) <= MAX_BATCH:
                rows.append(measured.batch(size))
        except Exception as error:
            if not out_of_memory(error):
                raise
            log.warning("A batch of %d images does not fit the memory", size)
    except Exception as error:  # compilers raise various exceptions
        if not compiled or out_of_memory(error):
            raise
        log.warning("The model cannot be compiled: %s", str(error).strip().split("\n")[0] or type(error).__name__)
        return None
    finally:
        release_compiled()
        release_memory(measured.device)
    best = max(rows, key=lambda row: row["images_per_second"], default={})
    return {
        "latency_ms": 1e3 * one.seconds,
        "latency_p95_ms": 1e3 * one.seconds_p95,
        "images_per_second": best.get("images_per_second"),
        "best_batch_size": best.get("batch_size"),
        "batches": rows,
    }


def rises(rows: Sequence[dict[str, float]]) -> bool:
    """Whether the largest batch size has a throughput that is worthwhile compared with all smaller ones."""
    speeds = [row["images_per_second"] for row in rows]
    return speeds[-1] > WORTHWHILE * max(speeds[:-1], default=0.0)
