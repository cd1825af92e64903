"""Parameter groups for weight decay."""

from typing import Any

from torch import nn

from vix.layers.posenc import PositionEncoding, RelativeBias


def param_groups_weight_decay(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: weights of linear layers and convolutions, and the rest without weight decay.

    Excluded from weight decay are vectors (gains and offsets of norms, biases, class tokens), tables of position encodings, and
    the parameters that a module names in its attribute (or, like timm's, method) ``no_weight_decay``, such as temperatures and
    learned tokens, as is common practice for transformers.

    model: the model; parameters without a gradient are omitted.
    """
    excluded = {id(p) for m in model.modules() if isinstance(m, PositionEncoding | RelativeBias) for p in m.parameters()}
    for module in model.modules():
        named = getattr(module, "no_weight_decay", ())
        named = named() if callable(named) else named  # timm's is a method
        excluded |= {id(p) for name, p in module.named_parameters() if name in named}
    learned = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in learned if p.ndim > 1 and id(p) not in excluded]
    others = [p for p in learned if p.ndim <= 1 or id(p) in excluded]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
