"""The report, the comparison of two runs and the sweep, on result files that the real program wrote."""

import csv
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import HANGS, ROOT, TINY, run_train

from vix.cli.report import parse_arguments, report
from vix.errors import UserError
from vix.runs.results import filter_runs, find_runs, group_seeds

pytestmark = pytest.mark.xdist_group("report")  # one real run for all of them
PICTURES = ["accuracy_parameters.png", "accuracy_time.png", "figure4.png", "learning_curves.png"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a real run of two epochs."""
    directory = tmp_path_factory.mktemp("real")
    done = run_train(directory, *TINY)
    assert done.returncode == 0, done.stderr
    (path,) = directory.glob("outputs/*/*/results.json")
    return json.loads(path.read_text())


def write(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results))
    return results


def as_row(real: dict[str, Any], experiment: str, seed: int, *overrides: str, **fields: Any) -> dict[str, Any]:
    """The real run's results as those of a row of the paper with a seed."""
    words = [f"experiment={experiment}", f"seed={seed}", *overrides]
    parts = {"attention": "nystrom", "embedding": "linear", "posenc": "learned", "data": "cifar10"}
    config = {**real["config"], "seed": seed}
    return {**real, **parts, "experiment": experiment, "overrides": words, "seed": seed, "config": config, **fields}


def module(name: str, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vix", name, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=HANGS, check=False)


def report_rows(directory: Path, *arguments: str | Path) -> list[dict[str, str]]:
    """report.csv of a directory, after its report was made, in this process."""
    report(parse_arguments([str(directory), *map(str, arguments)]))
    with open(directory / "report.csv", newline="") as file:
        return list(csv.DictReader(file))


def first_paragraph(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a refused command: one line, no traceback, no result."""
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_mean_and_standard_deviation_over_seeds_and_the_best_of_all(real: dict[str, Any], tmp_path: Path) -> None:
    top1s, bests = [61.25, 63.5, 60.125], [62.0, 63.5, 66.75]
    for seed, (top1, best) in enumerate(zip(top1s, bests, strict=True)):
        fields = {"top1": top1, "top5": 90.0 + seed, "best_top1": best, "best_top5": 95.0 + seed, "seconds": 60.0 * (seed + 1)}
        write(tmp_path / f"vin/seed={seed}/results.json", as_row(real, "vin", seed, **fields))
    write(tmp_path / "vin/seed=0/previous-1/results.json", as_row(real, "vin", 7, top1=0.0))
    (row,) = report_rows(tmp_path)
    assert (row["experiment"], row["seeds"], row["epochs"]) == ("vin", "3", "2")
    assert float(row["top1"]) == pytest.approx(statistics.mean(top1s))
    assert float(row["top1_std"]) == pytest.approx(statistics.stdev(top1s))
    assert float(row["top5_std"]) == pytest.approx(1.0)
    assert (float(row["best_top1"]), float(row["best_top5"])) == (66.75, 97.0)
    assert float(row["minutes"]) == pytest.approx(2.0)
    assert float(row["published_top1"]) == 65.06
    assert float(row["top1_difference"]) == pytest.approx(66.75 - 65.06)
    assert float(row["params_difference"]) == real["weight_bias_params"] - 530970
    assert (row["gpu_gb"], row["gpu_difference"]) == ("", "")


def test_what_makes_another_line(real: dict[str, Any], tmp_path: Path) -> None:
    """Not how a run was evaluated and saved; the number of processes, whose speeds have no mean, does."""
    same = ((), ("trainer.checkpoint_every=50",), ("trainer.eval_batch_size=64",), ("optimizer.fused=true",))
    for seed, overrides in enumerate(same):
        row = as_row(real, "vin", seed, *overrides)
        row["config"] = {**row["config"], "trainer": {**row["config"]["trainer"], "checkpoint_every": 50 * bool(seed)}}
        write(tmp_path / f"{seed}/results.json", row)
    write(tmp_path / "8/results.json", as_row(real, "vin", 8, processes=8))
    groups, others = group_seeds(find_runs([tmp_path]))
    assert {len(group.runs): group.distinction.endswith("8 processes)") for group in groups} == {4: False, 1: True}
    assert not others


def test_runs_of_several_versions_are_named(real: dict[str, Any], tmp_path: Path) -> None:
    for seed, (name, commit) in enumerate((("vin", "a"), ("vin", "b"), ("vit", "a"), ("vit", "a"))):
        write(tmp_path / f"{seed}/results.json", as_row(real, name, seed, git_commit=commit))
    report_rows(tmp_path)
    assert "Averages of runs of several commits or versions of PyTorch (" in (tmp_path / "report.md").read_text()
    assert "shows which): vin." in (tmp_path / "report.md").read_text()


def test_runs_whose_config_changed_are_marked(real: dict[str, Any], tmp_path: Path) -> None:
    change = [{"epochs_before": 1, "steps_before": 0, "changed": {"trainer.epochs": [1, 2]}}]
    for seed in range(4):
        fields = {"config_changes": change} if seed < 2 else {}
        write(tmp_path / f"{seed}/results.json", as_row(real, "vin", seed, **fields))
    names = [(row["experiment"], row["seeds"]) for row in report_rows(tmp_path)]
    assert sorted(names) == [("vin", "2"), ("vin (resumed under another config)", "2")]


def test_seeds_that_ended_after_different_epochs(real: dict[str, Any], tmp_path: Path) -> None:
    """The mean of their numbers, and curves of those that reached an epoch."""
    for seed, epochs in enumerate((2, 2, 1)):
        write(tmp_path / f"{seed}/results.json", as_row(real, "vin", seed, epochs=epochs))
    (row,) = report_rows(tmp_path)
    assert float(row["epochs"]) == pytest.approx(5 / 3)
    assert "| 1.7 |" in (tmp_path / "report.md").read_text()
    from vix.reporting.plots import mean_curve

    means, deviations = mean_curve([[1, 2, 3], [3, 4], [5]])
    assert means == [3, 3, 3]
    assert deviations[:2] == pytest.approx([2, 2**0.5])
    assert math.isnan(deviations[2])


def test_initial_weights_are_one_wherever_they_are(real: dict[str, Any], tmp_path: Path) -> None:
    """Runs are grouped by the digest of the initial weights; groups of one path and different digests have different names."""
    for seed, (path, digest) in enumerate((("a", "1"), ("b", "1"), ("a", "2"))):
        row = as_row(real, "vin", seed, f"trainer.init_from={path}", init_weights=digest)
        row["config"] = {**row["config"], "trainer": {**row["config"]["trainer"], "init_from": path}}
        write(tmp_path / f"{seed}/results.json", row)
    groups, _ = group_seeds(find_runs([tmp_path]))
    assert {group.name: len(group.runs) for group in groups} == {
        "vin trainer.init_from=a (initial weights 1)": 2,
        "vin trainer.init_from=a (initial weights 2)": 1,
    }


def test_costs_of_inference_with_other_threads_are_not_averaged(real: dict[str, Any], tmp_path: Path) -> None:
    for seed, (threads, latency) in enumerate(((1, 2.0), (1, 4.0), (16, 200.0))):
        write(tmp_path / f"{seed}/results.json", as_row(real, "vin", seed))
        variant = {"latency_ms": latency, "latency_p95_ms": latency, "images_per_second": 1.0, "batches": []}
        write(tmp_path / f"{seed}/cost.json", {"device": "cpu", "precision": "fp32", "threads": threads, "eager": variant})
    (row,) = report_rows(tmp_path)
    assert (float(row["latency_ms"]), row["inference_on"]) == (3.0, "cpu, fp32, 1 CPU thread")


def test_costs_of_inference_on_two_devices_are_not_averaged(real: dict[str, Any], tmp_path: Path) -> None:
    for seed, (device, latency) in enumerate((("NVIDIA H200", 2.0), ("NVIDIA H200", 4.0), ("cpu", 200.0))):
        write(tmp_path / f"{seed}/results.json", as_row(real, "vin", seed))
        variant = {"latency_ms": latency, "latency_p95_ms": latency, "images_per_second": 1.0, "batches": []}
        write(tmp_path / f"{seed}/cost.json", {"device": device, "precision": "bf16", "eager": variant})
    (row,) = report_rows(tmp_path)
    assert (row["seeds"], float(row["latency_ms"]), row["inference_on"]) == ("3", 3.0, "NVIDIA H200, bf16")
    assert "with the lower latency, on NVIDIA H200, bf16." in (tmp_path / "report.md").read_text()


def test_what_is_printed(real: dict[str, Any], tmp_path: Path) -> None:
    for seed, top1 in enumerate((61.25, 63.5)):
        write(
            tmp_path / f"vin/seed={seed}/results.json", as_row(real, "vin", seed, top1=top1, peak_gpu_allocated_gb=1.5 + seed)
        )
    done = module("report", tmp_path, "--no-files")
    assert done.returncode == 0, done.stderr
    ours, papers = (line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["vin"])
    assert ours[:6] == ["vin", "2", "2", "62.38", "±", "1.59"]
    assert "2.50" in ours  # the larger of the two peaks
    assert papers[2] == "65.06"
    assert papers[-3:] == ["4.8", "−2.3", "86.62"]
    assert "AdamW" in done.stdout
    assert not (tmp_path / "report.md").exists()


def test_overrides_of_all_runs_are_printed_once(real: dict[str, Any], tmp_path: Path) -> None:
    """The table shows what differs; the CSV has complete names, and so has the report of a single group."""
    for name, dim in (("vin", 64), ("vit", 96)):
        write(tmp_path / f"{name}/results.json", as_row(real, name, 0, "trainer.epochs=10", f"model.dim={dim}"))
    done = module("report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "* All runs have trainer.epochs=10\n" in done.stdout
    assert done.stdout.count("trainer.epochs=10") == 1
    names = {line.split("  ")[1] for line in done.stdout.splitlines() if "model.dim" in line}
    assert names == {"vin model.dim=64", "vit model.dim=96"}
    assert (tmp_path / "report.md").read_text().count("trainer.epochs=10") == 1
    assert (tmp_path / "report.csv").read_text().count("trainer.epochs=10") == 2
    for name in "ab":
        override = f"trainer.init_from=my runs/{name}"
        write(tmp_path / f"spaces/{name}/results.json", as_row(real, "vin", 0, override))
    spaces = module("report", tmp_path / "spaces", "--no-files")
    assert "All runs have" not in spaces.stdout  # two overrides may have a word in common
    assert all(f"vin trainer.init_from=my runs/{name} " in spaces.stdout for name in "ab")
    alone = module("report", tmp_path / "vin", "--no-files")
    assert "All runs have" not in alone.stdout
    assert "vin model.dim=64 trainer.epochs=10" in alone.stdout


def test_a_real_run_has_no_published_figures_unless_it_is_a_row(real: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "a/seed=0/results.json", real)
    write(tmp_path / "b/seed=0/results.json", as_row(real, "vin", 0, "trainer.epochs=10"))
    write(tmp_path / "c/seed=0/results.json", as_row(real, "vin", 0, "model.dim=64"))
    write(tmp_path / "d/seed=0/results.json", as_row(real, "vin", 0, "data=digits"))
    write(tmp_path / "e/seed=0/results.json", as_row(real, "vit", 0, "attention.implementation=explicit"))
    for i, option in enumerate(("test_size=10", "train_size=1000", "folds=5", "root=elsewhere")):
        write(tmp_path / f"f{i}/seed=0/results.json", as_row(real, "mixer", 0, f"data.{option}"))
    rows = {row["experiment"]: row["published_top1"] for row in report_rows(tmp_path)}
    quickstart = next(name for name in rows if name.startswith("quickstart "))
    assert "trainer.epochs=2" in quickstart
    assert rows == {
        "vit attention.implementation=explicit": "56.81",
        "vin data=digits": "",
        "vin model.dim=64": "",
        "vin trainer.epochs=10": "65.06",
        "mixer": "60.33",  # the folder of the images does not matter
        "mixer data.test_size=10": "",
        "mixer data.train_size=1000": "",
        "mixer data.folds=5": "",
        quickstart: "",
    }


def test_runs_that_are_not_seeds_of_one_another_are_apart(real: dict[str, Any], tmp_path: Path) -> None:
    changed = {**real["config"], "optimizer": {**real["config"]["optimizer"], "lr": 0.5}}
    changed["trainer"] = {k: v for k, v in real["config"]["trainer"].items() if k != "mirror_eval"}  # which is off
    write(tmp_path / "a/results.json", as_row(real, "vin", 0))
    write(tmp_path / "b/results.json", as_row(real, "vin", 1, device="H200", precision="bf16"))
    write(tmp_path / "c/results.json", as_row(real, "vin", 2, config=changed))
    assert {row["experiment"] for row in report_rows(tmp_path)} == {
        f"vin (cpu, fp32) (optimizer.lr={real['config']['optimizer']['lr']})",
        "vin (cpu, fp32) (optimizer.lr=0.5)",
        "vin (H200, bf16)",
    }


def test_a_seed_that_was_run_twice_counts_once(real: dict[str, Any], tmp_path: Path) -> None:
    for name, top1, written in (("older", 10.0, 1000), ("newer", 20.0, 2000)):
        write(tmp_path / name / "results.json", as_row(real, "vin", 0, top1=top1))
        os.utime(tmp_path / name / "results.json", (written, written))
    (row,) = report_rows(tmp_path)
    assert (row["seeds"], float(row["top1"])) == ("1", 20.0)
    assert "newer run of the same seed" in (tmp_path / "report.md").read_text()


def test_other_files_are_listed_and_do_not_disturb(real: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "good/results.json", real)
    whole = json.dumps(real)
    for name, text in {
        "half": whole[: len(whole) // 2],
        "empty": "",
        "list": "[1, 2]",
        "foreign": '{"accuracy": 1}',
        "text": whole.replace(f'"top1": {real["top1"]}', '"top1": "high"', 1),
        "nan": whole.replace(f'"top1": {real["top1"]}', '"top1": NaN', 1),
        "failed": json.dumps({**real, "status": "failed", "error": "CUDA [out of] memory | sorry"}),
        "refused": json.dumps({**real, "status": "refused", "error": "attention.heads=3 is wrong"}),
        "interrupted": json.dumps({**real, "status": "interrupted", "epochs": 1}),
        "running": json.dumps({"status": "running", "name": "x"}),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "results.json").write_bytes(b"\xff\xfe\x00")
    done = module("report", tmp_path)
    assert done.returncode == 0, done.stderr
    status = {}
    for line in done.stdout.partition("Not in the table")[2].splitlines():
        if line.strip().startswith(str(tmp_path)):
            path, said, *_ = line.split()
            status[Path(path).name] = said
    assert status == {
        **dict.fromkeys(("half", "empty", "binary"), "unreadable"),
        **dict.fromkeys(("list", "foreign", "text", "nan"), "foreign"),
        **{name: name for name in ("failed", "refused", "interrupted", "running")},
    }
    assert "CUDA [out of] memory | sorry" in done.stdout
    assert "epochs done: 1" in done.stdout
    with open(tmp_path / "report.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 1


def cpu_seconds(directory: Path) -> tuple[float, str]:
    """The processor's time, files and pictures included, that a report takes: what else this machine does is not in it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = module("report", directory)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def test_a_thousand_runs_take_little_longer_than_one(real: dict[str, Any], tmp_path: Path) -> None:
    """Measured: 2 times as long, which is 3 s."""
    write(tmp_path / "one/seed=0/results.json", as_row(real, "vin", 0))
    one, _ = cpu_seconds(tmp_path / "one")
    history = [{**real["history"][0], "epoch": epoch} for epoch in range(1, 41)]
    for i in range(1000):
        lr, seed = f"optimizer.lr={i // 5 + 1}e-5", i % 5
        write(tmp_path / "all" / lr / f"seed={seed}/results.json", as_row(real, "vin", seed, lr, history=history))
    thousand, output = cpu_seconds(tmp_path / "all")
    assert thousand < 5 * one
    assert sorted(p.name for p in (tmp_path / "all").glob("*.png")) == PICTURES
    assert sum(line.strip().startswith("vin optimizer.lr=") for line in output.splitlines()) == 400  # two tables


def test_nothing_here_imports_torch() -> None:
    modules = "vix.__main__, vix.cli.report, vix.reporting.plots, vix.cli.diff"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_filters_and_sorting(real: dict[str, Any], tmp_path: Path) -> None:
    for name, top1, parts in (("vin", 30.0, {}), ("vip", 40.0, {"attention": "performer"}), ("vil", 20.0, {})):
        write(tmp_path / name / "results.json", as_row(real, name, 0, top1=top1, **parts))

    def names(*arguments: str) -> list[str]:
        done = module("report", tmp_path, "--no-files", *arguments)
        assert done.returncode == 0, done.stderr
        table = done.stdout.partition("Comparison with the paper")[0].splitlines()
        return [line.split()[0] for line in table if line.split()[:1] in (["vin"], ["vip"], ["vil"])]

    assert names() == ["vip", "vil", "vin"]  # the paper's order
    assert names("--sort", "top1") == ["vil", "vin", "vip"]
    assert names("--sort", "-top1") == ["vip", "vin", "vil"]
    assert names("--sort", "gpu_gb") == ["vip", "vil", "vin"]  # no values: as before
    assert names("--sort", "-experiment") == ["vip", "vin", "vil"]
    assert names("--where", "attention=performer") == ["vip"]
    assert names("--where", "attention=nystrom", "--where", "experiment=vin") == ["vin"]
    assert len(names("--where", "optimizer.betas=[0.9,0.999]", "--where", "rerun=False")) == 3
    assert len(names("--where", "optimizer.lr=1e-3", "--where", "trainer.clip_norm=null", "--where", "rerun=false")) == 3


def test_an_option_that_a_run_predates_is_null(real: dict[str, Any], tmp_path: Path) -> None:
    for name, data in (("old", {}), ("new", {"folds": None}), ("folds", {"folds": 5})):
        config = {**real["config"], "data": data}
        write(tmp_path / name / "results.json", as_row(real, "vin", 0) | {"config": config})
    found = filter_runs(find_runs([tmp_path]), ["data.folds=null"])
    assert sorted(run.path.parent.name for run in found) == ["new", "old"]
    with pytest.raises(UserError, match="no run matches"):
        filter_runs(find_runs([tmp_path]), ["data.folds=3"])


def test_wrong_arguments_are_reported_in_one_line(real: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "outputs/vin/results.json", as_row(real, "vin", 0))
    outputs = tmp_path / "outputs"
    line = first_paragraph(module("report", outputs, "--sort", "top55"))
    assert "top5?" in line
    assert "images_per_second" in line
    assert "outputs" in first_paragraph(module("report", tmp_path / "outptus"))
    assert "trainer.epochs" in first_paragraph(module("report", outputs, "--where", "epochz=3"))
    assert "nystrom" in first_paragraph(module("report", outputs, "--where", "attention=softmax"))
    assert "KEY=VALUE" in first_paragraph(module("report", outputs, "--where", "attention"))
    (tmp_path / "file").touch()
    done = module("report", outputs, "--out", tmp_path / "file")
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_without_finished_runs_there_are_no_footnotes(real: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "a/results.json", {**real, "status": "failed", "error": "no memory"})
    done = module("report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:4] == ["Not", "in", "the", "table"]
    assert "One line per run" not in done.stdout


def test_an_empty_directory_is_no_error(tmp_path: Path) -> None:
    done = module("report", tmp_path)
    assert done.returncode == 0
    assert "No results.json" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_files_and_pictures(real: dict[str, Any], tmp_path: Path) -> None:
    from matplotlib.image import imread

    for experiment in ("vin", "vip"):
        for seed in range(2):
            write(tmp_path / f"runs/{experiment}/seed={seed}/results.json", as_row(real, experiment, seed))
    done = module("report", tmp_path / "runs", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == PICTURES
    text = (tmp_path / "out/report.md").read_text()
    for name in PICTURES:
        image = imread(tmp_path / "out" / name)
        assert min(image.shape[:2]) > 400
        assert image.var() > 0.001
        assert f"]({name})" in text
    assert "| vin | 2 |" in text


def test_memory_pictures_show_runs_on_a_gpu(real: dict[str, Any], tmp_path: Path) -> None:
    from matplotlib.image import imread

    without, with_gpu = tmp_path / "a", tmp_path / "b"
    write(without / "vin/results.json", as_row(real, "vin", 0, best_top1=64.0))
    write(with_gpu / "vin/results.json", as_row(real, "vin", 0, best_top1=64.0, peak_gpu_allocated_gb=1.0))
    for directory in (without, with_gpu):
        assert module("report", directory).returncode == 0
    assert not (without / "accuracy_memory.png").exists()
    assert imread(with_gpu / "accuracy_memory.png").var() > 0.001
    assert (without / "figure4.png").read_bytes() != (with_gpu / "figure4.png").read_bytes()


def test_pareto_front() -> None:
    from vix.reporting.plots import pareto_front

    assert pareto_front([(2, 50), (1, 40), (1, 30), (3, 45), (4, 60), (2, 50)]) == [(1, 40), (2, 50), (4, 60)]


def test_diff(real: dict[str, Any], tmp_path: Path) -> None:
    config = {**real["config"], "seed": 1, "optimizer": {**real["config"]["optimizer"], "lr": 0.5}}
    history = [real["history"][0], {**real["history"][1], "top1": 1.0}]
    other = {**real, "config": config, "seed": 1, "torch": "3.0", "top1": real["top1"] + 2, "history": history}
    write(tmp_path / "a/results.json", real)
    write(tmp_path / "b/results.json", other)
    done = module("diff", tmp_path / "a", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    assert table["optimizer.lr"] == ["0.001", "0.5", "+0.499"]
    assert table["seed"] == ["0", "1", "+1"]
    assert table["torch"] == [real["torch"], "3.0"]
    assert table["top1"][-1] == "+2"
    assert "top5" not in table
    assert "from epoch 2 on" in done.stdout
    same = module("diff", tmp_path / "a", tmp_path / "a")
    assert same.stdout.count("no difference") == 3
    assert "all epochs that both runs have (2)" in same.stdout


def test_diff_of_what_is_no_run(real: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "vin/seed=0/results.json", real)
    (tmp_path / "half").mkdir()
    (tmp_path / "half/results.json").write_text(json.dumps(real)[:100])
    run = tmp_path / "vin/seed=0"
    assert "no such directory" in first_paragraph(module("diff", run, tmp_path / "vim"))
    assert "seed=0" in first_paragraph(module("diff", tmp_path / "vin", run))
    assert "unreadable" in first_paragraph(module("diff", run, tmp_path / "half"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program without its outputs/, so that a sweep's go elsewhere than into the user's."""
    directory = tmp_path_factory.mktemp("copy")
    for name in ("vix", "conf"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "sweep.sh"):
        shutil.copy(ROOT / name, directory)
    return directory


def sweep(copy: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``./sweep.sh`` with this Python as ``python``."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(copy / "sweep.sh"), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=HANGS, check=False)


def test_sweep_help(copy: Path, tmp_path: Path) -> None:
    done = sweep(copy, tmp_path, "--help")
    assert done.returncode == 0
    assert "./sweep.sh table1 seed=0,1,2 trainer.epochs=10" in done.stdout
    assert sweep(copy, tmp_path).returncode != 0


@pytest.mark.slow
def test_sweep_runs_and_reports_from_anywhere(copy: Path, tmp_path: Path) -> None:
    done = sweep(copy, tmp_path, *TINY, "seed=0,1")
    assert done.returncode == 0, done.stderr
    assert len(list(copy.glob("outputs/*/seed=?/results.json"))) == 2
    assert sorted(p.name for p in (copy / "outputs").glob("*.png")) == PICTURES
    (line,) = (line for line in done.stdout.splitlines() if line.strip().startswith("quickstart ") and "±" in line)
    assert "trainer.epochs=2" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_failed_sweep_reports_and_fails(copy: Path, tmp_path: Path) -> None:
    done = sweep(copy, tmp_path, *TINY, "attention.landmarks=4,1000", f"hydra.sweep.dir={tmp_path}/here")
    assert done.returncode != 0
    assert "Not in the table" in done.stdout
    assert "refused" in done.stdout
    assert (tmp_path / "here/report.csv").exists()


def test_sweep_names_what_a_table_lacks(copy: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(copy, tmp_path / "copy", ignore=shutil.ignore_patterns("outputs"))
    (directory / "conf/experiment/vip.yaml").unlink()
    done = sweep(directory, tmp_path, "table1")
    assert done.returncode != 0
    assert done.stderr.splitlines() == ["error: table1: conf/experiment/ lacks a file for: vip"]
    assert "table5" in sweep(directory, tmp_path, "table9").stderr


@pytest.mark.parametrize("table", ["table1", "table2", "table3", "table4", "table5", "all"])
def test_a_table_is_its_published_rows(copy: Path, tmp_path: Path, table: str) -> None:
    """With a stand-in for train.py that prints its arguments: the tables' 38 runs would take days here."""
    directory = shutil.copytree(copy, tmp_path / "copy", ignore=shutil.ignore_patterns("outputs"))
    (directory / "train.py").write_text("import sys; print(sys.argv[1:])")
    (directory / "outputs").mkdir()
    with open(ROOT / "vix" / "runs" / "published.csv", newline="") as file:
        rows = [row["experiment"] for row in csv.DictReader(file) if table in ("all", f"table{row['table']}")]
    done = sweep(directory, tmp_path, table, "seed=0,1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(["-m", f"experiment={','.join(rows)}", "seed=0,1"])


def test_links_are_followed_and_only_runs_that_were_moved_aside_are_left_out(real: dict[str, Any], tmp_path: Path) -> None:
    """A run is counted once, however many links lead to it and though they form a circle; a user's previous-… is a folder."""
    for seed, place in enumerate(("elsewhere/run", "outputs/previous-2/run", "outputs/previous-best", "outputs/vin/seed=3")):
        write(tmp_path / place / "results.json", as_row(real, "vin", seed))
    write(tmp_path / "outputs/vin/seed=3/previous-1/results.json", as_row(real, "vin", 8))
    (tmp_path / "outputs/vin/seed=4/.hydra").mkdir(parents=True)  # a run that was killed as it began again
    write(tmp_path / "outputs/vin/seed=4/previous-10/results.json", as_row(real, "vin", 9))
    (tmp_path / "outputs/a_link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "outputs/another").symlink_to(tmp_path / "elsewhere/run")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "outputs")
    (tmp_path / "outputs/itself").symlink_to("itself")
    (tmp_path / "outputs/gone").symlink_to("absent")
    (row,) = report_rows(tmp_path / "outputs")
    assert row["seeds"] == "4"
    assert "Not in the table" not in (tmp_path / "outputs/report.md").read_text()


def test_another_report_is_not_overwritten(real: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "vin/results.json", as_row(real, "vin", 0))
    (tmp_path / "report.md").write_text("# Mine")
    with pytest.raises(UserError, match=r"report\.md: is not a report of this command; choose another directory with --out"):
        report_rows(tmp_path)
    assert (tmp_path / "report.md").read_text() == "# Mine"
    (tmp_path / "report.md").unlink()
    (tmp_path / "report.csv").write_text("mine")
    with pytest.raises(
        UserError, match=r"report\.csv: is not of a report of this command; choose another directory with --out"
    ):
        report_rows(tmp_path)
    assert (tmp_path / "report.csv").read_text() == "mine"
    (tmp_path / "report.csv").unlink()
    assert report_rows(tmp_path) == report_rows(tmp_path)
    written = (tmp_path / "report.md").read_text()
    for edited in (f"{written}notes", written.replace("# Report", "# Report of May", 1)):
        (tmp_path / "report.md").write_text(edited)
        with pytest.raises(
            UserError, match=r"report\.md: was edited, and would be replaced; move it elsewhere, choose another"
        ):
            report_rows(tmp_path)
        assert (tmp_path / "report.md").read_text() == edited
    (tmp_path / "report.md").write_text("# Report\n\nas an earlier version wrote it")
    assert report_rows(tmp_path)
