"""What experiments and recipes set for a group belongs to the option that they chose there."""

import copy
import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hydra.core.default_element import GroupDefault, ResultDefault
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from vix.build import GROUPS, OWN_OPTIONS
from vix.composition.yaml_files import free_files, is_group_file, parents_of
from vix.config import import_target
from vix.errors import ConfigError


class OverlayOptions:
    """The files of a defaults list by what they set for the program's groups.

    chosen: the option of each group, and of each overlay group, that the composed config has.
    base: the option that the primary config has for each group.
    meant: for each overlay's file the options of the groups that it is written for.
    origin: for each key of a group the file that set it last.
    """

    def __init__(self, defaults: Sequence[ResultDefault], repo: Any) -> None:
        self.repo = repo
        self.parents = parents_of(defaults)
        primary = {default.config_path for default in defaults if default.primary}
        self.chosen: dict[str, list[str]] = {}
        for path in dict.fromkeys(str(default.config_path) for default in defaults):
            group, _, option = path.partition("/")
            if is_group_file(path) and not any(parent.startswith(f"{group}/") for parent in self.parents[path]):
                self.chosen.setdefault(group, []).append(option)
        self.base: dict[str, Any] = {}
        for override in (False, True):
            for path in free_files(self.parents, primary):
                self.base |= self.choices_of(path, override)
        self.meant: dict[str, dict[str, Any]] = {}
        for path in self.parents:
            if is_group_file(path) and path.partition("/")[0] not in GROUPS:
                self.meant[path] = self.choices_meant(path)
        self.origin: dict[str, dict[str, str]] = {group: {} for group in GROUPS}
        self.first_target: dict[str, Any] = {}
        self.left_out: list[str] = []

    def choices_of(self, path: str, override: bool) -> dict[str, Any]:
        """The options that a file's own defaults list names for the program's groups."""
        loaded = self.repo.load_config(config_path=path)
        defaults = (loaded.defaults_list or []) if loaded else []
        named = {
            str(d.group).strip("/"): d.value for d in defaults if isinstance(d, GroupDefault) and bool(d.override) == override
        }
        return {group: option for group, option in named.items() if group in GROUPS}

    def choices_meant(self, path: str) -> dict[str, Any]:
        """The options that an overlay's file names, or else the files that it includes."""
        meant: dict[str, Any] = {}
        for child, parents in self.parents.items():
            if path in parents and child != path and is_group_file(child):
                meant |= self.choices_meant(child)
        return meant | self.choices_of(path, override=True)

    def drop_foreign_options(self, default: ResultDefault, loaded: ConfigResult) -> ConfigResult:
        """A loaded file without its options for groups in which another option than the file's was chosen."""
        path = str(default.config_path)
        if not isinstance(loaded.config, DictConfig):
            return loaded
        foreign: list[str] = []
        for group in GROUPS:
            options = loaded.config._get_node(group)
            if not isinstance(options, DictConfig) or options._is_none() or options._is_interpolation():
                continue
            meant = self.meant.get(path, {}).get(group)
            if path in self.meant and meant is None and "_target_" in options:
                meant = self.base.get(group)  # a class is an option, too
            if meant is not None and [meant] != self.chosen.get(group):
                foreign.append(group)
                shown = ", ".join(f"{key}={value}" for key, value in plain_items(options))
                self.left_out.append(
                    f"{group}={option_name(self.chosen.get(group))}: left out what {path} sets for {group}={meant}: {shown}"
                )
                continue
            for key in options:
                self.origin[group][str(key)] = path
            if path.partition("/")[0] == group and "_target_" in options:
                self.first_target[group] = unresolved(options, "_target_")
        if not foreign:
            return loaded
        loaded = copy.copy(loaded)
        loaded.config = copy.deepcopy(loaded.config)
        with open_dict(loaded.config):
            for group in foreign:
                del loaded.config[group]
        return loaded

    def record_choices(self, cfg: DictConfig) -> None:
        """Hydra keeps no choice for a list of options, such as ``experiment=[a,b]``: it becomes ``a+b``."""
        for group, options in self.chosen.items():
            if len(options) > 1 and not cfg.hydra.runtime.choices.get(group):
                cfg.hydra.runtime.choices[group] = option_name(options)

    def drop_unaccepted(self, cfg: DictConfig, overrides: Iterable[Override]) -> None:
        """Drop options that were written for another class than the group's, and that this one lacks.

        Those that the command line sets stay, and are refused later.
        """
        typed = set(typed_keys(overrides))
        for group, origins in self.origin.items():
            options = cfg._get_node(group)
            if not isinstance(options, DictConfig) or options._is_none() or options._is_interpolation():
                continue
            target = options.get("_target_") if not OmegaConf.is_interpolation(options, "_target_") else None
            replaced = target != self.first_target.get(group)
            lacks = functools.partial(lacks_option, group, target)
            dropped: dict[str, list[str]] = {}
            for key, path in origins.items():
                written_for_another = (replaced and origins.get("_target_") != path) or (
                    (replaced and f"{group}._target_" in typed)
                    or (path in self.meant and group not in self.meant[path] and self.differs(group))
                )
                if written_for_another and key in options and f"{group}.{key}" not in typed and lacks(key):
                    dropped.setdefault(path, []).append(f"{key}={options._get_node(key)}")
                    del options[key]
            for path, keys in dropped.items():
                name = str(target).rpartition(".")[2]
                self.left_out.append(f"{group}: left out what {path} sets and {name} lacks: {', '.join(keys)}")
        with open_dict(cfg.hydra.runtime):
            cfg.hydra.runtime.left_out = list(self.left_out)

    def differs(self, group: str) -> bool:
        return [self.base.get(group)] != self.chosen.get(group)


def lacks_option(group: str, target: Any, key: str) -> bool:
    """Whether a class has no option of that name; False where the class cannot be told, which is refused elsewhere."""
    if key == "_target_":
        return False
    try:
        parameters = inspect.signature(import_target(group, target, GROUPS[group][0])).parameters
    except ConfigError:
        return False
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return not takes_any and key not in parameters and key not in OWN_OPTIONS.get(group, {})


def typed_keys(overrides: Iterable[Override]) -> Iterator[str]:
    """``group.key`` for every option that the command line sets."""
    for override in overrides:
        value = None if override.is_sweep_override() else override.value()
        if isinstance(value, dict):
            yield from (f"{override.key_or_group}.{key}" for key in value)
        else:
            yield ".".join(override.key_or_group.split(".")[:2])


def plain_items(options: DictConfig) -> Iterator[tuple[str, Any]]:
    for key, value in OmegaConf.to_container(options, resolve=False).items():  # type: ignore[union-attr]
        yield str(key), value


def option_name(option: Any) -> str:
    """``[a, b]`` → ``a+b``"""
    return "+".join(map(str, option)) if isinstance(option, list | ListConfig) else str(option)


def unresolved(node: Any, key: Any) -> Any:
    """The value of a key with its interpolation as it is written."""
    child = node._get_node(key)
    return child if isinstance(child, DictConfig | ListConfig) else child._value() if child is not None else None
