"""Weights & Biases: by default offline, in the run's directory; ``wandb sync`` uploads it later."""

import uuid
from collections.abc import Mapping
from typing import Literal

import numpy as np

from vix.reporting.logger import LoggedRun, StoreLogger, hyperparameters


class WandB(StoreLogger):
    """One run of W&B per run of this program, with the config as parameters; it keeps its id when the run is continued.

    project: name of the project.
    mode: offline, online, or disabled.
    """

    package = "wandb"

    def __init__(
        self, logged: LoggedRun, *, project: str = "vix", mode: Literal["offline", "online", "disabled"] = "offline"
    ) -> None:
        super().__init__(logged)
        self.project, self.mode = project, mode

    def open(self) -> None:
        import wandb

        store_id = self.store_id or uuid.uuid4().hex[:8]
        self.keep_id(store_id)
        self.store = wandb.init(
            project=self.project,
            mode=self.mode,
            dir=str(self.run.directory),
            id=store_id,
            name=str(self.run.identity.get("name")),
            resume="allow",
            reinit="create_new",
            config=dict(hyperparameters(self.run)),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.store.log(dict(values), step=step)

    def pictures(self, drawn: Mapping[str, np.ndarray], step: int) -> None:
        import wandb

        self.store.log({name: wandb.Image(picture) for name, picture in drawn.items()}, step=step)

    def close(self) -> None:
        self.store.finish(exit_code=0 if self.ended else 1)
