"""The command line of ``train.py``: Hydra's flags and overrides, and the command that reproduces a run."""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.utils import get_args_parser
from hydra.types import RunMode

from vix.overrides import override_key, quote
from vix.runs.identity import START_ONLY_KEYS
from vix.system.distributed import world_size
from vix.system.files import expand_home

CONFIG_DIR = Path(__file__).parents[2].resolve() / "conf"
CONFIG_NAME = "config"


class Flags(NamedTuple):
    """Hydra's options that select the config files: ``--config-dir``, ``--config-path`` and ``--config-name``."""

    config_dir: str | None = None
    config_path: str | None = None
    config_name: str | None = None


def quote_path(override: str) -> str:
    """Quote a path that Hydra's grammar rejects: one with ``~``, which is expanded, or a run's (``…init_from=x/seed=0``).

    Paths of runs also contain commas; only where each part is a path are they several values. Other overrides are unchanged.
    """
    key, equals, value = override.partition("=")
    if equals and value.startswith("~"):
        return f"{key}={quote(expand_home(value))}"
    if key != "trainer.init_from" or "=" not in value or value[0] in "'\"":
        return override
    parts = value.split(",")
    several = not os.path.exists(value) and all(map(os.path.exists, parts))
    return f"{key}={','.join(map(quote, parts if several else [value]))}"


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
    """Expand a leading ``~`` in the values of flags and overrides."""
    expanded = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        expanded.append(f"{flag}={expand_home(value)}" if flag.startswith("-") and equals else quote_path(argument))
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


def reproduce_command(job: Any) -> str:
    """The shell command that reproduces a run from its start: program, flags and overrides.

    job: Hydra's part of the run's config.
    """
    given = {f"--{key.replace('_', '-')}": value for key, value in flags_of(job)._asdict().items() if value is not None}
    flags = [word for flag in given.items() for word in flag]
    single = job.mode == RunMode.RUN
    hydra_overrides = [o for o in job.overrides.hydra if is_part_of_job(override_key(o), single)]
    overrides = [o for o in job.overrides.task if override_key(o) not in START_ONLY_KEYS]
    return shlex.join([*launch_words(), "train.py", *flags, *hydra_overrides, *overrides, "rerun=true"])


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
    world, local = world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if local == world:
        return ["torchrun", "--standalone", f"--nproc-per-node={local}"]
    endpoint = f"{os.environ.get('MASTER_ADDR', 'HOST')}:29400"
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    return ["torchrun", f"--nnodes={-(-world // local)}", f"--nproc-per-node={local}", *rendezvous]
