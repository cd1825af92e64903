"""Composition root: builds the model, optimizer, data and trainer from a composed config."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from vix.config import check_value, to_plain, validated_partial
from vix.data.augment import Augmentation
from vix.data.dataset import ImageData
from vix.errors import ConfigError, DataError, UserError, first_paragraph, nearest, permission_errors
from vix.layers.heads import head_width
from vix.layers.posenc import PositionEncoding
from vix.layers.tokens import TokenGrid
from vix.reporting.logger import RunLogger
from vix.runs.checkpoint import read_checkpoint
from vix.runs.identity import is_off
from vix.system.files import user_path
from vix.system.memory import out_of_memory
from vix.training.param_groups import param_groups_weight_decay
from vix.training.trainer import Trainer
from vix.types import Seed

# For each group: the base class of its classes, and the constructor arguments that the program supplies, not the config.
GROUPS: dict[str, tuple[type, set[str]]] = {
    "model": (nn.Module, {"image_size", "channels", "classes", "embedding", "posenc", "attention"}),
    "attention": (nn.Module, {"dim", "tokens", "rotary", "position_bias", "layer"}),
    "embedding": (nn.Module, {"image_size", "channels", "dim"}),
    "posenc": (nn.Module, {"dim", "tokens"}),
    "optimizer": (torch.optim.Optimizer, {"params"}),
    "data": (ImageData, set()),
    "augment": (Augmentation, set()),
    "trainer": (Trainer, set()),
    "logger": (RunLogger, {"logged"}),
}
SETTINGS: dict[str, Any] = {"seed": Seed, "rerun": bool, "fail_fast": bool}  # the keys outside the groups
# Options of a group that the program reads itself, in addition to those of the constructor.
OWN_OPTIONS: dict[str, dict[str, Any]] = {"optimizer": {"no_decay_on_norm_and_bias": bool}}
OVERLAYS = ("recipe", "experiment")  # groups whose files only set keys of the groups above
CONSTRUCTOR_ERRORS = (ValueError, TypeError, RuntimeError)


@dataclass(frozen=True)
class Experiment:
    """A validated config: every part of one run, ready to be constructed.

    seed: seeds the initialization, the order of the images and the augmentation.
    rerun: start over where the run's directory holds a finished or an interrupted run.
    fail_fast: skip the remaining jobs of a sweep after one fails.
    parts: for each group, its class with the options of the config as keyword arguments.
    own_options: for each group, the options that the program reads itself.

    Constructing a part raises ConfigError, one line that names the key, where parts are incompatible.
    """

    seed: int
    rerun: bool
    fail_fast: bool
    parts: Mapping[str, functools.partial[Any]]
    own_options: Mapping[str, Mapping[str, Any]]

    def part(self, group: str) -> functools.partial[Any]:
        """One group's class with its options. Raises ConfigError where the config lacks the group."""
        if group not in self.parts:
            raise ConfigError(f"{group}: no option of this group is chosen; add {group}=NAME with a file of conf/{group}/")
        return self.parts[group]

    @property
    def defaults(self) -> dict[str, Any]:
        """The options that the config leaves out, with the defaults of their classes: ``GROUP.OPTION`` → value, if not off."""
        return {
            f"{group}.{name}": list(default) if isinstance(default, tuple) else default
            for group, make in self.parts.items()
            for name, parameter in inspect.signature(make.func).parameters.items()
            if name not in make.keywords and name not in GROUPS[group][1]
            if isinstance(default := parameter.default, bool | int | float | str | list | tuple) and not is_off(default)
        }

    @functools.cached_property
    def data(self) -> ImageData:
        """The image set. Constructing it reads no images; the files of an image folder are listed."""
        return construct("data", self.part("data"))

    @functools.cached_property
    def augmentation(self) -> Augmentation:
        """The augmentation of the training images."""
        augmentation: Augmentation = construct("augment", self.part("augment"))
        augmentation.check(self.data.image_size)
        return augmentation

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The trainer. Constructing it selects its device as the current one."""
        return construct("trainer", self.part("trainer"))

    @functools.cached_property
    def logger(self) -> functools.partial[RunLogger]:
        """The logger's class with its options. Raises ConfigError where its package is not installed."""
        make = self.part("logger")
        make.func.check_package()  # type: ignore[attr-defined]
        return make

    def build_model(self) -> nn.Module:
        """A new model: (B, C, Y, X) images in [−1, 1] → (B, K) logits. Works under ``torch.device("meta")`` too."""
        return construct(
            "model",
            self.part("model"),
            image_size=self.data.image_size,
            channels=self.data.channels,
            classes=self.data.classes,
            embedding=functools.partial(construct, "embedding", self.part("embedding")),
            posenc=functools.partial(construct, "posenc", self.part("posenc")),
            attention=mixer_builder(self.part("attention")),
        )

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new optimizer of the model's parameters.

        Raises ConfigError where ``no_decay_on_norm_and_bias`` is set for an optimizer without weight decay.
        """
        make, no_decay = self.part("optimizer"), self.own_options["optimizer"].get("no_decay_on_norm_and_bias")
        if no_decay and "weight_decay" not in inspect.signature(make.func).parameters:
            raise ConfigError(f"optimizer.no_decay_on_norm_and_bias=true: {make.func.__name__} has no weight decay; use false")
        if hasattr(make.func, "param_groups_of"):
            params = make.func.param_groups_of(model, bool(no_decay))
        else:
            params = param_groups_weight_decay(model) if no_decay else model.parameters()
        return construct("optimizer", make, params=params)

    def check_optimizer_step(self) -> None:
        """Try a step of an optimizer of PyTorch or of this program on the trainer's device, with one small matrix.

        Not of others, which may need parameters of other shapes, and not of those whose groups depend on the model.

        Raises ConfigError where an option, or the optimizer itself, does not work there: their constructors accept it.
        """
        make = self.part("optimizer")
        if hasattr(make.func, "param_groups_of") or not make.func.__module__.startswith(("torch.optim.", "vix.")):
            return
        parameter = nn.Parameter(torch.zeros(2, 2, device=self.trainer.torch_device))
        parameter.grad = torch.eye(2, device=parameter.device)  # some optimizers invert a matrix of gradients
        optimizer = construct("optimizer", make, params=[parameter])
        try:
            optimizer.step()
        except (AssertionError, RuntimeError, TypeError) as error:
            if out_of_memory(error):
                raise
            raise ConfigError(f"optimizer: {make.func.__name__} cannot train here ({first_paragraph(error)})") from error


def parse(cfg: DictConfig) -> Experiment:
    """Validate every key of a composed config: its name, and the type and range of its value. Reads no data.

    Raises ConfigError, one line that names the key.
    """
    for key in map(str, cfg):
        if key not in (*GROUPS, *SETTINGS, "hydra"):
            raise ConfigError(f"{key}: unknown key; {nearest(key, [*GROUPS, *SETTINGS])}")
    settings = {}
    for key, annotation in SETTINGS.items():
        settings[key] = to_plain(cfg, key)
        if key in cfg:
            check_value(key, settings[key], annotation)
    own_options = {}
    for group, options in OWN_OPTIONS.items():
        values = to_plain(cfg, group)
        own_options[group] = {key: values.get(key) for key in options} if isinstance(values, dict) else {}
    return Experiment(
        seed=settings["seed"] or 0,
        rerun=bool(settings["rerun"]),
        fail_fast=bool(settings["fail_fast"]),
        parts={group: parse_group(cfg, group) for group in GROUPS if group in cfg},
        own_options=own_options,
    )


def parse_group(cfg: DictConfig, group: str) -> functools.partial[Any]:
    """One group's class with its validated options. Raises ConfigError where an option is unknown or invalid."""
    kind, supplied = GROUPS[group]
    return validated_partial(group, to_plain(cfg, group), kind, supplied, OWN_OPTIONS.get(group, {}))


def build_model(cfg: DictConfig) -> nn.Module:
    """The model that a composed config describes: (B, C, Y, X) images in [−1, 1] → (B, K) logits.

    cfg: from :func:`vix.composition.compose.compose`, with the groups of ``conf/`` as keys.

    Works under ``torch.device("meta")`` too, which allocates no memory. Reads no data.

    Raises ConfigError, one line that names the key, where a key is unknown, a value has the wrong type or range, or parts are
    incompatible.
    """
    return parse(cfg).build_model()


def mixer_builder(attention: functools.partial[nn.Module]) -> Callable[..., nn.Module]:
    """The function with which model families construct their token mixers.

    attention: the class and options of ``cfg.attention``.

    The function raises ConfigError where the mixer does not support the position encoding or the family's head count.
    """
    takes = inspect.signature(attention.func).parameters
    name = attention.func.__name__

    def mixer(
        *,
        dim: int,
        tokens: TokenGrid,
        posenc: PositionEncoding,
        layer: int,
        heads: int | None = None,
        inner: int | None = None,
    ) -> nn.Module:
        """One mixer: (B, N, dim) → (B, N, dim).

        posenc: the model's position encoding; the mixer must accept all of its ``attention_kwargs``.
        layer: index of the block in the model, from 0.
        heads: number of heads in this stage; None uses ``attention.heads``.
        inner: width of all heads together where ``attention.dim_head`` is null; None uses ``dim``.
        """
        if tokens.prefix and getattr(attention.func, "map_only", False):
            raise ConfigError(
                f"attention: {name} passes nothing to a class token, which would never see the image; use model.pool=mean"
            )
        supplied: dict[str, Any] = {"layer": layer} if "layer" in takes else {}
        for parameter, offer in posenc.attention_kwargs(tokens).items():
            if parameter not in takes:
                raise ConfigError(
                    f"posenc: {posenc.requirement}, which {name} does not support; use posenc=learned or posenc=none"
                )
            supplied[parameter] = offer
        if heads is not None:
            if "heads" not in takes:
                raise ConfigError(f"model.heads={heads}: {name} has no heads; use model.heads=null")
            supplied["heads"] = heads
        options = {key: p.default for key, p in takes.items()} | attention.keywords | supplied
        try:
            if inner is not None and "heads" in takes and options.get("dim_head", inner) is None:
                supplied["dim_head"] = construct("attention", head_width, dim=inner, heads=options["heads"], dim_head=None)
            return construct("attention", attention, dim=dim, tokens=tokens, **supplied)
        except ConfigError as error:
            if heads is None:
                raise
            raise ConfigError(str(error).replace("attention.heads=", "model.heads=", 1)) from error

    return mixer


def construct(group: str, make: Callable[..., Any], **supplied: Any) -> Any:
    """``make(**supplied)``. Raises ConfigError, which names the group, where the constructor rejects its arguments."""
    try:
        return make(**supplied)
    except ConfigError:
        raise
    except CONSTRUCTOR_ERRORS as error:
        reason = " ".join(str(error).split())
        if "=" in reason.split(" ")[0]:
            raise ConfigError(f"{group}.{reason}") from error
        # PyTorch's messages contain the value but not the option's name.
        options = getattr(make, "keywords", {}).items()
        named = next((f".{key}={value}" for key, value in options if reason.endswith(f": {value}")), "")
        raise ConfigError(f"{group}{named}: {reason}") from error


def load_model(directory: str | Path, weights: Literal["last", "best"] = "last") -> nn.Module:
    """The trained model of a run, in eval mode, on the CPU: (B, C, Y, X) images in [−1, 1] → (B, K) logits.

    directory: of the run, such as ``outputs/vin/seed=0``.
    weights: those of the last epoch, or of the epoch with the best accuracy.

    Raises DataError where the directory holds no checkpoint or no best weights, and UserError where the checkpoint is damaged.
    """
    return load_run(directory, weights).model


def for_inference(cfg: DictConfig, device: str) -> DictConfig:
    """A config without the trainer's options that another machine may refuse; ``device`` is the new ``trainer.device``."""
    return OmegaConf.merge(cfg, {"trainer": {"device": device, "compile": False, "memory_limit_gb": None}})  # type: ignore[return-value]


class LoadedRun(NamedTuple):
    """What a run's checkpoint holds: the validated config, the model in eval mode on the CPU, and everything else."""

    experiment: Experiment
    model: nn.Module
    checkpoint: Mapping[str, Any]

    @property
    def results(self) -> Mapping[str, Any]:
        """The results so far."""
        results: Mapping[str, Any] = self.checkpoint["results"]
        return results

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(self.results.get("class_names") or self.experiment.data.class_names)


@permission_errors()
def load_run(directory: str | Path, weights: Literal["last", "best"] = "last", device: str = "cpu") -> LoadedRun:
    """A run's model, as from :func:`load_model`, with its config and results.

    directory, weights: as for :func:`load_model`.
    device: ``trainer.device`` of the config. The model is on the CPU.
    """
    path = user_path(str(directory)) / "checkpoint.pt"
    if not path.is_file():
        if path.with_name("results.json").is_file():
            previous = path.with_name("checkpoint.previous.pt")
            older = f", or rename {previous} to it to load the older weights" if previous.is_file() else ""
            raise DataError(f"there is no {path}: the run's checkpoint is missing; train again with rerun=true{older}")
        raise DataError(f"there is no {path}: pass the directory of a run, such as outputs/vin/seed=0")
    checkpoint = read_checkpoint(path)
    state = checkpoint["model" if weights == "last" else "best_model"]
    if not state:
        raise DataError(f"{path} contains no best weights, because no epoch is finished; continue the run with its command")
    cfg = OmegaConf.create(checkpoint["config"])
    # The image folder may be absent on this machine.
    if "classes" in cfg.get("data", ()) and "head.weight" in checkpoint["model"]:
        cfg.data.classes = len(checkpoint["model"]["head.weight"])
    experiment = parse(for_inference(cfg, device))
    return LoadedRun(experiment, load_weights(experiment.build_model(), state, path).eval(), checkpoint)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The model with the weights of a file. Raises UserError, which names the file, where they are another model's."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{path} has the weights of another model than its config describes: if an older version of this program wrote it "
            "(git_commit in results.json), use that one, else restore the file"
        ) from error
    return model
