"""The command line of ``train.py``: Hydra's flags and overrides, and the command that reproduces a run."""

import argparse
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.utils import get_args_parser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vix.config import PACKAGES_VARIABLE
from vix.errors import naming
from vix.overrides import as_value, override_key, parse_or_none, quote
from vix.runs.identity import START_ONLY_KEYS
from vix.system.distributed import local_world_size, world_size
from vix.system.files import expand_home

CONFIG_DIR = Path(__file__).parents[2].resolve() / "conf"
CONFIG_NAME = "config"


class Flags(NamedTuple):
    """Hydra's options that select the config files: ``--config-dir``, ``--config-path`` and ``--config-name``."""

    config_dir: str | None = None
    config_path: str | None = None
    config_name: str | None = None


DIRECTORY_FLAGS = ("--config-dir", "-cd", "--config-path", "-cp")
# A text in quotes, or a path that begins with ~: as a value or one of several, and as an item of a list.
QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
NO_PATH = re.compile(r"""['"~\[{]|(choice|range|interval|glob|shuffle|sort|tag|int|float|str|bool)\(""")
HOME_IN_VALUE = re.compile(rf"{QUOTED}|(?<![^,\s])~[^,]*")
HOME_IN_LIST = re.compile(rf"{QUOTED}|(?<![^,\[\s])~[^,\]]*")


# Keys whose values are paths of runs or images, which may contain an equals sign, parentheses and the like.
PATH_KEYS = ("trainer.init_from", "data.root", "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")


def quote_path(override: str) -> str:
    """Quote a path that Hydra's grammar rejects: ``~`` is expanded, ``trainer.init_from=x/seed=0`` quoted (see PATH_KEYS).

    Without an equals sign, what begins as a list, a dictionary or a call such as ``choice(`` is not taken for a path, nor are
    several values of which one is missing.

    Paths of runs also contain commas; only where each part is a path are they several values. Other overrides are unchanged.

    Raises UserError, which names the key, for the home directory of an unknown user.
    """
    key, equals, value = override.partition("=")
    parts = value.split(",")
    is_path = value[:1] not in "'\"~" if "=" in value else all(parts) and not any(map(NO_PATH.match, parts))
    if key in PATH_KEYS and is_path and not parse_or_none(override):
        several = not os.path.exists(value) and all(map(os.path.exists, parts))
        return f"{key}={','.join(map(quote, parts if several else [value]))}"
    if not equals or "~" not in value or parse_or_none(override):
        return override

    def expand(found: re.Match[str]) -> str:
        return quote(expand_home(found[0])) if found[0].startswith("~") else found[0]

    with naming(key):
        return f"{key}={(HOME_IN_LIST if value.startswith('[') else HOME_IN_VALUE).sub(expand, value)}"


class Command(NamedTuple):
    """A parsed command line of ``train.py``.

    flags, overrides: config files, and overrides.
    multirun: whether ``-m`` is given.
    runs: False where the command only prints information, such as ``--help`` and ``--cfg``.
    """

    flags: Flags
    overrides: list[str]
    multirun: bool
    runs: bool


def parse_command(arguments: Sequence[str]) -> Command:
    """Parse the arguments of ``train.py`` with Hydra's own parser."""
    parsed = get_args_parser().parse_args(list(arguments))
    only_shows = parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion
    return Command(flags_from(parsed), parsed.overrides, parsed.multirun, not (only_shows or parsed.experimental_rerun))


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """Expand a leading ``~`` in the values of flags and overrides. Raises UserError for the home of an unknown user."""
    expanded: list[str] = []
    for before, argument in zip(("", *arguments), arguments, strict=False):
        flag, equals, value = argument.partition("=")
        if before in DIRECTORY_FLAGS:
            flag, value = before, argument
        elif not (flag.startswith("-") and equals):
            expanded.append(quote_path(argument))
            continue
        with naming(flag):
            expanded.append(argument.removesuffix(value) + expand_home(value))
    return expanded


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add Hydra's options that select the config files."""
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="an additional directory with config files")
    parser.add_argument("--config-path", "-cp", metavar="DIR", help="a directory that replaces conf/")
    parser.add_argument("--config-name", "-cn", metavar="NAME", help="name of the primary config (default: config)")


def flags_from(parsed: argparse.Namespace) -> Flags:
    """The flags of a parser with the options of :func:`add_flags`."""
    return Flags(parsed.config_dir, parsed.config_path, parsed.config_name)


def flags_of(hydra_config: Any) -> Flags:
    """The flags with which a config was composed, from its Hydra part, which is also available in a launcher's process."""
    sources = {str(source.provider): source for source in hydra_config.runtime.config_sources}
    main, extra, name = sources.get("main"), sources.get("command-line"), hydra_config.job.config_name
    path = None
    if main is not None and main.path != str(CONFIG_DIR):
        path = f"{main.schema}://{main.path}" if main.schema != "file" else main.path
    return Flags(extra.path if extra is not None else None, path, name if name != CONFIG_NAME else None)


# Hydra's keys that affect how the jobs of a sweep are created and started, but not the jobs themselves.
SWEEP_ONLY_KEYS = ("hydra.mode", "hydra.launcher", "hydra.sweeper", "hydra.sweep", "hydra.job.env_set.VIX_SWEEP")


def reproduce_command(job: Any, overrides: Iterable[str]) -> str:
    """The shell command that reproduces a run from its start: packages of classes, program, flags and overrides.

    job: Hydra's part of the run's config.   overrides: of the run, without Hydra's.
    """
    given = {f"--{key.replace('_', '-')}": value for key, value in flags_of(job)._asdict().items() if value is not None}
    flags = [word for flag in given.items() for word in flag]
    single = job.mode == RunMode.RUN
    hydra_overrides = [o for o in typed_overrides(job.overrides.hydra) if is_part_of_job(override_key(o), single)]
    kept = [override for override in overrides if override_key(override) not in START_ONLY_KEYS]
    packages = os.environ.get(PACKAGES_VARIABLE)
    environment = ["env", f"{PACKAGES_VARIABLE}={packages}"] if packages else []
    return shlex.join([*environment, *launch_words(), "train.py", *flags, *hydra_overrides, *kept, "rerun=true"])


def typed_overrides(overrides: Any) -> list[str]:
    """``hydra.overrides.task`` or ``hydra.overrides.hydra`` as they were typed: with ``${…}`` unresolved."""
    return OmegaConf.to_container(overrides, resolve=False)  # type: ignore[return-value]


def resolved_overrides(overrides: Any, cfg: DictConfig) -> list[str]:
    """``hydra.overrides.task`` of a run, with the values that ``${…}`` has in the run's config ``cfg``.

    So the run's name and its command do not depend on environment variables.
    """
    return [with_value(override, cfg) if "$" in override else override for override in typed_overrides(overrides)]


def with_value(override: str, cfg: DictConfig) -> str:
    """An override with an interpolation, with its value in a config; unchanged where the config lacks it.

    Hydra's sweeper writes the interpolation of a job as ``$\\{…\\}``.
    """
    parsed = parse_or_none(override)
    if parsed is None or parsed.is_delete() or parsed.is_sweep_override() or "${" not in str(parsed.value()):
        return override
    try:
        value = OmegaConf.select(cfg, parsed.key_or_group)
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except (OmegaConfBaseException, RecursionError):  # the run is refused with the reason
        return override
    return override if plain is None else f"{parsed.get_key_element()}={as_value(plain)}"


def is_part_of_job(key: str, single: bool) -> bool:
    """Whether the command that reproduces a run includes a key of Hydra's; for a job of a sweep, only the search path is.

    single: whether the run is not a job of a sweep.
    """
    if not single:
        return key == "hydra.searchpath"
    return not any(
        key.replace("/", ".") == prefix or key.replace("/", ".").startswith(f"{prefix}.") for prefix in SWEEP_ONLY_KEYS
    )


def launch_words() -> list[str]:
    """The beginning of the command: python, or torchrun with its options."""
    if world_size() == 1:
        return ["python"]
    world, local = world_size(), local_world_size()
    if local == world:
        return ["torchrun", "--standalone", f"--nproc-per-node={local}"]
    endpoint = f"{os.environ.get('MASTER_ADDR', 'HOST')}:29400"
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    return ["torchrun", f"--nnodes={-(-world // local)}", f"--nproc-per-node={local}", *rendezvous]
