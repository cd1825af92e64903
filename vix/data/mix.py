"""Two images in one, and a label that is in part the one's and in part the other's."""

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor


class Mix:
    """Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019): the draws of one epoch, one for each batch.

    Each image is mixed with its neighbour in the batch, which in a shuffled epoch is a random one. Where both kinds are
    wanted, each batch is mixed by one of them, with probability ½.

    mixup, cutmix: parameter α of the Beta(α, α) that the first image's share is drawn from; None does without that kind.
    classes: number K of classes.
    batches: in the epoch.
    seed: of the draws, which are made on the host.
    """

    def __init__(self, mixup: float | None, cutmix: float | None, classes: int, batches: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        kinds = [(cut, alpha) for cut, alpha in ((False, mixup), (True, cutmix)) if alpha is not None]
        chosen = [kinds[i] for i in random.integers(len(kinds), size=batches)]
        self.draws = [(cut, random.beta(alpha, alpha), *random.random(2)) for cut, alpha in chosen]
        self.classes = classes

    def __call__(self, images_BCYX: Tensor, labels_B: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Batch ``number`` of the epoch, images in [−1, 1] → mixed images and the classes' shares (B, K)."""
        cut, share, *middle = self.draws[number]
        others = images_BCYX.roll(1, 0)
        if cut:
            rows, columns = (window(size, share, at) for size, at in zip(images_BCYX.shape[2:], middle, strict=True))
            images_BCYX = images_BCYX.clone()
            images_BCYX[:, :, rows, columns] = others[:, :, rows, columns]
            area = (rows.stop - rows.start) * (columns.stop - columns.start)
            share = 1 - area / math.prod(images_BCYX.shape[2:])
        else:
            images_BCYX = others.lerp(images_BCYX, share)
        labels_BK = F.one_hot(labels_B, self.classes).float()
        return images_BCYX, labels_BK.roll(1, 0).lerp(labels_BK, share)


def window(size: int, share: float, middle: float) -> slice:
    """Along one side, the part of the rectangle that leaves ``share`` of the area; cut off where it reaches beyond."""
    length = size * math.sqrt(1 - share)
    start = middle * size - length / 2
    return slice(max(0, round(start)), min(size, round(start + length)))
