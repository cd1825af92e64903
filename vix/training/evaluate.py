"""Test accuracy and device memory."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix.system.distributed import all_reduce_sum, shard


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], autocast: torch.autocast) -> dict[str, float]:
    """``top1`` and ``top5`` in percent of all images of all processes; each image counts the same, whatever its batch."""
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=autocast.device)  # of GPUs the current one, which is the run's
    for batch, batch_labels in batches:
        images, labels = shard(batch), shard(batch_labels)
        if len(labels):
            with autocast:
                logits_BK = model(images)
            hits = logits_BK.float().topk(min(5, logits_BK.shape[1])).indices == labels[:, None]
            counts += torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum(), torch.ones_like(labels).sum()])
    top1, top5, images_tested = all_reduce_sum(counts).tolist()
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
