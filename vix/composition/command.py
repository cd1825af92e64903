"""Command lines of ``train.py``: Hydra's flags and overrides, and the command that reproduces a run."""

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
    """Hydra's options that say which files a config comes from."""

    config_dir: str | None = None
    config_path: str | None = None
    config_name: str | None = None


def quote_home(override: str) -> str:
    """``data.root=~/x``, which Hydra's grammar refuses, with the home directory in its place; anything else unchanged."""
    key, equals, value = override.partition("=")
    if not equals or not value.startswith("~"):
        return override
    return f"{key}={quote(expand_home(value))}"


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


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of ``train.py`` with a leading ``~`` in a flag's or an override's value replaced by the home directory."""
    expanded = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        expanded.append(f"{flag}={expand_home(value)}" if flag.startswith("-") and equals else quote_home(argument))
    return expanded


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


# Hydra's keys that say how the jobs of a sweep are made and started, not what one of them is.
SWEEP_ONLY_KEYS = ("hydra.mode", "hydra.launcher", "hydra.sweeper", "hydra.sweep", "hydra.job.env_set.VIX_SWEEP")


def reproduce_command(job: Any) -> str:
    """The command, ready for a shell, that does a run again from its start: its program, flags and overrides.

    job: Hydra's part of the run's config.
    """

    given = {f"--{key.replace('_', '-')}": value for key, value in flags_of(job)._asdict().items() if value is not None}
    flags = [word for flag in given.items() for word in flag]
    single = job.mode == RunMode.RUN
    hydra_overrides = [o for o in job.overrides.hydra if is_part_of_job(override_key(o), single)]
    overrides = [o for o in job.overrides.task if override_key(o) not in START_ONLY_KEYS]
    return shlex.join([*launch_words(), "train.py", *flags, *hydra_overrides, *overrides, "rerun=true"])


def is_part_of_job(key: str, single: bool) -> bool:
    """Whether a key of Hydra's that the command line sets is repeated; of a sweep's job only where configs are looked for."""
    if not single:
        return key == "hydra.searchpath"
    return not any(
        key.replace("/", ".") == prefix or key.replace("/", ".").startswith(f"{prefix}.") for prefix in SWEEP_ONLY_KEYS
    )


def launch_words() -> list[str]:
    """What starts the program: Python, or torchrun with its processes."""
    if world_size() == 1:
        return ["python"]
    world, local = world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if local == world:
        return ["torchrun", "--standalone", f"--nproc-per-node={local}"]
    endpoint = f"{os.environ.get('MASTER_ADDR', 'HOST')}:29400"
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    return ["torchrun", f"--nnodes={-(-world // local)}", f"--nproc-per-node={local}", *meeting]
