"""Which parameters weight decay is for."""

from typing import Any

from torch import nn

from vix.layers.posenc import PositionEncoding, RelativeBias


def param_groups_weight_decay(model: nn.Module) -> list[dict[str, Any]]:
    """An optimizer's two groups: matrices and convolutions, which decay, and all else, which does not.

    Decay keeps the sizes of linear maps in check. Gains and offsets of norms, biases and class tokens (vectors), and tables of
    positions, are no such maps: to pull them to 0 only biases the model.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, PositionEncoding | RelativeBias) for p in m.parameters()}
    learned = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in learned if p.ndim > 1 and id(p) not in tables]
    others = [p for p in learned if p.ndim <= 1 or id(p) in tables]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
