"""Evaluation: accuracy, losses and predictions."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix.system.distributed import all_reduce_sum, shard


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], autocast: torch.autocast) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, over the images of all processes, as ``top1`` and ``top5``.

    model: the model, which is set to eval mode.
    batches: batches of images (B, C, Y, X) and labels (B,); each process evaluates its share of every batch.
    autocast: autocast context of the run.
    """
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=autocast.device)  # "cuda" is the current GPU, which is the run's
    for batch, batch_labels in batches:
        images, labels = shard(batch), shard(batch_labels)
        if len(labels):
            with autocast:
                logits_BK = model(images)
            hits = logits_BK.float().topk(min(5, logits_BK.shape[1])).indices == labels[:, None]
            counts += torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum(), torch.ones_like(labels).sum()])
    top1, top5, evaluated = all_reduce_sum(counts).tolist()
    return {"top1": 100 * (top1 / evaluated), "top5": 100 * (top5 / evaluated)}


@torch.no_grad()
def predictions(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], autocast: torch.autocast) -> tuple[Tensor, Tensor]:
    """Cross-entropy (in nats) and predicted class of every image: (count,) each, on the CPU.

    model: the model, which is set to eval mode.
    batches: batches of images (B, C, Y, X) and labels (B,).
    autocast: autocast context of the run.
    """
    model.eval()
    losses, predicted = [], []
    for images, labels in batches:
        with autocast:
            logits_BK = model(images)
        losses.append(F.nll_loss(logits_BK.float().log_softmax(dim=1), labels, reduction="none"))
        predicted.append(logits_BK.argmax(dim=1))
    return torch.cat(losses).cpu(), torch.cat(predicted).cpu()
