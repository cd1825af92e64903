"""README.md and docs/ agree with the tree: figures with kept measurements, commands with options, paths with files."""

import argparse
import ast
import csv
import importlib
import json
import re
import shlex
import statistics
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from hydra.types import RunMode
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from test_config import GROUPS, OWN_MIXER

from benchmarks import accuracy, compact
from benchmarks.crossover import crossover, curve
from benchmarks.rows import estimated_bytes
from benchmarks.scaling import ORDER
from benchmarks.variants import MODELS
from vix.__main__ import COMMANDS
from vix.__main__ import main as vix_main
from vix.analysis.model_summary import summarize
from vix.build import parse
from vix.cli.plan import expand
from vix.composition.command import parse_command
from vix.composition.compose import compose, compose_with_hydra, format_error, is_hydra_error
from vix.errors import UserError
from vix.runs.results import find_runs

PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES["README.md"]
PARTS = (
    *("adamw", "mixup_cutmix", "no_trivial_augment", "no_stochastic_depth", "no_label_smoothing", "no_layer_scale"),
    *("no_ema", "random_flip"),
)
PUBLISHED = list(csv.DictReader((ROOT / "vix/runs/published.csv").open()))


def table(page: str, heading: str) -> list[list[str]]:
    """Cells, without code marks, of a page's table below the row that starts with ``heading``."""
    lines = PAGES[page].split(f"| {heading} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")] for line in lines]


def measurement(name: str, machine: str = "amd-epyc") -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}-{machine}-2-threads.json").read_text())


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every code block in this language."""
    return [
        (page, block) for page, text in PAGES.items() for block in re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    ]


# Tables and figures


def test_published_rows() -> None:
    expected = [
        [
            *(row[key] for key in ("experiment", "table", "name", "published_top1", "published_top5", "published_gpu_gb")),
            *(f"{int(row[key]):,}" for key in ("weight_bias_params", "trainable_params")),
        ]
        for row in PUBLISHED
    ]
    assert table("docs/published-results.md", "`experiment=`") == expected
    assert len(expected) == 38


@pytest.mark.parametrize("experiment", ["pil", "hybrid_pil"])
def test_rows_that_were_not_published(experiment: str) -> None:
    counted = summarize(parse(compose([f"experiment={experiment}"]))).weight_bias_params
    assert f"{counted:,}" in PAGES["docs/published-results.md"]


def test_groups_and_their_options() -> None:
    documented = {group: set(options.split(", ")) for group, options, _ in table("README.md", "group")}
    experiments = {option.strip() for option in documented.pop("experiment")}
    assert documented == {
        group: {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} for group in (*GROUPS, "recipe")
    }
    rows = {row["experiment"] for row in PUBLISHED}
    assert {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")} == rows | experiments - {
        "the 38 published rows"
    }


@pytest.mark.parametrize(("experiment", "published"), [("cpu_vit", "vit"), ("cpu_hybrid_vin", "hybrid_vin")])
def test_cpu_results(experiment: str, published: str) -> None:
    """The measured table, and the experiment's own header, agree with the kept runs."""
    runs = [json.loads(path.read_text()) for path in (ROOT / "results/cpu").glob(f"{experiment}/*/results.json")]
    assert sorted(run["seed"] for run in runs) == [0, 1, 2]
    assert {run["status"] for run in runs} == {"finished"}
    last = [run["top1"] for run in runs]
    (cells,) = (row[1:] for row in table("README.md", "on a CPU") if row[0] == experiment)
    assert cells == [
        f"{statistics.mean(last):.2f} ± {statistics.stdev(last):.2f}",
        f"{max(run['best_top1'] for run in runs):.2f}",
        f"{runs[0]['trainable_params']:,}",
        f"{statistics.mean(run['seconds'] for run in runs) / 60:.0f}",
        *(row["published_top1"] for row in PUBLISHED if row["experiment"] == published),
    ]
    header = (ROOT / f"conf/experiment/{experiment}.yaml").read_text()
    assert f"# Measured: top-1 {cells[0]} %, {cells[3]} minutes" in header


def test_speed_and_memory() -> None:
    """The table of the benchmark agrees with the kept measurement."""
    record = measurement("side-by-side")
    pairs = (("ours", "package"), ("selective", "package"), ("full", "package"), ("ours", "paper"))
    measured = [
        [
            *(f"{line[f'{own}_speed_over_{other}']:.2f}, {line[f'{own}_memory_over_{other}']:.2f}" for own, other in pairs),
            f"{line['ours_speed_over_settings']:.2f}",
        ]
        for line in (*record["rows"], *record["means"])
    ]
    assert [row[2:] for row in table("docs/performance.md", "images/s, memory")] == measured
    assert all(row["ours_speed_over_package"] > 1 > row["ours_memory_over_package"] for row in record["rows"])


def test_all_mixers_next_to_packages() -> None:
    """The table of all models agrees with the kept measurement, and the text below it names what is slower or larger."""
    record = measurement("side-by-side", "intel-xeon-processor")
    ratios = ("ours_speed_over_package", "ours_memory_over_package")
    measured = [
        [
            row["model"],
            f"{row['ours']['images_per_second']:.0f}",
            f"{row['package']['images_per_second']:.0f}",
            *(f"{row[key]:.2f}" for key in ratios),
        ]
        for row in record["rows"]
    ]
    (mean,) = record["means"]
    measured.append(["geometric mean", "", "", *(f"{mean[key]:.2f}" for key in ratios)])
    assert [[row[0], *row[2:]] for row in table("docs/performance.md", "model")] == measured
    assert {row["model"] for row in record["rows"]} == {*MODELS}
    assert not record["refused"]
    text = PAGES["docs/performance.md"].split("### Every mixer that a package has")[1].split("\n#")[0].rpartition("|\n")[2]
    behind = {row["model"] for row in record["rows"] if row[ratios[0]] < 1 or row[ratios[1]] > 1}
    assert set(re.findall(r"`(\w+)`", text)) & {*MODELS} == behind
    assert mean[ratios[0]] > 1.3


def test_search_for_the_most_accurate_model() -> None:
    """The table of the search agrees with the kept runs, and conf/experiment/cpu_best.yaml is the best of them."""
    runs = {path.parent.name: json.loads(path.read_text()) for path in (ROOT / "results/flagship").glob("*/results.json")}
    documented = {re.split("[:,]", row[0])[0]: row[1:] for row in table("docs/compact.md", "run")}
    assert documented == {
        name: [f"{run['top1']:.2f}", f"{run['epochs']}", f"{run['config']['optimizer']['lr']}", f"{run['seconds'] / 60:.0f}"]
        for name, run in runs.items()
    }
    assert {run["tested_on"] for run in runs.values()} == {"validation"}
    best = max(runs.values(), key=lambda run: run["top1"])
    config = OmegaConf.to_container(compose(["experiment=cpu_best"]), resolve=True)
    for group in ("model", "attention", "embedding", "posenc", "optimizer", "augment"):
        assert config[group] == best["config"][group]
    assert config["trainer"] == best["config"]["trainer"] | {"compile": "auto"}
    assert f"{best['trainable_params']:,} parameters" in PAGES["docs/compact.md"]
    header = (ROOT / "conf/experiment/cpu_best.yaml").read_text()
    assert f"# Chosen: top-1 {best['top1']:.2f} % on 5,000 validation images (results/flagship/muon40)" in header


def test_the_most_accurate_models() -> None:
    """What the README, docs/compact.md and the experiment's header say of them agrees with the kept runs on the test images."""
    documented = {}
    for folder in sorted((ROOT / "results/cpu").glob("cpu_best*")):
        runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))]
        assert [run["seed"] for run in runs] == list(range(len(runs)))
        assert {(run["status"], run["tested_on"], run["test_images"]) for run in runs} == {("finished", "test", 10_000)}
        assert {(run["train_images"], run["epochs"]) for run in runs} == {(50_000, 40)}
        command = folder.name.replace(",", " ")
        config = OmegaConf.to_container(compose([f"experiment={command.split()[0]}", *command.split()[1:]]), resolve=True)
        for run in runs:
            assert all(
                run["config"][group] == config[group] for group in ("model", "attention", "optimizer", "augment", "trainer")
            )
        last = [run["top1"] for run in runs]
        reached = f"{statistics.mean(last):.2f}" + (f" ± {statistics.stdev(last):.2f}" if len(last) > 1 else "")
        minutes = [f"{extreme(run['seconds'] for run in runs) / 60:.0f}" for extreme in (min, max)]
        documented[command] = [reached, f"{len(runs)}", f"{runs[0]['trainable_params']:,}", "–".join(minutes)]
    assert {name: cells for name, *cells in table("README.md", "all of CIFAR-10")} == documented
    page = " ".join(PAGES["docs/compact.md"].split("Trained on all 50,000 images")[1].split())
    assert all(f" {cells[0]} % " in page for cells in documented.values())
    header = (ROOT / "conf/experiment/cpu_best.yaml").read_text()
    reached, seeds, _, minutes = documented["cpu_best"]
    assert f"# Measured: top-1 {reached} % on the test images (last epoch, {seeds} seeds), {minutes} minutes on" in header
    reached, seeds, _, minutes = documented["cpu_best attention=linear model.mlp_ratio=1.0"]
    assert f"# With linear attention, as above: {reached} % ({seeds} seeds), {minutes} minutes." in header


def test_compact_benchmark() -> None:
    """The tables agree with the kept runs, and with the counted memory where a page shows it."""
    for mixer, top1 in table("docs/compact.md", "first version"):
        (run,) = (ROOT / "results/recipe").glob(f"compact,attention={mixer},optimizer=adamw/seed=0/results.json")
        results = json.loads(run.read_text())
        assert (results["status"], results["epochs"], results["test_images"]) == ("finished", 8, 10_000)
        assert results["config"]["optimizer"]["_target_"] == "torch.optim.AdamW"
        assert f"{results['top1']:.2f}" == top1
    kept = accuracy.RUNS.exists()
    assert kept == ("No runs are kept yet." not in PAGES["docs/compact.md"])
    if kept:
        record = json.loads(accuracy.RECORD.read_text())
        rows = accuracy.trained(accuracy.RUNS, record)
        assert table("docs/compact.md", "mixer | top-1 %, last epoch") == [list(line) for line in accuracy.table(rows).lines]
        (steps,) = compact.tables(record)
        assert table("docs/compact.md", "mixer | images/s") == [list(line) for line in steps.lines]
        shown = table("README.md", "token mixer")
        for name, *cells in shown:
            (line,) = (line for line in accuracy.table(rows).lines if line[0] == name.replace("`", "").split()[0])
            assert cells == [line[1], *line[3:6]]
        caption = " ".join(README.split("| `identity` (mixes nothing) |")[1].split("\n\n")[1].split())
        assert "(one seed, or mean ± standard deviation of three; bfloat16, five of the picture's mixers in float32)" in caption
        assert {row.seeds for row in rows} == {1, 3}
        points = json.loads((ROOT / "benchmarks/results/scaling-intel-xeon-processor-2-threads.json").read_text())["points"]
        softmax, linformer = (curve(points, mixer, "training", "seconds")[16_384] for mixer in ("softmax", "linformer"))
        assert f"at 16,384 tokens it takes {softmax / linformer:.0f} times as long as Linformer" in caption
        assert record["device"]["name"] == "Intel(R) Xeon(R) Processor"
        for text in (caption, " ".join(PAGES["docs/compact.md"].split())):
            assert re.search(r"[Oo]ne thread of an Intel Xeon\b", text)
        kept = find_runs([accuracy.RUNS])
        exceptions = sorted(run.results["attention"] for run in kept if run.results["precision"] != "bf16")
        assert exceptions == ["latent", "neighbourhood", "nystrom", "performer", "window"]
        assert (
            "`performer`, `window`, `latent`, `neighbourhood` and `nystrom` were trained in float32" in PAGES["docs/compact.md"]
        )
        softmax = next(row for row in rows if row.mixer == "softmax")
        assert any(row.top1 > softmax.top1 for row in rows)
        assert any(row.seconds < softmax.seconds and row.megabytes < softmax.megabytes for row in rows)


def test_every_mixer_has_its_label_in_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(accuracy, "png", figures.append)
    rows = accuracy.trained(accuracy.RUNS, json.loads(accuracy.RECORD.read_text()))
    accuracy.picture(rows)
    for panel in figures[0].axes:
        assert {label.get_text() for label in panel.texts} == {row.mixer for row in rows}


def from_tokens(points: list[dict], mixer: str, quantity: str) -> str:
    """From how many tokens a mixer's training step takes less than that of softmax attention, as the table says it."""
    mine, other = (curve(points, name, "training", quantity) for name in (mixer, "softmax"))
    where = crossover(mine, other)
    return "–" if where is None else "all" if where == 0 else f"{float(f'{where:.2g}'):,.0f}"


def test_families_of_the_compact_benchmark() -> None:
    runs = {}
    for path in (ROOT / "results/compact_families").glob("*/seed=0/results.json"):
        run = json.loads(path.read_text())
        assert (run["status"], run["tested_on"], run["train_images"], run["epochs"]) == ("finished", "test", 50_000, 8)
        runs[run["experiment"], run["attention"]] = run
    rows = table("docs/compact.md", "model | attention")
    assert {(model, attention) for model, attention, *_ in rows} == set(runs)
    for model, attention, top1, difference, *costs in rows:
        run, reference = runs[model, attention], runs.get((model, "softmax"))
        assert top1 == f"{run['top1']:.2f}"
        shown = ""
        if attention != "softmax":
            shown = f"{run['top1'] - reference['top1']:+.2f}".replace("-", "−") if reference else "–"
        assert difference == shown
        on_cpu = model == "compact_pit"
        assert (run["device"], run["precision"]) == (("cpu", "fp32") if on_cpu else ("NVIDIA H200", "bf16"))
        assert costs == ["–" if on_cpu else f"{run['peak_gpu_allocated_gb']:.2f}", f"{run['trainable_params']:,}"]


def searched(name: str) -> dict:
    """The results of a kept run of the recipe's search."""
    run = json.loads((ROOT / f"results/recipe_search/{name}/results.json").read_text())
    assert run["status"] == "finished"
    return run


def test_the_tuned_recipe() -> None:
    """The tables agree with the kept runs, and the recipe with the tuned one; only the last comparison saw test images."""
    config = OmegaConf.to_container(compose(["experiment=vit", "recipe=modern"]), resolve=True)
    reached, mean = {}, {}
    for name in ("test_modern", "test_tuned"):
        runs = [searched(f"{name}/seed={seed}") for seed in (0, 1, 2)]
        assert {(run["tested_on"], run["train_images"], run["epochs"], run["recipe"]) for run in runs} == {
            ("test", 50_000, 8, "modern")
        }
        last = [run["top1"] for run in runs]
        mean[name] = statistics.mean(last)
        reached[name] = f"{mean[name]:.2f} ± {statistics.stdev(last):.2f}"
        if name == "test_tuned":
            for group in ("optimizer", "augment"):
                assert all(run["config"][group] == config[group] for run in runs)
            for key in ("schedule", "clip_norm", "batch_size", "label_smoothing", "ema_decay"):
                assert {run["config"]["trainer"][key] for run in runs} == {config["trainer"][key]}
    assert [cells[1] for cells in table("docs/recipe.md", "recipe")] == [reached["test_modern"], reached["test_tuned"]]
    header = " ".join((ROOT / "conf/recipe/modern.yaml").read_text().replace("\n#", "").split())
    assert f"top-1 {reached['test_tuned']} % on the test images" in header
    assert f"before it was tuned, {reached['test_modern']} %." in header
    assert f"[tuned](docs/recipe.md): {mean['test_tuned']:.0f} instead of {mean['test_modern']:.0f} % in 8 epochs" in README

    trials = {str(i): searched(f"search/trial={i:02d}/seed=0") for i in range(16)}
    order = sorted(trials, key=lambda i: -trials[i]["top1"])
    shown = table("docs/recipe.md", "trial")
    assert [cells[0] for cells in shown] == order[:8]
    for number, top1, optimizer, *settings in shown:
        run = trials[number]
        assert (run["tested_on"], run["test_images"]) == ("validation", 5_000)
        values = [*(run["config"]["optimizer"][key] for key in ("lr", "weight_decay"))]
        values += [run["config"]["augment"][key] for key in ("trivial_augment", "mixup", "cutmix")]
        assert (top1, optimizer) == (f"{run['top1']:.2f}", run["optimizer"])
        assert settings == ["–" if value is None else f"{value:.2g}" for value in values]
    for run in (trials[number] for number in order[:6]):
        config = run["config"]
        assert (run["optimizer"], config["augment"]["flip"], config["model"]["layer_scale"]) == ("muon", "alternate", 0.1)
        assert config["trainer"]["label_smoothing"] == 0.1
    adamw = [run for run in trials.values() if run["optimizer"] == "adamw"]
    assert all(run["config"]["augment"]["mixup"] for run in adamw)
    assert f"The best trial with AdamW reached {max(run['top1'] for run in adamw):.2f} %; all" in PAGES["docs/recipe.md"]

    parts = ["tuned/seed=0", "tuned/seed=1", *(f"{part}/seed=0" for part in PARTS)]
    for name, (_, top1, difference) in zip(parts, table("docs/recipe.md", "change"), strict=True):
        run = searched(name)
        assert run["tested_on"] == "validation"
        assert top1 == f"{run['top1']:.2f}"
        gained = run["top1"] - searched(parts[0])["top1"]
        assert difference == ("" if name == parts[0] else f"{gained:+.2f}".replace("-", "−"))
    longer = [searched(f"{name}_30/seed=0") for name in ("plain", "trivial_augment", "mixup_cutmix", "modern")]
    assert {(run["tested_on"], run["epochs"]) for run in longer} == {("validation", 30)}
    assert [cells[1] for cells in table("docs/recipe.md", "augmentation")] == [f"{run['top1']:.2f}" for run in longer]


def on_a_gpu(kept: str) -> dict[str, dict[str, tuple[float, float]]]:
    """The rows of a kept measurement on the H200: plain and compiled → milliseconds and GB of a step."""
    record = json.loads((ROOT / f"benchmarks/results/{kept}.json").read_text())
    assert not record["refused"]
    return {
        row: {kind: (1e3 * cost["seconds"], cost["allocated"] / 1e9) for kind, cost in costs.items()}
        for row, costs in record["rows"].items()
    }


def test_rows_on_a_gpu() -> None:
    """The table of all rows, the headers of the experiments, and the README's sentence."""
    measured = {row: costs["plain"] for row, costs in on_a_gpu("rows-nvidia-h200").items()}
    shown = table("docs/published-results.md", "row")
    assert [cells[0] for cells in shown] == [row["experiment"] for row in PUBLISHED] == list(measured)
    shares = []
    for row, cells in zip(PUBLISHED, shown, strict=True):
        ms, gb = measured[row["experiment"]]
        assert cells[1:4] == [f"{ms:.1f}", f"{ms * 50 / 64:.0f}", f"{gb:.2f}"]
        assert cells[5] == row["published_gpu_gb"]
        shares.append(gb / float(cells[4]))
        header = (ROOT / f"conf/experiment/{row['experiment']}.yaml").read_text()
        assert f"{ms:.0f} ms per training step, {gb:.2f} GB.\n" in header
    assert f"took between {min(shares):.2f} and {max(shares):.2f} times as much" in PAGES["docs/cost.md"]
    times, memory = zip(*measured.values(), strict=True)
    paper = [float(row["published_gpu_gb"]) for row in PUBLISHED]
    assert (
        f"rows takes {min(times):.0f} to {max(times):.0f} ms and {min(memory):.2f} to {max(memory):.2f} GB "
        f"(the paper's runs, in float32: {min(paper)} to {max(paper)} GB)"
    ) in " ".join(PAGES["README.md"].split())


@pytest.mark.slow
def test_estimates_of_the_rows() -> None:
    for cells in table("docs/published-results.md", "row")[::4]:  # of all rows it takes a minute
        assert cells[4] == f"{estimated_bytes(cells[0], 'cuda', 64) / 1e9:.2f}"


def test_rows_compiled_on_a_gpu() -> None:
    measured = on_a_gpu("rows-nvidia-h200-compiled")
    shown = table("docs/performance.md", "row")
    assert {cells[0] for cells in shown} == set(measured)
    for row, *cells in shown:
        (ms, gb), (compiled_ms, compiled_gb) = measured[row]["plain"], measured[row]["compiled"]
        assert cells == [f"{ms:.1f}", f"{compiled_ms:.1f}", f"{gb:.2f}", f"{compiled_gb:.2f}"]


def test_quickstart_on_a_gpu() -> None:
    """The figures of the kept output: three ways of compiling, with the same losses at first."""
    log = (ROOT / "benchmarks/results/quickstart-nvidia-h200.txt").read_text()
    speeds, memory, losses = {}, {}, {}
    for output in log.split(" rerun=true\n")[:-1]:
        how = output.rpartition("experiment=quickstart ")[2]
        speeds[how] = int(re.search(r"speed +│ +(\d+) images/s", output)[1])
        memory[how] = re.search(r"reserved +│ +(\S+) GB", output)[1]  # all that is recorded with CUDA graphs
        losses[how] = [f"{float(loss):.2f}" for loss in re.findall(r"loss (\S+)", output)[:3]]
    plain, compiled, graphs = (f"trainer.compile={how}" for how in ("false", "true", "cuda_graphs"))
    assert losses[plain] == losses[compiled] == losses[graphs]
    page = " ".join(PAGES["docs/performance.md"].split())
    assert f"at {speeds[plain]:,} images/s not compiled, at {speeds[compiled]:,} compiled, and at {speeds[graphs]:,}" in page
    assert f"the quickstart's peak was {memory[graphs]} GB of reserved memory instead of {memory[compiled]} compiled" in page


def test_row_at_full_size() -> None:
    run = json.loads((ROOT / "results/full_size/mixer,trainer.epochs=16/seed=0/results.json").read_text())
    assert (run["status"], run["tested_on"], run["train_images"], run["best_epoch"]) == ("finished", "test", 50_000, 16)
    (row,) = (row for row in PUBLISHED if row["experiment"] == "mixer")
    page = " ".join(PAGES["docs/published-results.md"].split())
    assert f"reached {run['top1']:.2f} % top-1 ({run['top5']:.2f} % top-5) in epoch 16" in page
    assert f"the paper has {row['published_top1']} % ({row['published_top5']} %)" in page
    assert f"Its peak was {run['peak_gpu_allocated_gb']:.2f} GB" in page
    reached = f"`mixer` at full size reached {run['top1']:.2f} % in 16 epochs (the paper's: {row['published_top1']} %)"
    assert reached in " ".join(PAGES["README.md"].split())
    step = on_a_gpu("rows-nvidia-h200")["mixer"]["plain"][0]
    packed = f"`mixer` trained at {run['images_per_second']:,.0f} images/s, where a step alone takes {step:.1f} ms"
    assert packed in " ".join(PAGES["docs/sweeps.md"].split())
    assert f"top-1 {run['top1']:.2f} % after 16 epochs" in (ROOT / "conf/experiment/mixer.yaml").read_text()


def test_scaling() -> None:
    """The table over the number of tokens and the caption of its picture."""
    record = measurement("scaling", "intel-xeon-processor")
    points, sizes = record["points"], (256, 1024, 4096, 16384)
    assert {p["mixer"] for p in points} == {*ORDER, "softmax-explicit"}
    rows = {}
    for mixer in dict.fromkeys(p["mixer"] for p in points):
        seconds, memory = (curve(points, mixer, "training", quantity) for quantity in ("seconds", "bytes"))
        rows[mixer] = [
            mixer,
            *(f"{1000 * seconds[n]:,.0f}" if n in seconds else "–" for n in sizes),
            f"{seconds[16384] / seconds[4096]:.1f}" if 16384 in seconds else "–",
            f"{curve(points, 'softmax', 'training', 'seconds')[16384] / seconds[16384]:.1f}" if 16384 in seconds else "–",
            from_tokens(points, mixer, "seconds"),
            f"{memory[16384] / 1e6:,.0f}" if 16384 in memory else "–",
            from_tokens(points, mixer, "bytes"),
        ]
    rows["softmax"][7] = rows["softmax"][9] = ""
    assert table("docs/performance.md", "`attention=`") == list(rows.values())
    device = record["device"]
    caption = " ".join(PAGES["docs/performance.md"].split("](scaling.png)")[1].split("\n\n")[1].split())
    assert f"({device['name']}, {device['threads']} threads, batch {record['batch']}, not compiled)" in caption
    for name, mixer in (("softmax attention takes", "softmax"), ("Linformer", "linformer")):
        assert f"{name} {rows[mixer][4]} ms and {rows[mixer][8]} MB" in caption


def test_picture_of_scaling(tmp_path: Path) -> None:
    """It is small, and the command of its caption draws one of the same size."""
    draw = importlib.import_module("benchmarks.scaling_picture").draw
    kept = ROOT / "docs/scaling.png"
    assert kept.stat().st_size < 150_000
    draw(tmp_path / "again.png")
    sizes = [struct.unpack(">II", path.read_bytes()[16:24]) for path in (kept, tmp_path / "again.png")]
    assert sizes[0] == sizes[1]


def test_overhead() -> None:
    record = measurement("overhead")
    assert [cells[1] for cells in table("docs/performance.md", "what | measured")] == [
        *(f"{record[key]:.1f}" for key in ("seconds_to_first_step", "compile_seconds", "compile_seconds_again")),
        f"{record['epoch_over_bare_steps']:.2f}",
        *(f"{record[key]:.0f}" for key in ("jobs_per_hour_alone", "jobs_per_hour_packed")),
    ]


def test_ways_of_waiting() -> None:
    """The table agrees with the kept measurement, which supports the default."""
    record = measurement("waiting")
    speed = {(row["experiment"], row["busy"], row["way"]): row["images_per_second"] for row in record["rows"]}
    places = [(name, busy) for name in record["options"]["experiments"] for busy in record["options"]["busy"]]
    ways = list(dict.fromkeys(row["way"] for row in record["rows"]))
    assert table("docs/performance.md", "waiting threads") == [
        [way, *(f"{speed[*place, way]:,.0f}" for place in places)] for way in ways
    ]
    ours = next(way for way in ways if way.endswith("(ours)"))
    for name, busy in places:
        fastest = max(speed[name, 0, way] for way in ways)
        assert speed[name, busy, ours] > fastest * (0.9 if busy == 0 else 0.25)


def test_quickstart_output() -> None:
    """The printed table agrees with the kept run, and every field of its results.json is documented."""
    results = json.loads((ROOT / "docs/quickstart.json").read_text())
    page = PAGES["docs/results.md"]
    for row in results["history"][-2:]:
        assert re.search(rf"epoch {row['epoch']}/10  loss {row['train_loss']:.4f}  top-1 {row['top1']:.2f} %", page)
    for value in (
        f"{results['top1']:.2f} % │",
        f"{results['best_top1']:.2f} % (epoch {results['best_epoch']} of {results['epochs']}) │",
        f"{results['trainable_params']:,} │",
        f"{results['weight_bias_params']:,} │",
        f"{results['checkpoint_mb']:.2f} MB │",
        f"{results['images_per_second']:.0f} images/s │",
        f"{results['seconds'] / 60:.1f} min on {results['device']}, {results['precision']} │",
    ):
        assert f" {value}" in page
    documented = {field for fields, _ in table("docs/results.md", "fields") for field in fields.split(", ")}
    assert results.keys() | {"config", "command", "overrides"} <= documented


# Paths, links and code


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130


def test_own_attention_is_the_tested_one() -> None:
    assert OWN_MIXER.strip() in PAGES["docs/extending.md"]


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    for path in re.findall(r"(?<![\w/.])(?:vix|conf|tests|benchmarks|docs)/[\w/.-]*\w", PAGES[page]):
        assert (ROOT / path).exists() or "/mean." in path, path
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page]):
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link


def test_every_page_is_linked_from_the_readme() -> None:
    assert {page for page in PAGES if page.startswith("docs/")} == set(re.findall(r"\]\((docs/[\w-]+\.md)\)", README))


def test_code_map_is_complete() -> None:
    folders = {f"vix/{path.parent.name}/" for path in (ROOT / "vix").glob("*/__init__.py")}
    assert {row[0] for row in table("README.md", "folder")} == folders


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_imports_what_exists(page: str, code: str) -> None:
    imports = [node for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), page, "exec"), {})


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_yaml_is_valid(page: str, text: str) -> None:
    assert isinstance(yaml.safe_load(text), dict), page


# Commands


def test_commands_of_vix_are_listed() -> None:
    assert [row[0] for row in table("docs/configuration.md", "command")] == [f"vix {name}" for name in COMMANDS]


# Commands of other programs, and of this one that are run by other tests; the start of each.
OTHER_COMMANDS = (
    "python3 -m venv .venv",
    ". .venv/bin/activate",
    "pip install -r requirements",
    "pytest",
    "tensorboard --logdir outputs",
    "chromium --headless",
    "eval $(python train.py -sc install=bash)",  # Hydra's own completion
    "eval $(python train.py -sc uninstall=bash)",
    "python -m benchmarks",  # tests/test_benchmarks.py
    "python -m benchmarks.scaling_picture",
)
Command = list[str]


def commands() -> list[tuple[str, str]]:
    """(command, comment) of every line of the ```bash blocks; a line may chain commands."""
    found = []
    for _, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            comment = line.partition(" # ")[2]
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&;")
            lexer.whitespace_split = True
            words: Command = []
            for word in [*lexer, ";"]:
                if word in ("&&", ";", "&"):
                    if words:
                        found.append((shlex.join(words), comment))
                    words = []
                else:
                    words.append(word)
    return list(dict.fromkeys(found))


def arguments_of_train(words: Command) -> Command | None:
    """The arguments of train.py that a command of the program amounts to; None for other commands."""
    while words and re.match(r"[A-Z_]+=", words[0]):  # environment variables
        words = words[1:]
    if words[:2] == ["python", "train.py"]:
        return words[2:]
    if words[0] == "torchrun":
        return words[words.index("train.py") + 1 :]
    if words[0] == "./sweep.sh":
        rest = [word for word in words[1:] if word not in ("--plan", "--measure")]
        if re.fullmatch(r"table\d|all", rest[0]):
            rows = [row["experiment"] for row in PUBLISHED if rest[0] in ("all", f"table{row['table']}")]
            assert rows, rest[0]
            rest[0] = f"experiment={','.join(rows)}"
        elif rest[0] == "compact":
            rest[0] = "experiment=compact"
        elif rest[0] == "compact-families":
            rest[0] = "experiment=compact_cct,compact_cvt,compact_levit,compact_pit"
        return ["-m", *rest]
    name = words[1] if words[0] == "vix" else words[3] if words[:3] == ["python", "-m", "vix"] else ""
    rest = [word for word in words[words.index(name) + 1 :] if not word.startswith("-")] if name else []
    return {"plan": ["-m", *rest], "summary": rest}.get(name)


class Parsed(BaseException):
    """Raised once a command has parsed its arguments, before it does anything."""


@pytest.mark.parametrize(("command", "comment"), commands())
def test_command(command: str, comment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options exist: overrides compose, arguments parse; and what needs a GPU or a cluster says so."""
    words = shlex.split(command)
    if words[0] == "torchrun" or (re.search(r"ray_gpus|cuda", command) and "plan" not in words):
        assert "needs a GPU" in comment
    if "slurm" in command and "rehearsal" not in command:
        assert "needs Slurm" in comment
    of_vix = words[1:] if words[0] == "vix" else words[3:] if words[:3] == ["python", "-m", "vix"] else None
    if of_vix is not None:
        assert parses(of_vix, monkeypatch)
    arguments = arguments_of_train(words)
    if arguments is not None:
        check_overrides(arguments)
    elif of_vix is None:
        assert " ".join(words).startswith(OTHER_COMMANDS)


def parses(arguments: Command, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether ``python -m vix ARGUMENTS`` parses its arguments."""
    real = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser: argparse.ArgumentParser, args: Command | None = None) -> argparse.Namespace:
        _, unknown = real(parser, args)
        if unknown:
            parser.error(f"unrecognized arguments: {unknown}")
        raise Parsed

    def parse_and_stop_intermixed(parser: argparse.ArgumentParser, args: Command) -> argparse.Namespace:
        return parse_and_stop(parser, sorted(args, key=lambda word: word.startswith("-")))

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patched.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse_and_stop_intermixed)
        patched.setattr(sys, "argv", ["vix", *arguments])
        try:
            vix_main()
        except Parsed:
            return True
    return False


def check_overrides(arguments: Command) -> None:
    """Compose every run of ``python train.py ARGUMENTS``, and check its keys, types and ranges."""
    parsed = parse_command(arguments)
    overrides = [word.replace("$PWD", "/tmp") for word in parsed.overrides]
    for key in ("hydra/launcher", "hydra/sweeper"):
        for option in (o.partition("=")[2] for o in overrides if o.startswith(f"{key}=")):
            assert (ROOT / "conf" / key / f"{option}.yaml").exists()
            if not find_spec("hydra_plugins.hydra_submitit_launcher"):
                pytest.skip("plugins are not installed: pip install -r requirements-launchers.txt")
    if not parsed.multirun:
        parse(compose(overrides))
        return
    if any(o.startswith("hydra/sweeper=") for o in overrides):
        cfg = compose_with_hydra(overrides, mode=RunMode.MULTIRUN)
        params = OmegaConf.to_container(cfg.hydra.sweeper.params, resolve=True)
        missing = object()
        assert params
        assert all(OmegaConf.select(cfg, key, default=missing) is not missing for key in params)
        parse(cfg)
        return
    for job in {tuple(o for o in job if not o.startswith("seed=")): None for job in expand(overrides)}:
        parse(compose(job))


def refusals() -> list[tuple[str, str]]:
    """(command, error) of the ```console blocks."""
    return [
        (command, error)
        for _, block in blocks("console")
        for command, error in re.findall(r"^\$ python train\.py (.*)\nerror: (.*)$", block, re.M)
    ]


@pytest.mark.parametrize(("command", "error"), refusals())
def test_refusal(command: str, error: str) -> None:
    """The error that a page shows is the one that the command prints."""
    overrides = shlex.split(command)
    with pytest.raises(Exception) as caught, torch.device("meta"):  # noqa: PT011  (which one is checked below)
        parse(compose(overrides)).build_model()
    assert isinstance(caught.value, UserError) or is_hydra_error(caught.value)
    assert format_error(caught.value, overrides) == error
