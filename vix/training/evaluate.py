"""Evaluation: predictions, accuracy and loss."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix.system.distributed import all_reduce_sum, shard

TOP = 5  # number of the most probable classes that are kept


class Predictions(NamedTuple):
    """Predictions for images, on the CPU, in the order of the batches.

    loss: cross-entropy in nats, (count,).
    top: the five classes with the highest logits, or all where there are fewer, (count, 5).
    labels: true classes, (count,).
    """

    loss: Tensor
    top: Tensor
    labels: Tensor


def evaluated_logits(model: nn.Module, images_BCYX: Tensor, autocast: torch.autocast, mirror: bool = False) -> Tensor:
    """Logits (B, K) in float32.

    model: the model.
    images_BCYX: normalized images.
    autocast: autocast context of the run.
    mirror: average the logits of each image and its mirror image (``trainer.mirror_eval``).
    """
    with autocast:
        logits_BK = model(images_BCYX).float()
        if mirror:
            logits_BK = (logits_BK + model(images_BCYX.flip(-1)).float()) / 2
    return logits_BK


@torch.no_grad()
def predictions(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], autocast: torch.autocast, mirror: bool = False
) -> Predictions:
    """The predictions for every image.

    model: the model, which is set to eval mode.
    batches: batches of images (B, C, Y, X) and labels (B,).
    autocast, mirror: as in :func:`evaluated_logits`.
    """
    model.eval()
    parts = []
    for images, labels in batches:
        logits_BK = evaluated_logits(model, images, autocast, mirror)
        loss = F.nll_loss(logits_BK.log_softmax(dim=1), labels, reduction="none")
        parts.append((loss, logits_BK.topk(min(TOP, logits_BK.shape[1])).indices, labels))
    if not parts:  # a process whose shards are all empty
        none = torch.empty(0, dtype=torch.int64)
        return Predictions(torch.empty(0), none[:, None], none)
    return Predictions(*(torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True)))


def scores(predicted: Predictions, classes: int) -> dict[str, Any]:
    """Accuracy and loss over the images of all processes.

    predicted: of this process's images.
    classes: number K of classes.

    Returns ``top1`` and ``top5`` in percent, ``test_loss``, the mean cross-entropy in nats, and ``class_accuracy``, the top-1
    accuracy in percent of the images of each class.
    """
    hits = predicted.top == predicted.labels[:, None]
    values = torch.ones_like(predicted.loss), hits[:, 0], hits.any(dim=1), predicted.loss
    sums_4K = torch.stack([torch.bincount(predicted.labels, v.double(), minlength=classes).double() for v in values])
    images_K, top1_K, top5_K, loss_K = all_reduce_sum(sums_4K)
    images = images_K.sum().item()
    return {
        "top1": 100 * (top1_K.sum().item() / images),
        "top5": 100 * (top5_K.sum().item() / images),
        "test_loss": loss_K.sum().item() / images,
        "class_accuracy": (100 * (top1_K / images_K)).tolist(),
    }


def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: torch.autocast,
    classes: int,
    mirror: bool = False,
) -> dict[str, Any]:
    """The :func:`scores` of a model.

    model: the model, which is set to eval mode.
    batches: batches of images (B, C, Y, X) and labels (B,); each process evaluates its share of every batch.
    autocast, mirror: as in :func:`evaluated_logits`.
    classes: number K of classes.
    """

    def shards() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in batches:
            if len(shard(labels)):
                yield shard(images), shard(labels)

    return scores(predictions(model, shards(), autocast, mirror), classes)
