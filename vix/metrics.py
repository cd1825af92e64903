"""Test accuracy and device memory."""

import resource
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix.distributed import share, total


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], autocast: torch.autocast) -> dict[str, float]:
    """``top1`` and ``top5`` in percent of all images of all processes; each image counts the same, whatever its batch."""
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=autocast.device)  # of GPUs the current one, which is the run's
    for batch, batch_labels in batches:
        images, labels = share(batch), share(batch_labels)
        if len(labels):
            with autocast:
                logits_BK = model(images)
            hits = logits_BK.float().topk(min(5, logits_BK.shape[1])).indices == labels[:, None]
            counts += torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum(), torch.ones_like(labels).sum()])
    top1, top5, images_tested = total(counts).tolist()
    return {"top1": 100 * (top1 / images_tested), "top5": 100 * (top5 / images_tested)}


@torch.no_grad()
def predictions(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], autocast: torch.autocast) -> tuple[Tensor, Tensor]:
    """The cross-entropy (nats) and the predicted class of every image, on the CPU."""
    model.eval()
    losses, guesses = [], []
    for images, labels in batches:
        with autocast:
            logits_BK = model(images)
        losses.append(F.nll_loss(logits_BK.float().log_softmax(dim=1), labels, reduction="none"))
        guesses.append(logits_BK.argmax(dim=1))
    return torch.cat(losses).cpu(), torch.cat(guesses).cpu()


class PeakMemory:
    """Peak GPU memory of the training steps alone, without the resident data set, in GB (10⁹ bytes).

    device: all figures are None where it is no CUDA device.
    resident: bytes of the data set that lies on the device, taken off both figures.
    graphs: whether the steps replay CUDA graphs. A replay allocates nothing that PyTorch counts, so the memory reserved, which
        holds the graphs' pools, is then both figures.
    """

    def __init__(self, device: torch.device, resident: int, graphs: bool = False) -> None:
        self.device, self.resident, self.graphs = device, resident, graphs
        self.allocated = self.reserved = 0

    def start(self) -> None:
        """Begin to watch: before an epoch's steps."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the evaluation before cached is not the steps' own
            torch.cuda.reset_peak_memory_stats(self.device)

    def stop(self) -> None:
        """Take the peaks since ``start``: after an epoch's steps, before the evaluation."""
        if self.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.device)
            allocated = reserved if self.graphs else torch.cuda.max_memory_allocated(self.device)
            self.allocated = max(self.allocated, allocated - self.resident)
            self.reserved = max(self.reserved, reserved - self.resident)

    def state_dict(self) -> dict[str, int]:
        return {"allocated": self.allocated, "reserved": self.reserved}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.allocated, self.reserved = state["allocated"], state["reserved"]

    @property
    def gigabytes(self) -> dict[str, float | None]:
        gpu = self.device.type == "cuda"
        return {
            "peak_gpu_allocated_gb": self.allocated / 1e9 if gpu else None,
            "peak_gpu_reserved_gb": self.reserved / 1e9 if gpu else None,
            "resident_data_gb": self.resident / 1e9 if gpu else None,
        }


def process_gigabytes() -> float:
    """Peak resident memory of this process so far, in GB (10⁹ bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
