"""Several runs at once, and a search: the launchers and the sweeper of conf/hydra/, with the real program.

Their plugins are optional (requirements-launchers.txt); without them these tests are skipped.
"""

import json
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, run_train
from omegaconf import OmegaConf

from vix.system.signals import SignalHandler

# Option of hydra/launcher, its plugin, and what it needs on a machine with two cores and no GPU.
LAUNCHERS = [
    ("cores", "vix_cores", ("hydra.launcher.n_jobs=2",)),
    pytest.param(
        "ray_gpus",
        "hydra_ray_launcher",
        ("hydra.launcher.ray.remote.num_gpus=0", "+hydra.launcher.ray.init.num_cpus=2"),
        marks=pytest.mark.slow,
    ),
    pytest.param("slurm_rehearsal", "hydra_submitit_launcher", (), marks=pytest.mark.slow),
]


def need(plugin: str) -> None:
    if not find_spec("hydra_plugins") or not find_spec(f"hydra_plugins.{plugin}"):
        pytest.skip(f"{plugin} is not installed: pip install -r requirements-launchers.txt")


def all_results(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("outputs/*/*/results.json"))]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "plugin", "options"), LAUNCHERS)
def test_runs_at_once(tmp_path: Path, launcher: str, plugin: str, options: tuple[str, ...]) -> None:
    """Every run finishes in a directory of its own; one that is refused says so there, in the end, and by the exit status."""
    need(plugin)
    landmarks = "8,1000" if launcher == "cores" else "8,16"  # 1000 is refused
    sweep = ("-m", f"hydra/launcher={launcher}", *options, *TINY, f"attention.landmarks={landmarks}")
    done = run_train(tmp_path, *sweep, fresh=True, RAY_USAGE_STATS_ENABLED="0")
    states = {r["config"]["attention"]["landmarks"]: (r["status"], r.get("epochs")) for r in all_results(tmp_path)}
    assert "jobs of this sweep" in done.stdout
    if launcher == "cores":
        assert states == {8: ("finished", 2), 1000: ("refused", None)}, done.stdout + done.stderr
        assert done.returncode == 1
        assert "error: 1 of this sweep's jobs did not finish" in done.stderr
    else:
        assert states == {8: ("finished", 2), 16: ("finished", 2)}, done.stdout + done.stderr
        assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_directory_that_cannot_be_made_ends_no_other_job(tmp_path: Path) -> None:
    """Also where a launcher's processes import its own module first."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o/seed=0").symlink_to(tmp_path / "absent/seed=0")
    sweep = ("-m", "hydra/launcher=joblib_cores", "hydra.launcher.n_jobs=2", "seed=0,1")
    folders = ("hydra.sweep.dir=o", "hydra.sweep.subdir=seed=${seed}")
    done = run_train(tmp_path, *sweep, *TINY, *folders, fresh=True, COLUMNS="300")
    assert json.loads((tmp_path / "o/seed=1/results.json").read_text())["status"] == "finished"
    assert done.returncode == 1
    assert "o/seed=0: File exists; fix the cause" in done.stdout
    assert done.stderr.splitlines()[-1] == "error: 1 of this sweep's jobs did not finish"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "plugin", "options"), LAUNCHERS)
def test_the_launchers_processes_compose_as_the_program_does(
    tmp_path: Path, launcher: str, plugin: str, options: tuple[str, ...]
) -> None:
    """What a file may not set is refused in its job, and another mixer leaves an experiment's options behind."""
    need(plugin)
    experiments = tmp_path / "mine" / "experiment"
    experiments.mkdir(parents=True)
    header = "# @package _global_\ndefaults:\n  - override /data: digits\n  - override /embedding: linear\n"
    (experiments / "evil.yaml").write_text(f"{header}hydra: {{job: {{env_set: {{A: b}}}}}}\n")
    (experiments / "good.yaml").write_text(f"{header}  - override /attention: nystrom\nattention: {{landmarks: 4}}\n")
    small = [setting for setting in TINY if not setting.startswith("experiment=")]
    sweep = ("--config-dir=mine", "-m", f"hydra/launcher={launcher}", *options, *small, "experiment=evil,good")
    done = run_train(tmp_path, *sweep, "attention=performer", RAY_USAGE_STATS_ENABLED="0")
    assert done.returncode == 1
    results = {r["experiment"]: r for r in all_results(tmp_path)}
    assert {name: r["status"] for name, r in results.items()} == {"evil": "refused", "good": "finished"}, (
        done.stdout + done.stderr
    )
    assert "evil.yaml:5: hydra.job.env_set" in results["evil"]["error"]
    assert "landmarks" not in results["good"]["config"]["attention"]
    assert f"--config-dir {tmp_path}/mine" in results["good"]["command"]


def test_a_missing_plugin_is_reported(tmp_path: Path) -> None:
    done = run_train(tmp_path, "-m", "hydra/launcher=nosuch", *TINY)
    assert done.returncode == 1
    assert "hydra/launcher=nosuch: no such option, or its plugin is not installed: pip install -r" in done.stderr


@pytest.mark.slow
def test_search(tmp_path: Path) -> None:
    """Five trials; the best of them is printed with its settings."""
    need("hydra_optuna_sweeper")
    free = [setting for setting in TINY if not setting.startswith("model.dim")]
    search = (
        "-m",
        "hydra/sweeper=optuna_search",
        "hydra.sweeper.n_trials=5",
        *free,
        "model.dim=16,32",
        "attention.landmarks=8,16",
    )
    done = run_train(tmp_path, *search)
    assert done.returncode == 0, done.stderr
    trials = all_results(tmp_path)
    assert [trial["status"] for trial in trials] == ["finished"] * 5
    assert len({trial["config"]["optimizer"]["lr"] for trial in trials}) == 5
    assert all(1e-4 <= trial["config"]["optimizer"]["lr"] <= 1e-2 for trial in trials)
    best: Any = OmegaConf.load(tmp_path / "outputs" / "optimization_results.yaml")
    assert best.best_value == max(trial["top1"] for trial in trials)
    assert set(best.best_params) == {"optimizer.lr", "model.dim", "attention.landmarks"}
    first = (tmp_path / "outputs" / "optimization_results.yaml").read_bytes()
    # Another search in the same directory, of whose trials some are refused.
    again = run_train(tmp_path, *search[:-1], "attention.landmarks=1000,16", "trainer.epochs=1")
    assert again.returncode == 0, again.stderr
    assert "trials did not finish, and were not chosen" in again.stderr
    assert OmegaConf.load(tmp_path / "outputs" / "optimization_results.yaml").best_params["attention.landmarks"] == 16
    assert (tmp_path / "outputs" / "optimization_results-1.yaml").read_bytes() == first
    assert (tmp_path / "outputs" / "optimization_results.yaml").read_bytes() != first


@pytest.mark.slow
def test_search_for_a_recipe(tmp_path: Path) -> None:
    """Trials differ in optimizer, rate, decay, regularization and augmentation, and none sees the test images."""
    need("hydra_optuna_sweeper")
    search = ("-m", "hydra/sweeper=optuna_recipe", "hydra.sweeper.n_trials=3", *TINY, "recipe=modern")
    done = run_train(tmp_path, *search, "trainer.warmup_epochs=1.0", "data.validation_size=100")
    assert done.returncode == 0, done.stderr
    trials = all_results(tmp_path)
    assert [(trial["status"], trial["tested_on"]) for trial in trials] == [("finished", "validation")] * 3
    assert all(trial["recipe"] == "modern" for trial in trials)
    for key in ("lr", "weight_decay"):
        assert len({trial["config"]["optimizer"][key] for trial in trials}) == 3
    best: Any = OmegaConf.load(tmp_path / "outputs" / "optimization_results.yaml")
    assert best.best_value == max(trial["top1"] for trial in trials)
    searched = {"optimizer", "optimizer.lr", "augment.flip", "augment.cutmix", "model.layer_scale", "model.stochastic_depth"}
    assert searched <= set(best.best_params)


def test_a_thread_may_ask_for_stops() -> None:
    """Only the main thread hears signals; in another one a run works without."""
    reached = []

    def enter() -> None:
        with SignalHandler() as stop:
            reached.append(stop.signal)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert reached == [None]
