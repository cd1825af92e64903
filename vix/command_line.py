"""The command line's own parts: the name of a run, and Hydra's errors in one line."""

import hashlib
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vix.build import build
from vix.checks import UserError
from vix.config import GROUPS, OVERLAYS, nearest
from vix.results import DEFAULT_RECIPE, MODEL_GROUPS, override_key
from vix.run import NOT_IDENTITY

NOT_THE_RUN = ("rerun", "fail_fast", "trainer.resume")  # how a run is started


def run_name(choices: Mapping[str, Any], overrides: Sequence[str], seed: Any, *, _root_: DictConfig | None = None) -> str:
    """A run's directory below outputs/, which follows from what it is: ``vin,trainer.epochs=10/seed=1``.

    _root_: the composed config, supplied by OmegaConf.

    It starts with the experiment, or the four parts of the model where there is none; then come the overrides that are not
    in it yet, in alphabetical order, so that the same run has the same directory however its command was written. Of an image
    set whose content its root decides a digest is added: other images are another run, wherever they lie.
    """
    experiment = choices.get("experiment")
    label = experiment or "-".join(str(choices.get(group)) for group in MODEL_GROUPS)
    told = {"experiment", "seed", *NOT_IDENTITY, *(() if experiment else MODEL_GROUPS)}
    last = {override_key(override): override for override in overrides}  # of two values for a key the last one counts
    rest = {override for key, override in last.items() if key not in told and key.partition(".")[0] != "hydra"}
    images = digest_of_images(_root_)
    rest |= {f"images={images}"} if images else set()
    name = re.sub(r"[^\w.,=+~\[\]-]+", "_", ",".join([label, *sorted(rest - {DEFAULT_RECIPE})]))
    if len(name) > 180:  # file systems allow 255 bytes
        name = name[:160] + "-" + hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name}/seed={seed}"


def digest_of_images(cfg: DictConfig | None) -> str:
    """Eight digits of the digest of a config's image set; empty where its content is always the same, and for images that
    cannot be looked at: the run is then refused with the reason, once its directory is known."""
    try:
        return str(build(cfg, "data").digest)[:8] if cfg is not None else ""
    except (UserError, OmegaConfBaseException, AttributeError):
        return ""


def repeating_command(overrides: Iterable[str]) -> str:
    """The command, ready for a shell, that does a run with these overrides again from its start."""
    return shlex.join(["python", "train.py", *(o for o in overrides if override_key(o) not in NOT_THE_RUN), "rerun=true"])


def git_commit() -> str | None:
    """The commit of this program, with ``-dirty`` where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def explain(error: Exception, config_dir: Path, arguments: Sequence[str]) -> str:
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
        return f"{key}: there is no such key; {nearest(key, valid_keys(config_dir, arguments, key))}"
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


def valid_keys(config_dir: Path, arguments: Sequence[str], wrong_key: str) -> list[str]:
    """Groups and dotted keys of the config that the arguments compose, without the wrong one."""
    choices = [a for a in arguments if "=" in a and a.split("=")[0] in (*GROUPS, *OVERLAYS) and "," not in a]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        for overrides in ([a for a in choices if a.split("=")[0] != wrong_key], []):
            try:
                cfg = compose("config", overrides)
            except HydraException:
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
