"""What the README tells is what the tree holds."""

import csv
import json
import re
import statistics

import pytest
from conftest import ROOT
from test_config import GROUPS, OWN_MIXER

README = (ROOT / "README.md").read_text()


def table(heading: str) -> list[list[str]]:
    """Cells, without code marks, of the README's table below the row that starts with ``heading``."""
    lines = README.split(f"| {heading} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")] for line in lines]


def test_published_rows() -> None:
    expected = [
        [
            *(row[key] for key in ("experiment", "table", "name", "published_top1", "published_top5", "published_gpu_gb")),
            *(f"{int(row[key]):,}" for key in ("weight_bias_params", "trainable_params")),
        ]
        for row in csv.DictReader((ROOT / "vix" / "runs" / "published.csv").open())
    ]
    assert table("`experiment=`") == expected
    assert len(expected) == 38


def test_groups_and_their_options() -> None:
    told = {group: set(options.split(", ")) for group, options, _ in table("group")}
    experiments = told.pop("experiment")
    assert told == {group: {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} for group in (*GROUPS, "recipe")}
    rows = {row[0] for row in table("`experiment=`")}
    others = {word for option in experiments for word in option.split() if (ROOT / f"conf/experiment/{word}.yaml").exists()}
    assert {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")} == rows | others


def test_own_attention_is_the_tested_one() -> None:
    assert OWN_MIXER.strip() in README


def test_files_that_are_named_exist() -> None:
    for path in re.findall(r"\b(?:vix|conf)/[\w/.]*\w", README):
        assert (ROOT / path).exists() or "mean" in path, path


@pytest.mark.parametrize("experiment", ["cpu_vit", "cpu_hybrid_vin"])
def test_cpu_results(experiment: str) -> None:
    """The measured table, and the experiment's own header, are what the kept runs say."""
    runs = [json.loads(path.read_text()) for path in (ROOT / "results/cpu").glob(f"{experiment}/*/results.json")]
    assert sorted(run["seed"] for run in runs) == [0, 1, 2]
    assert {run["status"] for run in runs} == {"finished"}
    last = [run["top1"] for run in runs]
    (told,) = (row[1:] for row in table("on a CPU") if row[0] == experiment)
    assert told == [
        f"{statistics.mean(last):.2f} ± {statistics.stdev(last):.2f}",
        f"{max(run['best_top1'] for run in runs):.2f}",
        f"{runs[0]['trainable_params']:,}",
        f"{statistics.mean(run['seconds'] for run in runs) / 60:.0f}",
    ]
    header = (ROOT / f"conf/experiment/{experiment}.yaml").read_text()
    assert f"# Measured: top-1 {told[0]} %, {told[3]} minutes" in header


def test_speed_and_memory() -> None:
    """The table of the benchmark is the kept measurement's."""
    record = json.loads((ROOT / "benchmarks/results/side-by-side-amd-epyc-2-threads.json").read_text())
    pairs = (("ours", "package"), ("selective", "package"), ("full", "package"), ("ours", "paper"))
    measured = [
        [
            *(f"{line[f'{own}_speed_over_{other}']:.2f}, {line[f'{own}_memory_over_{other}']:.2f}" for own, other in pairs),
            f"{line['ours_speed_over_settings']:.2f}",
        ]
        for line in (*record["rows"], *record["means"])
    ]
    assert [row[2:] for row in table("images/s, memory")] == measured


def test_scaling() -> None:
    """So is the table over the number of tokens."""
    record = json.loads((ROOT / "benchmarks/results/scaling-amd-epyc-2-threads.json").read_text())
    points = {(p["mixer"], p["tokens"]): p for p in record["points"] if p["pass"] == "training"}
    mixers = ("softmax", "performer", "linformer", "nystrom")
    seconds = {mixer: [points[mixer, tokens]["seconds"] for tokens in (256, 1024, 4096, 16384)] for mixer in mixers}
    assert table("`attention=`") == [
        [
            mixer,
            *(f"{1000 * s:,.0f}" for s in seconds[mixer]),
            f"{seconds[mixer][3] / seconds[mixer][2]:.1f}",
            f"{seconds['softmax'][3] / seconds[mixer][3]:.1f}",
            f"{points[mixer, 16384]['bytes'] / 1e6:,.0f}",
        ]
        for mixer in mixers
    ]


def test_ways_of_waiting() -> None:
    """The table of docs/performance.md is the kept measurement's, which supports the default."""
    record = json.loads((ROOT / "benchmarks/results/waiting-amd-epyc-2-threads.json").read_text())
    speed = {(row["experiment"], row["busy"], row["way"]): row["images_per_second"] for row in record["rows"]}
    places = [(name, busy) for name in record["options"]["experiments"] for busy in record["options"]["busy"]]
    ways = list(dict.fromkeys(row["way"] for row in record["rows"]))
    lines = (ROOT / "docs/performance.md").read_text().split("| waiting threads |")[1].split("\n\n")[0].splitlines()[2:]
    assert [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines] == [
        [way, *(f"{speed[*place, way]:,.0f}" for place in places)] for way in ways
    ]
    ours = next(way for way in ways if way.endswith("(ours)"))
    for name, busy in places:
        fastest = max(speed[name, 0, way] for way in ways)
        assert speed[name, busy, ours] > fastest * (0.9 if busy == 0 else 0.25)
