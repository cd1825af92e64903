"""logger=mlflow and logger=wandb on their real local stores, and what all loggers have in common."""

import json
import logging
import struct
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from common import fit
from conftest import TINY, run_train
from omegaconf import DictConfig

from vix.build import parse
from vix.errors import ConfigError, UserError
from vix.reporting.logger import StoreLogger
from vix.training.trainer import Trainer

Compose = Callable[..., DictConfig]
SWEEP = ("-m", *TINY, "optimizer.lr=0.001,0.002")


def needs(package: str) -> Any:
    missing = find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install -r requirements-loggers.txt")


def results_by_lr(directory: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in directory.glob("outputs/*/*/results.json")]
    return {str(run["config"]["optimizer"]["lr"]): run for run in found}


@pytest.mark.slow
@needs("mlflow")
def test_a_sweep_in_mlflow(tmp_path: Path) -> None:
    """Two runs side by side in the SQLite file, with the axis as a parameter; a run that continues keeps its entry."""
    from mlflow import MlflowClient

    done = run_train(tmp_path, *SWEEP, "logger=mlflow")
    assert done.returncode == 0, done.stderr
    results = results_by_lr(tmp_path)
    # A run that stopped after its last epoch and is continued.
    for path in tmp_path.glob("outputs/*lr=0.002*/*/results.json"):
        path.write_text(json.dumps(results["0.002"] | {"status": "interrupted"}))
    assert run_train(tmp_path, *SWEEP, "logger=mlflow").returncode == 0

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'vix'")
    runs = {run.data.params["optimizer.lr"]: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == results.keys() == {"0.001", "0.002"}
    for lr, run in runs.items():
        assert run.info.status == "FINISHED"
        assert "mlflow.parentRunId" not in run.data.tags
        assert run.data.params["attention"] == "nystrom"
        assert run.data.params["seed"] == "0"
        history = results[lr]["history"]
        logged = client.get_metric_history(run.info.run_id, "accuracy/top1")
        assert [(metric.step, metric.value) for metric in logged] == [(row["epoch"], row["top1"]) for row in history]
        assert run.data.metrics["final/top1"] == results[lr]["top1"]
        pictures = {Path(artifact.path).name for artifact in client.list_artifacts(run.info.run_id, "test")}
        assert {"confusion_matrix.png", "worst_images.png"} <= pictures
    assert not list(tmp_path.glob("outputs/*/*/events.*"))


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block is too short for a record's header
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
@needs("wandb")
def test_a_sweep_in_wandb(tmp_path: Path) -> None:
    """Two offline runs in their directories, with the axis as a parameter and a value per epoch."""
    from wandb.proto.wandb_internal_pb2 import Record

    done = run_train(tmp_path, *SWEEP, "logger=wandb")
    assert done.returncode == 0, done.stderr
    results = results_by_lr(tmp_path)
    files = list(tmp_path.glob("outputs/*/*/wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    seen = set()
    for path in files:
        parameters: dict[str, Any] = {}
        top1: list[float] = []
        for data in wandb_records(path):
            record = Record()
            record.ParseFromString(data)
            parameters |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                top1 += [json.loads(item.value_json)] if name == "accuracy/top1" else []
        lr = str(parameters["optimizer.lr"])
        seen.add(lr)
        assert parameters["attention"] == "nystrom"
        assert top1 == [row["top1"] for row in results[lr]["history"]]
    assert seen == {"0.001", "0.002"}


def test_the_logger_is_not_part_of_a_run(compose_config: Compose) -> None:
    """The same run, whichever logger it has: the same directory, the same group of the report, and it may change on resume."""
    from vix.runs.identity import changed_keys, run_name
    from vix.runs.results import flatten

    overrides = ["experiment=quickstart", "logger=mlflow", "logger.uri=x"]
    assert run_name({"experiment": "quickstart"}, overrides, 0) == "quickstart/seed=0"
    configs = [flatten(dict(compose_config(*TINY, f"logger={name}").items())) for name in ("tensorboard", "mlflow")]
    assert configs[0] != configs[1]
    assert changed_keys(configs[0], configs[1], ()) == {}


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_one_line(compose_config: Compose, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"^logger: .* needs the package {name}: pip install -r requirements-loggers\.txt"):
        parse(compose_config(f"logger={name}")).logger  # noqa: B018


class Broken(StoreLogger):
    """Its store fails after ``works`` calls."""

    works = 0

    def open(self) -> None:
        self.scalars({}, 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.works -= 1
        if self.works < 0:
            raise ConnectionError("no route\nto host")


def test_a_store_that_fails_later_ends_no_run(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start it is an error in one line; later one warning, and the run is finished."""
    monkeypatch.setattr(Trainer.fit, "__defaults__", (Broken,))
    with pytest.raises(UserError, match=r"^logger: Broken cannot be used \(ConnectionError: no route to host\); fix the cause"):
        fit(compose_config(*TINY), tmp_path / "a")
    monkeypatch.setattr(Broken, "works", 2)
    with caplog.at_level(logging.WARNING):
        results, _ = fit(compose_config(*TINY), tmp_path / "b")
    assert results["status"] == "finished"
    assert sum("Broken is incomplete from here on" in message for message in caplog.messages) == 1
