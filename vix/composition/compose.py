"""Composes configs from command lines, in the same way for ``train.py``, its sweeps and workers, and the commands of ``vix``.

Importing this module replaces Hydra's config loader by :class:`Loader`. It validates every file
(:mod:`vix.composition.yaml_files`) and applies an experiment's options only to the options that the experiment chooses
(:mod:`vix.composition.overlays`). Launchers get :func:`guarded_run_job`.
"""

import copy
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra._internal.hydra
import hydra.core.utils
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import compute_search_path_dir, create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.default_element import ResultDefault
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, RangeSweep
from hydra.core.utils import JobReturn, setup_globals
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override, open_dict
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from vix.build import GROUPS, OVERLAYS, SETTINGS, construct, parse_group
from vix.composition.command import CONFIG_DIR, CONFIG_NAME, Command, Flags, flags_of, quote_path, resolved_overrides
from vix.composition.overlays import OverlayOptions, option_name, typed_keys, unresolved
from vix.composition.yaml_files import Repository, check_permissions, is_group_file, location
from vix.config import to_plain
from vix.errors import ConfigError, UserError, first_paragraph, naming, nearest, one_line, permission_errors
from vix.overrides import parse_or_none, parse_override
from vix.runs.identity import run_name
from vix.runs.results import read_run
from vix.runs.snapshot import take_snapshot
from vix.runs.sweep import FOLDER, failed_return, record_end
from vix.system.files import expand_home
from vix.training.init_from import init_identity

VERSION_BASE = "1.3"
# Parts of Hydra's own config that contain paths.
HYDRA_PATHS = ("run", "sweep", "launcher", "sweeper", "job_logging", "hydra_logging")


class Loader(ConfigLoaderImpl):
    """Hydra's config loader with four more rules.

    - A file of a group may set only the program's options (:mod:`vix.composition.yaml_files`).
    - The keys that an experiment or a recipe sets for a group apply only to the option that it chooses there. Where another
      option is chosen, they are dropped and listed in ``hydra.runtime.left_out``.
    - A leading ``~`` in a value is expanded to the home directory.
    - A job of a sweep whose config cannot be composed is refused, and the other jobs run.
    """

    layers: "OverlayOptions"

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
        """Hydra's method; the arguments are those of ConfigLoaderImpl."""
        assert isinstance(self.repository, Repository)
        self.repository.primary = config_name
        overrides = list(map(quote_path, overrides))
        self.overrides = OverridesParser.create().parse_overrides(overrides)
        self.check_options()
        self.repository.includes.clear()
        try:
            cfg = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        except RecursionError as error:
            files = ", ".join(str(self.file_of(path)) for path in self.repository.includes if is_group_file(path))
            raise ConfigError(f"defaults: of these files, some include one another in a circle: {files}") from error
        except (HydraException, UserError) as error:
            common = self.common_to_all_jobs() if run_mode == RunMode.MULTIRUN else overrides
            if common == overrides:
                raise self.with_files(error) from error.__cause__
            # An option that only some of the sweep's choices accept: each job is composed separately later.
            self.overrides = OverridesParser.create().parse_overrides(common)
            cfg = super().load_configuration(config_name, common, run_mode, from_shell, validate_sweep_overrides)
            cfg.hydra.overrides.task = [o for o in overrides if not parse_override(o).is_hydra_override()]
        with flag_override(cfg, ["struct", "readonly"], [False, False]):
            self.layers.record_choices(cfg)
            self.layers.drop_unaccepted(cfg, self.overrides)
            for node in (cfg, *(cfg.hydra[part] for part in HYDRA_PATHS)):
                expand_homes(node)
        if run_mode == RunMode.RUN:
            self.resolve_settings(cfg)
        return cfg

    def check_options(self) -> None:
        """Raises ConfigError for a choice of a group that is no name of a file for Hydra, such as ``experiment=null``."""
        for override in self.overrides:
            group, swept = override.key_or_group, override.is_sweep_override()
            if swept or override.is_delete() or not self.repository.group_exists(group):
                continue
            value, typed = override.value(), str(override.input_line).partition("=")[2]
            if isinstance(value, str) and value.endswith(".yaml"):
                raise ConfigError(f"{override.input_line}: use the name without ending: {group}={value.removesuffix('.yaml')}")
            if not isinstance(value, str | list | dict):  # a dict sets the group's options
                way_out = f"a name such as {typed} needs quotes: \"{group}='{typed}'\""
                if value is None:
                    way_out = f"leave it out, or use ~{group}" if group in OVERLAYS else "choose one of them"
                raise ConfigError(f"{override.input_line}: the value is the name of a file in conf/{group}/; {way_out}")

    def resolve_settings(self, cfg: DictConfig) -> None:
        """Raises ConfigError where a setting, on which the run's directory depends, cannot be resolved."""
        for key in SETTINGS:
            try:
                to_plain(cfg, key)
            except ConfigError as error:
                path = self.layers.settings.get(key)
                raise ConfigError(f"{error} (set in {location(self.file_of(path), key)})" if path else str(error)) from error

    def with_files(self, error: Exception) -> Exception:
        """Hydra's error about a group that two files choose, with the names of the files; other errors are unchanged."""
        twice = re.match(r"Multiple values for ([^\s@]+)\.|([^\s@]+) appears more than once in the final defaults", str(error))
        if not twice:
            return error
        assert isinstance(self.repository, Repository)
        group = twice[1] or twice[2]
        added = [str(o.input_line) for o in self.overrides if o.key_or_group == group and o.is_add()]
        if added:
            return ConfigError(f"{added[0]}: an option of {group} is already chosen; remove the + to replace it")
        paths = [path for path, found in self.repository.includes.items() if any(f.startswith(f"{group}/") for f in found)]
        files = ", ".join(str(self.file_of(path)) for path in paths)
        way_out = f"all but the first need 'override /{group}: OPTION'"
        return ConfigError(f"defaults: an option of {group} is chosen more than once ({files}); {way_out}")

    def file_of(self, config_path: str) -> Path | None:
        """The file of a config; None for those of Hydra and its plugins, and of ``hydra.searchpath``."""
        assert isinstance(self.repository, Repository)
        return self.repository.file_of(config_path)

    def common_to_all_jobs(self) -> list[str]:
        """The overrides that apply to all jobs. In a sweep over a group, these exclude values of options, which may differ."""
        if not any(o.is_sweep_override() and self.repository.group_exists(o.key_or_group) for o in self.overrides):
            return [str(o.input_line) for o in self.overrides]
        return [
            str(o.input_line)
            for o in self.overrides
            if o.is_hydra_override() or o.key_or_group in SETTINGS or self.repository.group_exists(o.key_or_group)
        ]

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The config of one job of a sweep; a refused job where it cannot be composed."""
        try:
            return super().load_sweep_config(master_config, sweep_overrides)
        except (HydraException, OmegaConfBaseException, UserError) as error:
            message = format_error(error, sweep_overrides, flags_of(master_config.hydra))
            return self.refused_job(master_config, sweep_overrides, message)

    def refused_job(self, master: DictConfig, overrides: Sequence[str], message: str) -> DictConfig:
        """A config that contains only the settings outside the groups, and ``message`` as ``hydra.runtime.refused``."""
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
                    job.hydra.runtime.choices[parsed.key_or_group] = option_name(parsed.value())
        return job

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: Any) -> DictConfig:
        check_permissions(defaults, repo)
        self.layers = OverlayOptions(defaults, repo)
        return super()._compose_config_from_defaults_list(defaults, repo)

    def _load_single_config(self, default: ResultDefault, repo: Any) -> ConfigResult:
        return self.layers.drop_foreign_options(default, super()._load_single_config(default, repo))


def expand_homes(node: Any) -> None:
    """Expand a leading ``~`` in every string below a node, except in Hydra's part. Raises UserError, which names the key."""
    if not OmegaConf.is_config(node) or node._is_none() or node._is_interpolation() or node._is_missing():
        return
    for key in range(len(node)) if isinstance(node, ListConfig) else [key for key in node if key != "hydra"]:
        value = unresolved(node, key)
        if isinstance(value, str) and value.startswith("~"):
            with naming(node._get_full_key(key)):
                node[key] = expand_home(value)
        expand_homes(value)


def oc_env(key: str, *default: Any) -> str | None:
    """The resolver ``${oc.env:KEY,default}``, with a leading ``~`` expanded."""
    value = oc.env(key, *default)
    with naming(key):
        return expand_home(value) if isinstance(value, str) else value


# Composing


def compose(overrides: Sequence[str] = (), flags: Flags | None = None, mode: RunMode = RunMode.RUN) -> DictConfig:
    """The config that ``python train.py OVERRIDES`` runs, without Hydra's part.

    overrides: of the command line.   flags: which config files are used.   mode: one run, or a sweep (multirun).

    Raises Hydra's exceptions for invalid overrides, and ConfigError for invalid config files.
    """
    cfg = compose_with_hydra(overrides, flags, mode)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def compose_with_hydra(overrides: Sequence[str] = (), flags: Flags | None = None, mode: RunMode = RunMode.RUN) -> DictConfig:
    """As :func:`compose`, with Hydra's part; with ``RunMode.MULTIRUN`` the config that all jobs of a sweep have in common."""
    flags = flags or Flags()
    single = mode == RunMode.RUN
    name = flags.config_name or CONFIG_NAME
    return make_loader(flags).load_configuration(name, list(overrides), mode, from_shell=True, validate_sweep_overrides=single)


def sweep_outputs(command: Command) -> Path | None:
    """The directory below which the runs of a command's sweep are; None where it starts no sweep.

    Raises the exceptions of :func:`compose` and :func:`check_max_batch_size`.
    """
    if not command.runs:
        return None
    cfg = compose_with_hydra(command.overrides, command.flags, RunMode.MULTIRUN)
    if not command.multirun and cfg.hydra.mode != RunMode.MULTIRUN:
        return None
    check_max_batch_size(cfg)
    return sweep_directory(cfg)


def check_max_batch_size(cfg: DictConfig) -> None:
    """Raises ConfigError where Hydra would start a sweep in parts: it does not start those after one with a failed job."""
    if cfg.hydra.sweeper.get("max_batch_size") is not None:
        raise ConfigError(
            "hydra.sweeper.max_batch_size: Hydra drops all jobs after the batch of one that fails; use null, and limit how "
            "many jobs run at once with the launcher (n_jobs, num_gpus, array_parallelism)"
        )


def is_search(command: Command) -> bool:
    """Whether a command's sweep is a search with Optuna, whose trials may fail."""
    sweeper = compose_with_hydra(command.overrides, command.flags, RunMode.MULTIRUN).hydra.sweeper
    return "optuna" in str(sweeper.get("_target_"))


def sweep_directory(cfg: DictConfig) -> Path:
    """``hydra.sweep.dir`` of the config that all jobs have in common; outputs/ where it depends on the job."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)
    try:
        return Path(str(cfg.hydra.sweep.dir))
    except OmegaConfBaseException:
        return Path("outputs")
    finally:
        HydraConfig.instance().cfg = before


@permission_errors()
def make_loader(flags: Flags) -> Loader:
    """A loader with the search path that Hydra uses for these flags. Raises UserError where ``--config-dir`` does not exist."""
    main = compute_search_path_dir(str(CONFIG_DIR.parent / "train.py"), None, expand_home(flags.config_path or str(CONFIG_DIR)))
    search_path = create_config_search_path(main)
    if flags.config_dir:
        extra = Path(expand_home(flags.config_dir)).absolute()
        if not extra.is_dir():
            raise UserError(f"--config-dir {flags.config_dir}: no such directory")
        search_path.prepend(provider="command-line", path=f"file://{extra}", anchor=SearchPathQuery(provider="schema"))
    return Loader(search_path)


def refused_reason(hydra_config: Any) -> str | None:
    """Why the config of a sweep's job could not be composed; None where it was composed."""
    return OmegaConf.select(hydra_config, "runtime.refused")


def left_out_messages(hydra_config: Any) -> list[str]:
    """Messages about the keys of the experiment and the recipe that were dropped, one per file and group."""
    return list(OmegaConf.select(hydra_config, "runtime.left_out") or ())


def run_name_of_config(choices: Mapping[str, Any], overrides: ListConfig, seed: Any, *, _root_: DictConfig) -> str:
    """The resolver ``${run_name:…}``: a run's directory below outputs/. OmegaConf supplies ``_root_``, the whole config."""
    digests = digest_of_images(_root_), digest_of_weights(_root_)
    return run_name(choices, resolved_overrides(overrides, _root_), seed, *digests)


def digest_of_images(cfg: DictConfig | None) -> str:
    """The first eight digits of the digest of a config's image set; empty where its content is fixed, or cannot be read.

    In the latter case, the run is refused with the reason once its directory is known.
    """
    try:
        return str(construct("data", parse_group(cfg, "data")).digest)[:8] if cfg is not None else ""
    except (UserError, OmegaConfBaseException, AttributeError):
        return ""


def digest_of_weights(cfg: DictConfig | None) -> str:
    """The first eight digits of the digest of the weights at ``trainer.init_from``; empty where it is null.

    Where these weights are gone, of those from which an earlier run below outputs/ started, so that it is found and resumed.
    """
    try:
        source = None if cfg is None else OmegaConf.select(cfg, "trainer.init_from")
        if cfg is None or not isinstance(source, str):
            return ""
        outputs = Path(str(OmegaConf.select(cfg, "hydra.sweep.dir") or "outputs"))
    except OmegaConfBaseException:
        return ""
    if known := init_identity(source):
        return known["init_weights"][:8]
    earlier = sorted(map(read_run, outputs.glob("*/*/results.json")), key=lambda run: -run.written)
    found = (run.results for run in earlier if run.fields.get("trainer.init_from") == source)
    return str(next(found, {}).get("init_weights") or "")[:8]


def format_error(error: Exception, arguments: Sequence[str], flags: Flags | None = None) -> str:
    """The error message for a command, in one line. Hydra's and OmegaConf's errors get the key and the nearest valid keys.

    arguments, flags: of the command.
    """
    return one_line(explain(error, arguments, flags))


def explain(error: Exception, arguments: Sequence[str], flags: Flags | None) -> str:
    """The message of ``format_error``; a word of the command may contain any character."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        path = f"{error.filename}: " if error.filename else ""  # a full disk has no name
        where = "choose another directory with hydra.run.dir=DIR, or hydra.sweep.dir=DIR for a sweep"
        return f"{path}{error.strerror}; fix the cause, or {where}"
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        return missing_file(error, flags or Flags())
    if isinstance(error, OverrideParseException):
        quotes = "a value with special characters needs two kinds of quotes"
        return f"{error.override}: not in the form key=value; {quotes}: \"key='value'\""
    missing = re.match(r"(?:Could not override|Could not delete from config\.) '([^'@]+)'", str(error))
    if isinstance(error, HydraException) and missing:
        key = missing[1]
        return f"{key}: there is no such key; {nearest(key, valid_keys(arguments, key, flags))}"
    return reworded(error, flags or Flags())


def missing_file(error: MissingConfigException, flags: Flags) -> str:
    """The message for an option of a group that has no file."""
    group, _, option = str(error.missing_cfg_file).removesuffix(".yaml").rpartition("/")
    if group.startswith("hydra/"):
        plugins = "its plugin is not installed: pip install -r requirements-launchers.txt"
        return f"{group}={option}: no such option, or {plugins}"
    for directory in (flags.config_dir, CONFIG_DIR):
        if directory and (file := Path(directory, group, f"{option}.yml")).is_file():
            return f"{group}={option}: the name of {file} must end in .yaml"
    parent = re.match(r"In '([^']+/[^']+)': ", str(error))
    start = f"{make_loader(flags).file_of(parent[1])}: defaults: " if parent else ""
    return f"{start}{group}={option}: conf/{group}/ has no such file; {nearest(option, map(str, error.options or ()))}"


def reworded(error: Exception, flags: Flags) -> str:
    """A message of Hydra or OmegaConf, in one line with the way out or the file."""
    text = first_paragraph(error)
    if several := re.match(r"Ambiguous value for argument '(.*?)' 1\. ", text):
        return f"{several[1]}: several values start a sweep with -m; a list needs brackets, a text with a comma quotes"
    if isinstance(error.__cause__, Exception) and (merged := re.fullmatch(r"Error merging override (.*)", text)):
        return f"{merged[1]}: {first_paragraph(error.__cause__)}"
    if place := re.match(r"In '?([\w/.-]+)'?: (?=\S)", text):
        file = make_loader(flags).file_of(place[1])
        return f"{file or place[1]}: defaults: {text[place.end() :]}"
    return text


@contextmanager
def naming_file(arguments: Sequence[str], flags: Flags | None = None) -> Iterator[None]:
    """Context manager that adds to a ConfigError about an option the file that set it, unless the command line did.

    arguments, flags: of the command.
    """
    try:
        yield
    except ConfigError as error:
        file = file_that_set(str(error), arguments, flags)
        if not file:
            raise
        raise ConfigError(f"{error} (set in {file})") from error


def file_that_set(message: str, arguments: Sequence[str], flags: Flags | None) -> str:
    """``FILE:LINE`` of the option with which a message begins; empty where the command line sets it, or no file does."""
    key = re.match(r"[a-z]\w*(\.\w+)?(?=[=:])", message)
    if not key:
        return ""
    loader = make_loader(flags or Flags())
    loader.load_configuration((flags and flags.config_name) or CONFIG_NAME, list(arguments), RunMode.RUN)
    group, _, option = key[0].partition(".")
    path = loader.layers.origin.get(group, {}).get(option) if option else loader.layers.settings.get(group)
    typed = set(typed_keys(loader.overrides))
    if path is None or key[0] in typed:
        return ""
    return location(loader.file_of(path), option or group)


def is_hydra_error(error: BaseException) -> bool:
    """Whether an error is one of Hydra or OmegaConf, or was raised inside them, which indicates invalid arguments."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return True
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return module.partition(".")[0] in ("hydra", "omegaconf", "antlr4")


def valid_keys(arguments: Sequence[str], wrong_key: str, flags: Flags | None = None) -> list[str]:
    """Groups and dotted keys of the config that the arguments compose, ignoring those for ``wrong_key``."""
    choices = []
    for argument in arguments:
        override = parse_or_none(argument)
        if override and override.key_or_group in (*GROUPS, *OVERLAYS) and not override.is_sweep_override():
            choices.append((override.key_or_group, argument))
    for overrides in ([argument for key, argument in choices if key != wrong_key], []):
        try:
            cfg = compose(overrides, flags)
        except (HydraException, UserError):
            continue
        return sorted({*GROUPS, *OVERLAYS, *dotted_keys(cfg)})
    return sorted({*GROUPS, *OVERLAYS})


def dotted_keys(cfg: DictConfig) -> list[str]:
    """``a.b`` for every leaf of a config."""
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            walk(value, f"{prefix}{key}.") if isinstance(value, dict) else keys.append(f"{prefix}{key}")

    walk(OmegaConf.to_container(cfg), "")
    return keys


def os_error(error: Exception) -> Exception:
    """The OSError that a library, such as logging, has reported by another ``error``; any other ``error`` as it is."""
    cause = error.__cause__
    return cause if isinstance(cause, OSError) and not isinstance(error, UserError) else error


def no_jobs(overrides: Sequence[str]) -> UserError | None:
    """The error for a sweep without jobs, which names the overrides that have no values; None where all have some."""
    sweeps = [parsed for override in overrides if (parsed := parse_or_none(override)) and parsed.is_sweep_override()]
    if globs := [str(parsed.input_line) for parsed in sweeps if isinstance(parsed.value(), Glob)]:
        return UserError(
            f"{', '.join(globs)}: matches nothing, so there is no run; a glob chooses among the files of a group in conf/"
        )
    ranges = [parsed for parsed in sweeps if isinstance(parsed.value(), RangeSweep)]
    empty = [str(parsed.input_line) for parsed in ranges if not [*parsed.sweep_iterator()]]
    return UserError(f"{', '.join(empty)}: has no values, so there is no run") if empty else None


def guarded_run_job(*arguments: Any, **options: Any) -> JobReturn:
    """Hydra's ``run_job``, which starts a job of a sweep: a directory that it cannot create or write to is that job's failure.

    Otherwise the first such job would end the sweep. Errors of the job itself are in what it returns.
    """
    try:
        take_snapshot(options["config"], "hydra.sweep.dir", "hydra.sweep.subdir")
        return run_job(*arguments, **options)
    except (OSError, ValueError) as error:  # ValueError: logging cannot open the log file
        cfg = options["config"]
        overrides = list(cfg.hydra.overrides.task)
        message = format_error(os_error(error), overrides)
        if folder := cfg.hydra.job.env_set.get(FOLDER):
            record_end(Path(folder), cfg.hydra.job.num, overrides, "failed", message)
        return failed_return(overrides, message)


version.setbase(VERSION_BASE)
setup_globals()
OmegaConf.register_new_resolver("run_name", run_name_of_config, replace=True)
OmegaConf.register_new_resolver("oc.env", oc_env, replace=True)
hydra._internal.hydra.ConfigLoaderImpl = Loader  # type: ignore[misc]
run_job = hydra.core.utils.run_job
# Launchers import run_job from hydra.core.utils, in a worker process of Ray or submitit before this module.
for module in [module for name, module in sys.modules.items() if name.startswith(("hydra.core.utils", "hydra_plugins."))]:
    if vars(module).get("run_job") is run_job:
        vars(module)["run_job"] = guarded_run_job
