"""Identity of a run: the keys that define it, its directory name, and what may change when it is resumed.

A run can be resumed under another config (trainer.resume=force): options come from the new config, state from the checkpoint.
A changed option that is incompatible with the state is an error that names the key.
"""

import hashlib
import re
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vix.errors import ConfigError
from vix.overrides import settings

# Keys that affect where a run takes place or what it logs, but not its results: they may differ on resume.
IGNORED_ON_RESUME = (
    "rerun",
    "fail_fast",
    "data.root",  # its content, including the classes, is identified by ImageData.image_set
    "data.classes",
    "trainer.init_from",  # the weights are identified by the field init_weights
    "trainer.device",
    "trainer.resume",
    "trainer.probe",
    "trainer.checkpoint_every",
    "trainer.eval_batch_size",
    "optimizer.fused",
)
# Keys that affect the cost of a run, but not its results: they may differ on resume, too. Because sweeps compare them, each
# value has its own directory.
PERFORMANCE_KEYS = ("trainer.compile", "trainer.activation_checkpointing")

# Runs that differ only in these keys form one group.
IGNORED_IN_GROUPS = (
    *("experiment", "seed", "rerun", "fail_fast", "data.root", "data.classes", "data.fold"),
    *("trainer.device", "trainer.resume", "trainer.probe", "trainer.checkpoint_every", "trainer.eval_batch_size"),
    "optimizer.fused",
)
# Keys that affect neither the time of an epoch nor the memory: runs that differ only in these have the same cost.
COST_NEUTRAL_KEYS = (
    *(
        "seed",
        "rerun",
        "fail_fast",
        "data.root",
        "data.classes",
        "data.fold",
        "data.class_weights",
        "trainer.device",
        "trainer.epochs",
        "trainer.patience",
        "trainer.init_from",
        "trainer.schedule",
        "trainer.warmup_epochs",
    ),
    *("trainer.label_smoothing", "trainer.checkpoint_every", "trainer.resume", "optimizer.lr", "optimizer.weight_decay"),
)
# Groups of keys that only say where a run takes place and where it is logged.
NOT_OF_THE_RUN = ("hydra", "logger")
DEFAULT_RECIPE = "recipe=paper"  # the default, so it is omitted from names
MODEL_GROUPS = ("model", "attention", "embedding", "posenc")
# A key of those groups that affects the cost of the model, but not its results.
SAME_MODEL = "attention.implementation"

Changes = Mapping[str, tuple[Any, Any]]  # changed key of the config → its values in the checkpoint and in the new config

# Groups whose class cannot change on resume.
CLASSES = ("model", "attention", "embedding", "posenc", "optimizer", "data")
# Keys that cannot change on resume, with the reason.
FIXED_KEYS = {
    "seed": "the weights and the order of the images depend on the seed",
    "data.image_size": "the images would be different",
    "data.channels": "the images would be different",
    "data.test_size": "the earlier epochs were evaluated on other images",
    "data.validation_size": "the earlier epochs were evaluated on other images",
    "data.folds": "the earlier epochs were evaluated on other images",
    "data.fold": "the earlier epochs were evaluated on other images",
}
# Keys that can change between epochs, but not within one.
FIXED_WITHIN_EPOCH_KEYS = ("trainer.batch_size", "data.train_size")


def is_of_the_run(key: str) -> bool:
    """Whether a key of a config or an override can be part of a run's identity: it is none of Hydra's or of the logger."""
    return re.split(r"[./]", key)[0] not in NOT_OF_THE_RUN


def check_changeable(changed: Changes, epoch: int, batch: int, directory: Path) -> None:
    """Check that the changed options may change on resume.

    changed: changed keys, with their values in the checkpoint and in the new config.
    epoch, batch: finished epochs, and finished steps of the next one.
    directory: of the run, for the error message.

    Raises ConfigError where an option can never change, or not at this point of the run.
    """
    for key, (then, now) in changed.items():
        group, _, option = key.partition(".")
        if option == "_target_" and group in CLASSES:
            raise cannot_resume(directory, {key: (then, now)}, f"the checkpoint holds the state of another {group}")
        if key in FIXED_KEYS:
            raise cannot_resume(directory, {key: (then, now)}, FIXED_KEYS[key])
        if key in FIXED_WITHIN_EPOCH_KEYS and batch:
            reason = f"the run stopped within epoch {epoch + 1}, whose batches depend on it"
            raise cannot_resume(directory, {key: (then, now)}, reason)
        if key == "trainer.epochs" and now < epoch + (batch > 0):
            done = f"{epoch} epochs" + (f" and {batch} steps" if batch else "")
            raise cannot_resume(directory, {key: (then, now)}, f"{done} are already finished")


def cannot_resume(directory: Path, changed: Changes, reason: str) -> ConfigError:
    """The error for options that cannot change on resume."""
    keys = ", ".join(f"{key} was {then} and is {now}" for key, (then, now) in changed.items())
    return ConfigError(
        f"trainer.resume=force cannot continue {directory} ({keys}): {reason}; keep the value, or start over with rerun=true"
    )


def changes_row(changed: Changes, epoch: int, batch: int) -> dict[str, Any]:
    """An entry of ``config_changes`` in results.json: the changed keys, and the epochs and steps finished before the change."""
    return {"epochs_before": epoch, "steps_before": batch, "changed": {key: list(values) for key, values in changed.items()}}


def is_off(value: Any) -> bool:
    """Whether the value of an option is null, false or 0. A run that predates such an option computed the same."""
    return value is None or value == 0


def with_defaults(config: Mapping[str, Any], results: Mapping[str, Any], keys: Collection[str] | None = None) -> dict[str, Any]:
    """The flat config of a run with the defaults of the options that it leaves out, as far as they are known and not off.

    results: of the run. Older ones lack the field ``defaults``.
    keys: of these options; None: all of them.
    """
    defaults = results.get("defaults")
    known = defaults if isinstance(defaults, dict) else {}
    return {key: value for key, value in known.items() if keys is None or key in keys} | dict(config)


def changed_keys(then: Mapping[str, Any], now: Mapping[str, Any], ignored: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Keys of two flat configs whose values differ, sorted, with both values (None where a config lacks the key).

    An option that is off and that the other config lacks is no difference: it is newer than the run, or was removed.

    then, now: configs with dotted keys.   ignored: keys that are not compared.
    """
    keys = sorted(key for key in {*then, *now} - {*ignored} if is_of_the_run(key))
    pairs = {key: (then.get(key), now.get(key)) for key in keys}
    both_off = {key for key, (a, b) in pairs.items() if (key not in then or key not in now) and is_off(a) and is_off(b)}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b and key not in both_off}


START_ONLY_KEYS = ("rerun", "fail_fast", "trainer.resume")  # affect only how a run starts


def run_name(choices: Mapping[str, Any], overrides: Sequence[str], seed: Any, images: str = "", weights: str = "") -> str:
    """A run's directory below outputs/, such as ``vin,trainer.epochs=10/seed=1``.

    choices: the chosen option of each config group.
    overrides: of the command line.
    images: digest of an image set whose content depends on its root, so that other images are another run.
    weights: digest of the weights that the run starts from, so that other weights are another run.

    The name begins with the experiment, or with the four model groups where no experiment is chosen. The other overrides
    follow in canonical form and alphabetical order, so that equivalent commands share a directory.
    """
    return "/".join(map(file_name, (",".join(run_name_parts(choices, overrides, images, weights)), f"seed={seed}")))


def run_name_parts(choices: Mapping[str, Any], overrides: Sequence[str], images: str = "", weights: str = "") -> list[str]:
    """The parts of :func:`run_name`: the experiment or the model groups, then every other override that defines the run."""
    experiment = choices.get("experiment")
    label = str(experiment or "-".join(str(choices.get(group)) for group in MODEL_GROUPS))
    in_name = {"experiment", "seed", *IGNORED_ON_RESUME, *(() if experiment else MODEL_GROUPS)}
    rest = {override for key, override in settings(overrides).items() if key not in in_name and is_of_the_run(key)}
    rest |= {f"{key}={digest}" for key, digest in (("images", images), ("init_from", weights)) if digest}
    return [label, *sorted(rest - {DEFAULT_RECIPE})]


def file_name(text: str) -> str:
    """``text`` as a file name of at most 180 bytes, without characters that are special in shells or paths."""
    name = re.sub(r"[^\w.,=+~\[\]-]+", "_", text)
    if len(name.encode()) > 180:  # file systems allow 255 bytes
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        name = name.encode()[:160].decode(errors="ignore") + "-" + digest
    return name


def git_commit() -> str | None:
    """The commit hash of this program, with ``-dirty`` where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
