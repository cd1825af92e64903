"""From a command line's words to a config: one way for ``train.py``, its sweeps and workers, ``vix.plan`` and ``vix.summary``.

Importing this module puts :class:`Loader` in the place of Hydra's own, so that every config that Hydra composes is checked file
by file (:mod:`vix.config_files`), and an experiment's options for an attention stay with that attention.
"""

import argparse
import copy
import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra._internal.hydra
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import compute_search_path_dir, create_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.default_element import GroupDefault, ResultDefault
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override, open_dict
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from vix.checks import ConfigError, UserError
from vix.command_line import explain, run_name
from vix.config import GROUPS, OWN_OPTIONS, SETTINGS, resolve
from vix.config_files import Repository, check_permissions, free_files, is_group_file, parents_of
from vix.files import expand_home
from vix.overrides import parse, parse_or_none, quote

CONFIG_DIR = Path(__file__).parents[1].resolve() / "conf"
CONFIG_NAME = "config"
VERSION_BASE = "1.3"
# Parts of Hydra's own config that hold paths of a user's.
HYDRA_PATHS = ("run", "sweep", "launcher", "sweeper")


class Flags(NamedTuple):
    """Hydra's options that say which files a config comes from."""

    config_dir: str | None = None
    config_path: str | None = None
    config_name: str | None = None


class Loader(ConfigLoaderImpl):
    """Hydra's loader with four more rules.

    - A file of a group may set only the program's options (:mod:`vix.config_files`).
    - What an experiment or a recipe sets for a group belongs to the option that it chose there. Where another one is chosen in
      the end, it is left out, and ``hydra.runtime.left_out`` says so.
    - A leading ``~`` in a value is the home directory.
    - A job of a sweep whose config cannot be composed becomes one that is refused, and the other jobs run.
    """

    layers: "Layers"

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.repository = Repository(config_search_path)
        self.overrides: list[Override] = []

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        assert isinstance(self.repository, Repository)
        self.repository.primary = config_name
        overrides = list(map(quote_home, overrides))
        self.overrides = OverridesParser.create().parse_overrides(overrides)
        try:
            cfg = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        except (HydraException, UserError):
            common = self.common_to_all_jobs() if run_mode == RunMode.MULTIRUN else overrides
            if common == overrides:
                raise
            # An option that some of the sweep's choices have and others lack: each job is composed by itself.
            self.overrides = OverridesParser.create().parse_overrides(common)
            cfg = super().load_configuration(config_name, common, run_mode, from_shell, validate_sweep_overrides)
            cfg.hydra.overrides.task = [o for o in overrides if not parse(o).is_hydra_override()]
        with flag_override(cfg, ["struct", "readonly"], [False, False]):
            self.layers.record_choices(cfg)
            self.layers.leave_out_unaccepted(cfg, self.overrides)
            for node in (cfg, *(cfg.hydra[part] for part in HYDRA_PATHS)):
                expand_homes(node)
        return cfg

    def common_to_all_jobs(self) -> list[str]:
        """The overrides without values of options, where the sweep is over a group so that its jobs have different options."""
        if not any(o.is_sweep_override() and self.repository.group_exists(o.key_or_group) for o in self.overrides):
            return [str(o.input_line) for o in self.overrides]
        return [
            str(o.input_line)
            for o in self.overrides
            if o.is_hydra_override() or o.key_or_group in SETTINGS or self.repository.group_exists(o.key_or_group)
        ]

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        try:
            return super().load_sweep_config(master_config, sweep_overrides)
        except (HydraException, OmegaConfBaseException, UserError) as error:
            message = explain(error, sweep_overrides, flags_of(master_config.hydra))
            return self.refused_job(master_config, sweep_overrides, message)

    def refused_job(self, master: DictConfig, overrides: Sequence[str], message: str) -> DictConfig:
        """A config of the sweep's settings alone, which carries ``message`` to the job as ``hydra.runtime.refused``."""
        job = OmegaConf.masked_copy(master, [key for key in ("hydra", *SETTINGS) if key in master])
        job = copy.deepcopy(job)
        with flag_override(job, ["struct", "readonly"], [False, False]), open_dict(job.hydra.runtime):
            job.hydra.overrides.task = list(overrides)
            job.hydra.runtime.refused = message
            for override in overrides:
                parsed = parse_or_none(override)
                if parsed is None:
                    continue
                if parsed.key_or_group in SETTINGS:
                    job[parsed.key_or_group] = parsed.value()
                elif isinstance(parsed.value(), str | list) and self.repository.group_exists(parsed.key_or_group):
                    job.hydra.runtime.choices[parsed.key_or_group] = name_of(parsed.value())
        return job

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: Any) -> DictConfig:
        check_permissions(defaults, repo)
        self.layers = Layers(defaults, repo)
        return super()._compose_config_from_defaults_list(defaults, repo)

    def _load_single_config(self, default: ResultDefault, repo: Any) -> ConfigResult:
        return self.layers.without_foreign_options(default, super()._load_single_config(default, repo))


class Layers:
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

    def without_foreign_options(self, default: ResultDefault, loaded: ConfigResult) -> ConfigResult:
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
                    f"{group}={name_of(self.chosen.get(group))}: left out what {path} sets for {group}={meant}: {shown}"
                )
                continue
            for key in options:
                self.origin[group][str(key)] = path
            if path.partition("/")[0] == group and "_target_" in options:
                self.first_target[group] = raw(options, "_target_")
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
                cfg.hydra.runtime.choices[group] = name_of(options)

    def leave_out_unaccepted(self, cfg: DictConfig, overrides: Iterable[Override]) -> None:
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
        parameters = inspect.signature(resolve(group, target, GROUPS[group][0])).parameters
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


def name_of(option: Any) -> str:
    """``[a, b]`` → ``a+b``"""
    return "+".join(map(str, option)) if isinstance(option, list | ListConfig) else str(option)


def quote_home(override: str) -> str:
    """``data.root=~/x``, which Hydra's grammar refuses, with the home directory in its place; anything else unchanged."""
    key, equals, value = override.partition("=")
    if not equals or not value.startswith("~"):
        return override
    return f"{key}={quote(expand_home(value))}"


def raw(node: Any, key: Any) -> Any:
    """The value of a key with its interpolation as it is written."""
    child = node._get_node(key)
    return child if isinstance(child, DictConfig | ListConfig) else child._value() if child is not None else None


def expand_homes(node: Any) -> None:
    """Replace a leading ``~`` in every text below a node, but for what is Hydra's."""
    if not OmegaConf.is_config(node) or node._is_none() or node._is_interpolation() or node._is_missing():
        return
    for key in range(len(node)) if isinstance(node, ListConfig) else [key for key in node if key != "hydra"]:
        value = raw(node, key)
        if isinstance(value, str) and value.startswith("~"):
            node[key] = expand_home(value)
        expand_homes(value)


def environment(key: str, *default: Any) -> str | None:
    """``${oc.env:KEY,default}`` with a leading ``~`` as the home directory."""
    value = oc.env(key, *default)
    return expand_home(value) if isinstance(value, str) else value


# Composing


def compose(overrides: Sequence[str] = (), flags: Flags | None = None, mode: RunMode = RunMode.RUN) -> DictConfig:
    """The config that ``python train.py OVERRIDES`` runs, without Hydra's part. Raises what Hydra raises, and ConfigError."""
    cfg = compose_with_hydra(overrides, flags, mode)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def compose_with_hydra(overrides: Sequence[str] = (), flags: Flags | None = None, mode: RunMode = RunMode.RUN) -> DictConfig:
    """The same with Hydra's part; with ``RunMode.MULTIRUN`` what all jobs of a sweep share, without what is swept over."""
    flags = flags or Flags()
    single = mode == RunMode.RUN
    name = flags.config_name or CONFIG_NAME
    return loader(flags).load_configuration(name, list(overrides), mode, from_shell=True, validate_sweep_overrides=single)


class Command(NamedTuple):
    """A command line of ``train.py``; ``runs`` is False where it only shows something, such as ``--help`` and ``--cfg``."""

    flags: Flags
    overrides: list[str]
    multirun: bool
    runs: bool


def parse_command(arguments: Sequence[str]) -> Command:
    """The arguments of ``train.py``, by Hydra's own parser."""
    parsed = get_args_parser().parse_args(list(arguments))
    only_shows = parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion
    return Command(flags_from(parsed), parsed.overrides, parsed.multirun, not (only_shows or parsed.experimental_rerun))


def sweep_outputs(command: Command) -> Path | None:
    """Below which directory a command's sweep has its runs, as far as that is known; None where it starts no sweep.

    Raises what :func:`compose` raises.
    """
    if not command.runs:
        return None
    cfg = compose_with_hydra(command.overrides, command.flags, RunMode.MULTIRUN)
    return sweep_directory(cfg) if command.multirun or cfg.hydra.mode == RunMode.MULTIRUN else None


def sweep_directory(cfg: DictConfig) -> Path:
    """``hydra.sweep.dir`` of a config that all jobs share; outputs/ where only a job's own config gives it a value."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)
    try:
        return Path(str(cfg.hydra.sweep.dir))
    except OmegaConfBaseException:
        return Path("outputs")
    finally:
        HydraConfig.instance().cfg = before


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of ``train.py`` with a leading ``~`` in a flag's or an override's value replaced by the home directory."""
    expanded = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        expanded.append(f"{flag}={expand_home(value)}" if flag.startswith("-") and equals else quote_home(argument))
    return expanded


def loader(flags: Flags) -> Loader:
    """A loader that looks where Hydra looks for these flags. Raises UserError where the directory is absent."""
    main = compute_search_path_dir(str(CONFIG_DIR.parent / "train.py"), None, expand_home(flags.config_path or str(CONFIG_DIR)))
    search_path = create_config_search_path(main)
    if flags.config_dir:
        extra = Path(expand_home(flags.config_dir)).absolute()
        if not extra.is_dir():
            raise UserError(f"--config-dir {flags.config_dir}: there is no such directory")
        search_path.prepend(provider="command-line", path=f"file://{extra}", anchor=SearchPathQuery(provider="schema"))
    return Loader(search_path)


def refusal(hydra_config: Any) -> str | None:
    """Why the config of a sweep's job could not be composed, or None."""
    return OmegaConf.select(hydra_config, "runtime.refused")


def left_out(hydra_config: Any) -> list[str]:
    """What a composed config does not have of its experiment and recipe, one sentence for each file and group."""
    return list(OmegaConf.select(hydra_config, "runtime.left_out") or ())


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add Hydra's options that say which files a config comes from."""
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a directory with files of your own, next to conf/")
    parser.add_argument("--config-path", "-cp", metavar="DIR", help="a directory in the place of conf/")
    parser.add_argument("--config-name", "-cn", metavar="NAME", help="another primary config than config")


def flags_from(parsed: argparse.Namespace) -> Flags:
    return Flags(parsed.config_dir, parsed.config_path, parsed.config_name)


def flags_of(hydra_config: Any) -> Flags:
    """The flags with which a config was composed, read from its Hydra part, also in a launcher's process."""
    sources = {str(source.provider): source for source in hydra_config.runtime.config_sources}
    main, extra, name = sources.get("main"), sources.get("command-line"), hydra_config.job.config_name
    path = None
    if main is not None and main.path != str(CONFIG_DIR):
        path = f"{main.schema}://{main.path}" if main.schema != "file" else main.path
    return Flags(extra.path if extra is not None else None, path, name if name != CONFIG_NAME else None)


version.setbase(VERSION_BASE)
setup_globals()
OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("oc.env", environment, replace=True)
hydra._internal.hydra.ConfigLoaderImpl = Loader  # type: ignore[misc]
