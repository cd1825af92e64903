"""What was in a run's directory before Hydra began to write there, so that a refused start leaves everything as it was."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

SAVED = ("config.yaml", "hydra.yaml", "overrides.yaml")  # by Hydra, in its folder


@dataclass
class DirectoryState:
    """State of a run's directory before this start.

    made: the directories that this start makes, deepest first.
    contents: of the files that it writes; None for one that it makes.
    log, log_size: the log, which it appends to, and its bytes; None where it makes it.
    """

    made: list[Path]
    contents: dict[Path, bytes | None]
    log: Path
    log_size: int | None


before: DirectoryState | None = None  # of the single run that this process starts


class DirectorySnapshot(Callback):
    """Hydra's callback: notes the state of a single run's directory. Jobs of a sweep keep theirs, with the reason."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        global before
        before = None
        hydra_config = HydraConfig.instance()
        earlier = hydra_config.cfg
        try:
            hydra_config.set_config(config)  # the directory's name asks it for the overrides
            with suppress(Exception):  # what is wrong with it is said when Hydra makes it; nothing is removed then
                before = snapshot_directory(config)
        finally:
            hydra_config.cfg = earlier


def snapshot_directory(config: DictConfig) -> DirectoryState:
    """What is there before Hydra makes the directory of this config."""
    directory = Path(os.path.abspath(str(config.hydra.run.dir)))
    subdir = config.hydra.output_subdir
    folder = directory / str(subdir) if subdir else directory
    paths = [directory / ".lock", *(folder / name for name in SAVED if subdir)]
    contents = {path: path.read_bytes() if os.path.lexists(path) else None for path in paths}
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    log = directory / f"{config.hydra.job.name}.log"
    return DirectoryState(made, contents, log, log.stat().st_size if os.path.lexists(log) else None)


def undo_start(locked: bool = False) -> None:
    """Remove what this start has made in the directory of its run, and give what it has changed its old contents.

    locked: whether another process writes there at this moment; then only Hydra's files get their old contents.
    """
    if before is None:
        return
    for path, contents in before.contents.items():
        with suppress(OSError):
            if contents is None and not locked:
                path.unlink(missing_ok=True)
            elif contents is not None and path.name != ".lock" and path.read_bytes() != contents:
                path.write_bytes(contents)
    if locked:
        return
    with suppress(OSError):
        if before.log_size is None:
            before.log.unlink(missing_ok=True)
        elif before.log.stat().st_size > before.log_size:
            os.truncate(before.log, before.log_size)
    for path in before.made:
        with suppress(OSError):  # something else is in there: it stays
            path.rmdir()
