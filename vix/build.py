"""From a composed config to a model, and from a run's directory to the model it trained."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vix.checks import ConfigError, DataError
from vix.config import check, part

REFUSALS = (ValueError, TypeError, RuntimeError)


def build_model(cfg: DictConfig) -> nn.Module:
    """The model that a composed config describes: (B, C, Y, X) images in [−1, 1] → (B, K) logits.

    Works under ``torch.device("meta")`` too, in no time and memory. Raises ConfigError, one line that names the key, where a
    key is unknown, a value has the wrong type or range, or parts do not go together. Reads no data.
    """
    check(cfg)
    data = build(cfg, "data")
    attention = part(cfg, "attention")

    def mixer(*, rotary: Callable[[int], nn.Module] | None, **supplied: Any) -> nn.Module:
        if "rotary" in inspect.signature(attention.func).parameters:
            supplied["rotary"] = rotary
        elif rotary is not None:
            raise ConfigError(
                f"posenc: rotary positions turn queries and keys, and {attention.func.__name__} has none; "
                "use posenc=learned or posenc=none"
            )
        return call("attention", attention, **supplied)

    return build(
        cfg,
        "model",
        image_size=data.image_size,
        channels=data.channels,
        classes=data.classes,
        embedding=lambda **supplied: build(cfg, "embedding", **supplied),
        posenc=lambda **supplied: build(cfg, "posenc", **supplied),
        attention=mixer,
    )


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

    Raises DataError where the directory holds no checkpoint.
    """
    path = Path(directory) / "checkpoint.pt"
    if not path.is_file():
        raise DataError(f"there is no {path}: name the directory of a run, such as outputs/vin/seed=0")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = build_model(OmegaConf.create(checkpoint["config"]))
    model.load_state_dict(checkpoint["model" if weights == "last" else "best_model"])
    return model.eval()
