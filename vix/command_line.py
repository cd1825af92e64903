"""The command line's own parts: the name of a run, and Hydra's errors in one line."""

import hashlib
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vix.build import build
from vix.checks import UserError
from vix.config import GROUPS, OVERLAYS, nearest
from vix.distributed import processes
from vix.overrides import canonical, override_key, parse_or_none
from vix.results import DEFAULT_RECIPE, MODEL_GROUPS
from vix.run import NOT_IDENTITY

if TYPE_CHECKING:
    from vix.compose import Flags

NOT_THE_RUN = ("rerun", "fail_fast", "trainer.resume")  # how a run is started
# Hydra's keys that say how the jobs of a sweep are made and started, not what one of them is.
NOT_ONE_JOB = ("hydra.mode", "hydra.launcher", "hydra.sweeper", "hydra.sweep", "hydra.job.env_set.VIX_SWEEP")


def run_name(choices: Mapping[str, Any], overrides: Sequence[str], seed: Any, *, _root_: DictConfig | None = None) -> str:
    """A run's directory below outputs/, which follows from what it is: ``vin,trainer.epochs=10/seed=1``.

    _root_: the composed config, supplied by OmegaConf.

    It starts with the experiment, or the four parts of the model where there is none; then come the overrides that are not
    in it yet, in alphabetical order, so that the same run has the same directory however its command was written. Of an image
    set whose content its root decides a digest is added: other images are another run, wherever they lie.
    """
    return "/".join(map(file_name, (",".join(run_name_parts(choices, overrides, _root_)), f"seed={seed}")))


def run_name_parts(choices: Mapping[str, Any], overrides: Sequence[str], cfg: DictConfig | None = None) -> list[str]:
    """The label of a run's model, and the overrides that are not in it yet."""
    experiment = choices.get("experiment")
    label = str(experiment or "-".join(str(choices.get(group)) for group in MODEL_GROUPS))
    in_name = {"experiment", "seed", *NOT_IDENTITY, *(() if experiment else MODEL_GROUPS)}
    last = {override_key(override): canonical(override) for override in overrides}  # of two values the last one counts
    rest = {override for key, override in last.items() if key not in in_name and re.split(r"[./]", key)[0] != "hydra"}
    images = digest_of_images(cfg)
    rest |= {f"images={images}"} if images else set()
    return [label, *sorted(rest - {DEFAULT_RECIPE})]


def digest_of_images(cfg: DictConfig | None) -> str:
    """Eight digits of the digest of a config's image set; empty where its content is always the same, and for images that
    cannot be looked at: the run is then refused with the reason, once its directory is known."""
    try:
        return str(build(cfg, "data").digest)[:8] if cfg is not None else ""
    except (UserError, OmegaConfBaseException, AttributeError):
        return ""


def file_name(text: str) -> str:
    """``text`` as a file name of at most 180 bytes, without what shells and paths give a meaning to."""
    name = re.sub(r"[^\w.,=+~\[\]-]+", "_", text)
    if len(name.encode()) > 180:  # file systems allow 255 bytes
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        name = name.encode()[:160].decode(errors="ignore") + "-" + digest
    return name


def repeating_command(job: Any) -> str:
    """The command, ready for a shell, that does a run again from its start: its program, flags and overrides.

    job: Hydra's part of the run's config.
    """
    from vix.compose import flags_of

    given = {f"--{key.replace('_', '-')}": value for key, value in flags_of(job)._asdict().items() if value is not None}
    flags = [word for flag in given.items() for word in flag]
    single = job.mode == RunMode.RUN
    hydra_overrides = [o for o in job.overrides.hydra if is_part_of_job(override_key(o), single)]
    overrides = [o for o in job.overrides.task if override_key(o) not in NOT_THE_RUN]
    return shlex.join([*launch_words(), "train.py", *flags, *hydra_overrides, *overrides, "rerun=true"])


def is_part_of_job(key: str, single: bool) -> bool:
    """Whether a key of Hydra's that the command line sets is repeated; of a sweep's job only where configs are looked for."""
    if not single:
        return key == "hydra.searchpath"
    return not any(key.replace("/", ".") == prefix or key.replace("/", ".").startswith(f"{prefix}.") for prefix in NOT_ONE_JOB)


def launch_words() -> list[str]:
    """What starts the program: Python, or torchrun with its processes."""
    if processes() == 1:
        return ["python"]
    world, local = processes(), int(os.environ.get("LOCAL_WORLD_SIZE", processes()))
    if local == world:
        return ["torchrun", "--standalone", f"--nproc-per-node={local}"]
    endpoint = f"{os.environ.get('MASTER_ADDR', 'HOST')}:29400"
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    return ["torchrun", f"--nnodes={-(-world // local)}", f"--nproc-per-node={local}", *meeting]


def git_commit() -> str | None:
    """The commit of this program, with ``-dirty`` where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def explain(error: Exception, arguments: Sequence[str], flags: "Flags | None" = None) -> str:
    """Hydra's or OmegaConf's error about a command in one line that names the key and the nearest valid ones; the
    program's own as it is."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        where = "choose where runs go with hydra.run.dir=DIR, or hydra.sweep.dir=DIR for a sweep"
        return f"{error.filename}: {error.strerror}; mend that, or {where}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
        options = [str(o) for o in error.options or ()]
        if group.startswith("hydra/"):
            plugins = "its plugin is missing: pip install -r requirements-launchers.txt"
            return f"{group}={option}: there is no such option, or {plugins}"
        return f"{group}={option}: conf/{group}/ has no such file; {nearest(option, options)}" if group else one_line(error)
    missing = re.match(r"(?:Could not override|Could not delete from config\.) '([^'@]+)'", str(error))
    if isinstance(error, HydraException) and missing:
        key = missing[1]
        return f"{key}: there is no such key; {nearest(key, valid_keys(arguments, key, flags))}"
    return one_line(error)


def one_line(error: Exception) -> str:
    """The first paragraph of an error's message on one line, without where Hydra would look things up."""
    text = re.sub(r"\n\s*(See https|full_key|object_type).*", "", str(error).strip()).split("\n\n")[0]
    return " ".join(text.split()) or type(error).__name__


def about_the_command(error: BaseException) -> bool:
    """Whether an error was raised inside Hydra or OmegaConf, as it is for arguments that they cannot use."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return module.partition(".")[0] in ("hydra", "omegaconf", "antlr4")


def valid_keys(arguments: Sequence[str], wrong_key: str, flags: "Flags | None" = None) -> list[str]:
    """Groups and dotted keys of the config that the arguments compose, without the wrong one."""
    from vix.compose import compose

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
        return sorted({*GROUPS, *OVERLAYS, *dotted(cfg)})
    return sorted({*GROUPS, *OVERLAYS})


def dotted(cfg: DictConfig) -> list[str]:
    """``a.b`` for every leaf of a config."""
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            walk(value, f"{prefix}{key}.") if isinstance(value, dict) else keys.append(f"{prefix}{key}")

    walk(OmegaConf.to_container(cfg), "")
    return keys
