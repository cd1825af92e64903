"""Snapshot of a run's directory before Hydra writes to it, so that a rejected start leaves no trace."""

import os
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

SAVED = ("config.yaml", "hydra.yaml", "overrides.yaml")  # written by Hydra into its subdirectory


@dataclass
class DirectoryState:
    """State of a run's directory before this start.

    made: directories that this start creates, deepest first.
    contents: contents of the files that this start overwrites; None for a file that it creates.
    log, log_size: the log file, to which this start appends, and its size in bytes; None where it creates the file.
    """

    made: list[Path]
    contents: dict[Path, bytes | None]
    log: Path
    log_size: int | None


before: DirectoryState | None = None


class DirectorySnapshot(Callback):
    """Hydra callback that records the state of a single run's directory, and keeps the result of an earlier search."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Hydra's hook, called before a sweep."""
        self.search_result = None
        with suppress(OSError):
            self.search_result = search_result_path(config).read_bytes()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Hydra's hook, called after a sweep: Optuna's plugin replaces the result of an earlier search in the directory."""
        path = search_result_path(config)
        if self.search_result is not None and path.exists() and path.read_bytes() != self.search_result:
            number = next(n for n in count(1) if not path.with_stem(f"{path.stem}-{n}").exists())
            path.with_stem(f"{path.stem}-{number}").write_bytes(self.search_result)

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Hydra's hook, called before it creates the directory of a single run."""
        take_snapshot(config, "hydra.run.dir")


def search_result_path(config: DictConfig) -> Path:
    """The file to which Optuna's plugin writes the best settings."""
    return Path(str(config.hydra.sweep.dir), "optimization_results.yaml")


def take_snapshot(config: DictConfig, *keys: str) -> None:
    """Record the state of the directory that Hydra will create.

    config: of the run, with Hydra's part.
    keys: of the directory, and of a subdirectory.
    """
    global before
    before = None
    hydra_config = HydraConfig.instance()
    earlier = hydra_config.cfg
    try:
        hydra_config.set_config(config)  # the interpolation of the directory's name needs it
        with suppress(Exception):  # Hydra reports the error when it creates the directory
            parts = [str(OmegaConf.select(config, key, throw_on_missing=True)) for key in keys]
            before = snapshot_directory(config, Path(os.path.abspath(os.path.join(*parts))))
    finally:
        hydra_config.cfg = earlier


def snapshot_directory(config: DictConfig, directory: Path) -> DirectoryState:
    """The state of a run's directory, which Hydra will create for this config."""
    subdir = config.hydra.output_subdir
    folder = directory / str(subdir) if subdir else directory
    paths = [directory / ".lock", *(folder / name for name in SAVED if subdir)]
    contents = {path: path.read_bytes() if os.path.lexists(path) else None for path in paths}
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    log = directory / f"{config.hydra.job.name}.log"
    return DirectoryState(made, contents, log, log.stat().st_size if os.path.lexists(log) else None)


def undo_start(locked: bool = False) -> None:
    """Remove what this start created in the directory of its run, and restore the files that it changed.

    locked: whether another process is writing there, or it may hold an earlier run; then only Hydra's files are restored.
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
        with suppress(OSError):  # not empty
            path.rmdir()
