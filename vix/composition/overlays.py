"""Overlays: experiments and recipes, whose options for a group apply only to the option that they choose in this group.

For example, ``experiment=quickstart attention=performer`` drops the landmarks that the experiment sets for Nyström attention.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hydra.core.default_element import GroupDefault, ResultDefault
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from vix.build import GROUPS, OWN_OPTIONS, SETTINGS
from vix.composition.yaml_files import free_files, is_group_file, parents_of
from vix.config import annotations, check_value, import_target, to_plain
from vix.errors import ConfigError


class OverlayOptions:
    """Tracks which file of a defaults list sets which options of the program's groups.

    chosen: the options chosen in each group, and in each overlay group.
    base: the option that the primary config chooses in each group.
    intended: for each overlay file, the option of each group to which its keys apply.
    origin: for each group, key → the last file that set it.
    settings: key outside of the groups → the last file that set it.
    own: for each group, the options that the group's own file sets.
    first_target: for each group, the ``_target_`` of the group's own file.
    left_out: messages about dropped keys.
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
        self.intended: dict[str, dict[str, Any]] = {}
        for path in self.parents:
            if is_group_file(path) and path.partition("/")[0] not in GROUPS:
                self.intended[path] = self.intended_choices(path)
        self.origin: dict[str, dict[str, str]] = {group: {} for group in GROUPS}
        self.settings: dict[str, str] = {}
        self.own: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        self.first_target: dict[str, Any] = {}
        self.left_out: list[str] = []

    def choices_of(self, path: str, override: bool) -> dict[str, Any]:
        """The options that a file's own defaults list chooses in the program's groups.

        override: whether to return the entries with ``override``, or those without.
        """
        loaded = self.repo.load_config(config_path=path)
        defaults = (loaded.defaults_list or []) if loaded else []
        named = {
            str(d.group).strip("/"): d.value for d in defaults if isinstance(d, GroupDefault) and bool(d.override) == override
        }
        return {group: option for group, option in named.items() if group in GROUPS}

    def intended_choices(self, path: str) -> dict[str, Any]:
        """The options that an overlay file chooses, or else the files that it includes."""
        intended: dict[str, Any] = {}
        for child, parents in self.parents.items():
            if path in parents and child != path and is_group_file(child):
                intended |= self.intended_choices(child)
        return intended | self.choices_of(path, override=True)

    def drop_foreign_options(self, default: ResultDefault, loaded: ConfigResult) -> ConfigResult:
        """Drop a file's keys for groups in which another option than the file's was chosen.

        default, loaded: entry of the defaults list, and its contents, which are not modified.
        """
        path = str(default.config_path)
        if not isinstance(loaded.config, DictConfig):
            return loaded
        foreign: list[str] = []
        self.settings |= {key: path for key in SETTINGS if loaded.config._get_node(key) is not None}
        for group in GROUPS:
            options = loaded.config._get_node(group)
            if not isinstance(options, DictConfig) or options._is_none() or options._is_interpolation():
                continue
            intended = self.intended.get(path, {}).get(group)
            if path in self.intended and intended is None and "_target_" in options:
                intended = self.base.get(group)  # setting a class counts as choosing an option
            if intended is not None and [intended] != self.chosen.get(group):
                foreign.append(group)
                if any(group in self.choices_of(parent, override=True) for parent in self.parents[path]):
                    continue  # the file that includes this one chooses another option itself
                shown = ", ".join(f"{key}={value}" for key, value in plain_items(options))
                self.left_out.append(
                    f"{group}={option_name(self.chosen.get(group))}: "
                    f"ignoring the options of {path} for {group}={intended}: {shown}"
                )
                continue
            self.record_options(group, path, options)
        if not foreign:
            return loaded
        loaded = copy.copy(loaded)
        loaded.config = copy.deepcopy(loaded.config)
        with open_dict(loaded.config):
            for group in foreign:
                del loaded.config[group]
        return loaded

    def record_options(self, group: str, path: str, options: DictConfig) -> None:
        """Record that a file sets these options of a group."""
        self.origin[group] |= {str(key): path for key in options}
        if path.partition("/")[0] == group:
            self.own[group] |= dict(plain_items(options))
            if "_target_" in options:
                self.first_target[group] = unresolved(options, "_target_")

    def record_choices(self, cfg: DictConfig) -> None:
        """Record ``experiment=[a,b]`` as the choice ``a+b``; Hydra records no choice for a list of options, even of one."""
        for group, options in self.chosen.items():
            if not cfg.hydra.runtime.choices.get(group):
                cfg.hydra.runtime.choices[group] = option_name(options)

    def drop_unaccepted(self, cfg: DictConfig, overrides: Iterable[Override]) -> None:
        """Drop options that were set for another class than the group's, and that its class does not accept.

        overrides: of the command line; the options that they set are kept, so that validation rejects them.
        """
        typed = set(typed_keys(overrides))
        for group, origins in self.origin.items():
            options = cfg._get_node(group)
            if not isinstance(options, DictConfig) or options._is_none() or options._is_interpolation():
                continue
            target = options.get("_target_") if not OmegaConf.is_interpolation(options, "_target_") else None
            replaced = target != self.first_target.get(group)
            dropped: dict[str, list[str]] = {}
            for key, path in origins.items():
                written_for_another = (replaced and origins.get("_target_") != path) or (
                    (replaced and f"{group}._target_" in typed)
                    or (path in self.intended and group not in self.intended[path] and self.differs(group))
                )
                if (
                    written_for_another
                    and key in options
                    and f"{group}.{key}" not in typed
                    and not accepts(group, target, options, key)
                ):
                    dropped.setdefault(path, []).append(f"{key}={options._get_node(key)}")
                    del options[key]
                    if origins[key].partition("/")[0] != group and key in self.own[group]:
                        options[key] = self.own[group][key]
            for path, keys in dropped.items():
                name = str(target).rpartition(".")[2]
                self.left_out.append(f"{group}: ignoring options of {path} that {name} does not accept: {', '.join(keys)}")
        with open_dict(cfg.hydra.runtime):
            cfg.hydra.runtime.left_out = list(self.left_out)

    def differs(self, group: str) -> bool:
        """Whether another option than the primary config's is chosen."""
        return [self.base.get(group)] != self.chosen.get(group)


def accepts(group: str, target: Any, options: DictConfig, key: str) -> bool:
    """Whether a class accepts an option and its value, such as ``depth: 2`` or ``depth: [2, 4]``; True where that is unknown:
    validation reports a class that cannot be imported, and a value with an interpolation."""
    if key == "_target_":
        return True
    try:
        made = import_target(group, target, GROUPS[group][0])
    except ConfigError:
        return True
    parameters = inspect.signature(made).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_any and key not in parameters and key not in OWN_OPTIONS.get(group, {}):
        return False
    try:
        check_value(key, to_plain(options, key), annotations(made).get(key, Any))
    except ConfigError:
        return OmegaConf.is_interpolation(options, key) or OmegaConf.is_missing(options, key)
    return True


def typed_keys(overrides: Iterable[Override]) -> Iterator[str]:
    """``group.key`` for every option that the command line sets."""
    for override in overrides:
        value = None if override.is_sweep_override() else override.value()
        keys = [f"{override.key_or_group}.{key}" for key in value] if isinstance(value, dict) else [override.key_or_group]
        yield from (".".join(key.split(".")[:2]) for key in keys)


def plain_items(options: DictConfig) -> Iterator[tuple[str, Any]]:
    """Keys and values of a group, as plain containers with interpolations unresolved."""
    for key, value in OmegaConf.to_container(options, resolve=False).items():  # type: ignore[union-attr]
        yield str(key), value


def option_name(option: Any) -> str:
    """The name of a choice: ``[a, b]`` → ``a+b``."""
    return "+".join(map(str, option)) if isinstance(option, list | ListConfig) else str(option)


def unresolved(node: Any, key: Any) -> Any:
    """The value of a key, without resolving interpolations."""
    child = node._get_node(key)
    return child if isinstance(child, DictConfig | ListConfig) else child._value() if child is not None else None
