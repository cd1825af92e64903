"""Continuing a checkpoint, also under another config (trainer.resume=force): what is used from which, and what cannot change.

Options come from the new config, state from the checkpoint. A changed option that the state does not fit is refused by name.
"""

import hashlib
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vix.errors import ConfigError
from vix.overrides import canonical, override_key
from vix.runs.results import DEFAULT_RECIPE, MODEL_GROUPS

# Where a run happens or how much is shown, not what it computes: these may differ when a run is continued.
IGNORED_ON_RESUME = (
    "rerun",
    "fail_fast",
    "data.root",  # what lies there has an identity of its own (ImageData.image_set), as has the number of its classes
    "data.classes",
    "trainer.device",
    "trainer.resume",
    "trainer.probe",
    "trainer.checkpoint_every",
    "trainer.eval_batch_size",
    "optimizer.fused",
)
# What a run costs, not what it computes: these may differ, too, but sweeps compare them, so each has a directory of its own.
PERFORMANCE_KEYS = ("trainer.compile", "trainer.activation_checkpointing")

Changes = Mapping[str, tuple[Any, Any]]  # changed keys of the config: their values in the checkpoint, and now

# Groups whose class cannot be replaced in the middle of a run, and those that make the model.
CLASSES = ("model", "attention", "embedding", "posenc", "optimizer", "data")
FIXED_KEYS = {
    "seed": "weights and order of the images began with the other seed",
    "data.image_size": "the images would be others",
    "data.channels": "the images would be others",
    "data.test_size": "its epochs were evaluated on other images",
    "data.validation_size": "its epochs were evaluated on other images",
}
FIXED_WITHIN_EPOCH_KEYS = ("trainer.batch_size", "data.train_size")


def check_changeable(changed: Changes, epoch: int, batch: int, directory: Path) -> None:
    """Raises ConfigError where a changed option can never change, or not after ``epoch`` epochs and ``batch`` steps."""
    for key, (then, now) in changed.items():
        group, _, option = key.partition(".")
        if option == "_target_" and group in CLASSES:
            raise cannot_resume(directory, {key: (then, now)}, f"its state is that of another {group}")
        if key in FIXED_KEYS:
            raise cannot_resume(directory, {key: (then, now)}, FIXED_KEYS[key])
        if key in FIXED_WITHIN_EPOCH_KEYS and batch:
            raise cannot_resume(directory, {key: (then, now)}, f"it stopped within epoch {epoch + 1}, whose batches it decides")
        if key == "trainer.epochs" and now < epoch + (batch > 0):
            done = f"{epoch} epochs" + (f" and {batch} steps" if batch else "")
            raise cannot_resume(directory, {key: (then, now)}, f"{done} are done already")


def cannot_resume(directory: Path, changed: Changes, reason: str) -> ConfigError:
    keys = ", ".join(f"{key} was {then} and is {now}" for key, (then, now) in changed.items())
    return ConfigError(
        f"trainer.resume=force cannot continue {directory} ({keys}): {reason}; keep the value, or start over with rerun=true"
    )


def changes_row(changed: Changes, epoch: int, batch: int) -> dict[str, Any]:
    """What results.json says of a run that was continued under another config, from where on."""
    return {"epochs_before": epoch, "steps_before": batch, "changed": {key: list(values) for key, values in changed.items()}}


def changed_keys(then: Mapping[str, Any], now: Mapping[str, Any], ignored: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Keys of two flat configs whose values differ, with both values (None where one lacks the key), sorted."""
    keys = sorted({*then, *now} - {*ignored})
    return {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}


START_ONLY_KEYS = ("rerun", "fail_fast", "trainer.resume")  # how a run is started


def run_name(choices: Mapping[str, Any], overrides: Sequence[str], seed: Any, images: str = "") -> str:
    """A run's directory below outputs/, which follows from what it is: ``vin,trainer.epochs=10/seed=1``.

    images: digest of an image set whose content its root decides; other images are another run, wherever they lie.

    It starts with the experiment, or the four parts of the model where there is none; then come the overrides that are not
    in it yet, in alphabetical order, so that the same run has the same directory however its command was written.
    """
    return "/".join(map(file_name, (",".join(run_name_parts(choices, overrides, images)), f"seed={seed}")))


def run_name_parts(choices: Mapping[str, Any], overrides: Sequence[str], images: str = "") -> list[str]:
    """The label of a run's model, and the overrides that are not in it yet."""
    experiment = choices.get("experiment")
    label = str(experiment or "-".join(str(choices.get(group)) for group in MODEL_GROUPS))
    in_name = {"experiment", "seed", *IGNORED_ON_RESUME, *(() if experiment else MODEL_GROUPS)}
    last = {override_key(override): canonical(override) for override in overrides}  # of two values the last one counts
    rest = {override for key, override in last.items() if key not in in_name and re.split(r"[./]", key)[0] != "hydra"}
    rest |= {f"images={images}"} if images else set()
    return [label, *sorted(rest - {DEFAULT_RECIPE})]


def file_name(text: str) -> str:
    """``text`` as a file name of at most 180 bytes, without what shells and paths give a meaning to."""
    name = re.sub(r"[^\w.,=+~\[\]-]+", "_", text)
    if len(name.encode()) > 180:  # file systems allow 255 bytes
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        name = name.encode()[:160].decode(errors="ignore") + "-" + digest
    return name


def git_commit() -> str | None:
    """The commit of this program, with ``-dirty`` where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
