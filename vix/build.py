"""From a composed config to a model, and from a run's directory to the model it trained."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vix.attention.heads import head_width
from vix.checks import ConfigError, DataError
from vix.config import check, part, plain
from vix.files import user_path
from vix.posenc import NoPosition
from vix.run import read_checkpoint
from vix.tokens import TokenGrid
from vix.weight_decay import matrices_only

REFUSALS = (ValueError, TypeError, RuntimeError)


def build_model(cfg: DictConfig) -> nn.Module:
    """The model that a composed config describes: (B, C, Y, X) images in [−1, 1] → (B, K) logits.

    Works under ``torch.device("meta")`` too, in no time and memory. Raises ConfigError, one line that names the key, where a
    key is unknown, a value has the wrong type or range, or parts do not go together. Reads no data.
    """
    check(cfg)
    data = build(cfg, "data")
    return build(
        cfg,
        "model",
        image_size=data.image_size,
        channels=data.channels,
        classes=data.classes,
        embedding=lambda **supplied: build(cfg, "embedding", **supplied),
        posenc=lambda **supplied: build(cfg, "posenc", **supplied),
        attention=mixer_builder(part(cfg, "attention")),
    )


def mixer_builder(attention: functools.partial[nn.Module]) -> Callable[..., nn.Module]:
    """What families build their mixers with: the class and options of ``cfg.attention``, checked against what they need."""
    takes = inspect.signature(attention.func).parameters
    name = attention.func.__name__

    def mixer(
        *, dim: int, tokens: TokenGrid, posenc: NoPosition, heads: int | None = None, inner: int | None = None
    ) -> nn.Module:
        """One mixer of (B, N, dim) tokens.

        posenc: the model's position encoding; the mixer must take all that it offers.
        heads: number of heads in this stage; None leaves it to ``attention.heads``.
        inner: width of all heads together where ``attention.dim_head`` leaves it open; None means ``dim``.
        """
        supplied: dict[str, Any] = {}
        for parameter, offer in posenc.offers(tokens).items():
            if parameter not in takes:
                raise ConfigError(f"posenc: {posenc.needs}, and {name} has none; use posenc=learned or posenc=none")
            supplied[parameter] = offer
        if heads is not None:
            if "heads" not in takes:
                raise ConfigError(f"model.heads={heads}: {name} has no heads; use model.heads=null")
            supplied["heads"] = heads
        options = {key: p.default for key, p in takes.items()} | attention.keywords | supplied
        try:
            if inner is not None and "heads" in takes and options.get("dim_head", inner) is None:
                supplied["dim_head"] = call("attention", head_width, dim=inner, heads=options["heads"], dim_head=None)
            return call("attention", attention, dim=dim, tokens=tokens, **supplied)
        except ConfigError as error:
            if heads is None:
                raise
            raise ConfigError(str(error).replace("attention.heads=", "model.heads=", 1)) from error

    return mixer


def optimizer_builder(cfg: DictConfig) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """What a model's optimizer is made with: the class and options of ``cfg.optimizer``, checked. Both raise ConfigError."""
    make = part(cfg, "optimizer")
    decay_only = plain(cfg, "optimizer").get("decay_only")
    if decay_only and "weight_decay" not in inspect.signature(make.func).parameters:
        raise ConfigError(f"optimizer.decay_only={decay_only}: {make.func.__name__} has no weight decay; use null")
    return lambda model: call("optimizer", make, params=matrices_only(model) if decay_only else model.parameters())


def build(cfg: DictConfig, group: str, **supplied: Any) -> Any:
    """Construct the part that ``cfg.<group>`` names, with its keys and what the program supplies."""
    return call(group, part(cfg, group), **supplied)


def call(group: str, make: Callable[..., Any], **supplied: Any) -> Any:
    """``make(**supplied)``, with what its constructor refuses turned into a ConfigError that names the group."""
    try:
        return make(**supplied)
    except ConfigError:
        raise
    except REFUSALS as error:
        reason = " ".join(str(error).split())
        if "=" in reason.split(" ")[0]:
            raise ConfigError(f"{group}.{reason}") from error
        # PyTorch's own classes say the value, not the option that held it.
        options = getattr(make, "keywords", {}).items()
        named = next((f".{key}={value}" for key, value in options if reason.endswith(f": {value}")), "")
        raise ConfigError(f"{group}{named}: {reason}") from error


def load_model(directory: str | Path, weights: Literal["last", "best"] = "last") -> nn.Module:
    """The model of a run, in eval mode, on the CPU: ``weights`` of the last epoch or of the best one.

    Raises DataError where the directory holds no checkpoint, and UserError where it is damaged.
    """
    path = user_path(str(directory)) / "checkpoint.pt"
    if not path.is_file():
        if path.with_name("results.json").is_file():
            previous = path.with_name("checkpoint.previous.pt")
            older = f", or rename {previous} to it for the weights saved before" if previous.is_file() else ""
            raise DataError(f"there is no {path}: the run's checkpoint is lost; train it again with rerun=true{older}")
        raise DataError(f"there is no {path}: name the directory of a run, such as outputs/vin/seed=0")
    checkpoint = read_checkpoint(path)
    cfg = OmegaConf.create(checkpoint["config"])
    if "classes" in cfg.data:  # an image folder, which need not be on this machine
        cfg.data.classes = len(checkpoint["model"]["head.weight"])
    model = build_model(cfg)
    model.load_state_dict(checkpoint["model" if weights == "last" else "best_model"])
    return model.eval()
