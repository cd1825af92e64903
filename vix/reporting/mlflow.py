"""MLflow: runs in a tracking store, by default a local SQLite file."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vix.reporting.logger import LoggedRun, StoreLogger, hyperparameters

MAX_PARAMS = 100  # of one call


class MLflow(StoreLogger):
    """One run of the store per run of this program, with the config as parameters; the jobs of a sweep are not nested.

    uri: of the tracking store: sqlite:///FILE, a directory, or the address of a server.
    experiment: name of the experiment in the store, which is created if absent.
    """

    package = "mlflow"

    def __init__(self, logged: LoggedRun, *, uri: str = "sqlite:///mlflow.db", experiment: str = "vix") -> None:
        super().__init__(logged)
        self.uri, self.experiment = uri, experiment

    def open(self) -> None:
        import mlflow
        from mlflow.entities import Param

        self.client = mlflow.MlflowClient(tracking_uri=self.uri)
        self.id = self.store_id or ""
        if self.id:
            self.client.update_run(self.id, status="RUNNING")
            return
        name = str(self.run.identity.get("name"))
        self.id = self.client.create_run(self.experiment_id(), run_name=name).info.run_id
        self.keep_id(self.id)
        parameters = [Param(key, str(value)) for key, value in hyperparameters(self.run).items()]
        for start in range(0, len(parameters), MAX_PARAMS):
            self.client.log_batch(self.id, params=parameters[start : start + MAX_PARAMS])

    def experiment_id(self) -> str:
        """The id of the experiment. Several jobs of a sweep may create it at the same time."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            file = self.uri.removeprefix("sqlite:///")
            folder = Path(file).resolve().with_name("mlartifacts").as_uri() if file != self.uri else None
            try:
                return str(self.client.create_experiment(self.experiment, artifact_location=folder))
            except MlflowException:
                found = self.client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        return str(found.experiment_id)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(name, float(value), now, step) for name, value in values.items()])

    def pictures(self, drawn: Mapping[str, np.ndarray], step: int) -> None:
        for name, picture in drawn.items():
            self.client.log_image(self.id, picture, artifact_file=f"{name}.png")

    def close(self) -> None:
        self.client.set_terminated(self.id, status="FINISHED" if self.ended else "KILLED")
