"""What the README tells is what the tree holds."""

import csv
import re

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
        for row in csv.DictReader((ROOT / "vix" / "published.csv").open())
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
