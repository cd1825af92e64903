"""Reader of ``results.json``: finds the runs below directories, validates, filters and groups them by seed and fold.

Imports no torch, so that reading 1,000 runs takes about a second.
"""

import csv
import functools
import json
import math
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vix.errors import UserError, permission_errors
from vix.overrides import override_key, parse_or_none, settings
from vix.runs.identity import (
    DEFAULT_RECIPE,
    IGNORED_IN_GROUPS,
    MODEL_GROUPS,
    SAME_MODEL,
    changed_keys,
    is_of_the_run,
    is_off,
    with_defaults,
)
from vix.system.files import walk

Row = dict[str, Any]

# Fields of a finished run that must be numbers, and those that may be null (no GPU, a loss that overflowed).
NUMBERS = ("top1", "top5", "best_top1", "best_top5", "epochs", "weight_bias_params", "trainable_params")
NUMBERS_OR_NULL = ("checkpoint_mb", "images_per_second", "seconds", "peak_gpu_allocated_gb", "peak_gpu_reserved_gb")
UNFINISHED = ("running", "failed", "refused", "interrupted")
COST_FILE = "cost.json"  # written next to results.json by `python -m vix cost`
COST_BATCH_SIZE = 64  # of the memory in the report: the paper's batch size
# Fields that are read from it, and that of the device and precision of the measurement.
INFERENCE_FIELDS, INFERENCE_ON = ("latency_ms", "latency_p95_ms", "inference_images_per_second", "inference_gb"), "inference_on"
# Overrides of the image set with which a run is still compared with the paper.
SAME_DATA = ("data.root", "data.class_weights")
RUN_FILES = ("results.json", "checkpoint.pt", ".hydra")  # any of these marks a directory as a run's


@dataclass
class RunRecord:
    """A ``results.json``.

    status: of the run; or ``unreadable``, or ``foreign`` where the file was not written by this program.
    error: why the run is not finished or not valid; empty where that is unknown.
    results: contents of the file; empty where it is unreadable or foreign.
    written: modification time, in seconds since 1970.
    """

    path: Path
    status: str
    error: str
    results: Row = field(default_factory=dict)
    written: float = 0.0

    @functools.cached_property
    def fields(self) -> Row:
        """The fields that --where can filter by: scalar fields of the results, and the config with dotted keys."""
        plain = {k: v for k, v in self.results.items() if not isinstance(v, dict | list) and k != "traceback"}
        config = self.results.get("config")
        options = with_defaults(flatten(config), self.results) if isinstance(config, dict) else {}
        return {k: v for k, v in {**options, **plain}.items() if not k.endswith("._target_")} | {"status": self.status}

    def satisfies(self, key: str, text: str) -> bool:
        """Whether a field has the value that ``text`` denotes.

        An option that the run predates is off, in the groups whose classes have the same options.
        """
        if key in self.fields:
            return matches(text, self.fields[key])
        config = isinstance(self.results.get("config"), dict)
        return config and key.startswith(("data.", "trainer.", "augment.")) and text in ("null", "false", "0")

    @property
    def experiment(self) -> str:
        """The experiment, or the model groups where no experiment was chosen."""
        return str(self.results.get("experiment") or "-".join(str(self.results.get(group)) for group in MODEL_GROUPS))

    @functools.cached_property
    def changes(self) -> list[str]:
        """The overrides that distinguish this run within its experiment; the last of several for one key wins."""
        ignored = {*IGNORED_IN_GROUPS, *(() if self.results.get("experiment") else MODEL_GROUPS)}
        given = settings(self.results["overrides"]).items()
        changes = {override for key, override in given if key not in ignored and is_of_the_run(key)}
        return sorted(changes - {DEFAULT_RECIPE})

    @property
    def seed(self) -> str:
        """The seed."""
        return str(self.results.get("seed"))

    @property
    def fold(self) -> int | None:
        """The evaluated fold of a cross-validation; None where there is none."""
        data = self.results["config"].get("data")
        return data.get("fold") if isinstance(data, dict) else None

    def group_key(self, explicit: Collection[tuple[str, str]] = ()) -> tuple[str, ...]:
        """Equal for runs that differ only in the seed or the fold.

        explicit: ``explicit_options`` of the runs of the experiment. Of those that this run leaves out, the defaults count.

        It contains the whole config, because config files may have changed. Options that are off are omitted: a run may
        predate such an option.
        """
        config = flatten(self.results["config"])
        keys = {key for target, key in explicit if target == target_of(config, key)}
        items = with_defaults(config, self.results, keys).items()
        # The digest of the initial weights says more than their path, but older runs lack it.
        ignored = {*IGNORED_IN_GROUPS, *(["trainer.init_from"] if self.results.get("init_weights") else [])}
        changes = [change for change in self.changes if override_key(change) not in ignored]
        config = {k: v for k, v in items if not is_off(v) and k not in ignored and is_of_the_run(k)}
        place = tuple(str(self.results.get(key)) for key in ("device", "precision", "init_weights"))
        place += (str(self.results.get("processes", 1)),)
        # A run that was resumed under another config does not belong to the group of that config.
        history = json.dumps(self.results.get("config_changes"), sort_keys=True)
        return (self.experiment, *changes, *place, image_set(self.results), history, json.dumps(config, sort_keys=True))

    @property
    def explicit_options(self) -> set[tuple[str, str]]:
        """The options that the run's config sets, each with the class that takes it."""
        config = flatten(self.results["config"])
        return {(target_of(config, key), key) for key in config}


@dataclass
class Group:
    """Runs that differ only in the seed or, in a cross-validation, the fold.

    runs: one per seed and fold.
    published: the paper's row for this model; empty for other models.
    distinction: appended to the name where other groups have the same one.
    """

    runs: list[RunRecord]
    published: Mapping[str, str]
    distinction: str = ""

    @property
    def name(self) -> str:
        """The experiment and the overrides that distinguish the group."""
        return self.name_without(())

    def name_without(self, overrides: Collection[str]) -> str:
        """The name without these overrides."""
        run = self.runs[0]
        return " ".join([run.experiment, *(change for change in run.changes if change not in overrides)]) + self.distinction

    def values(self, key: str) -> list[float]:
        """A field of the results of every run that has it; a cost of inference only of those measured where the first was."""
        runs = self.runs
        if key in INFERENCE_FIELDS:
            where = next((run.results[INFERENCE_ON] for run in runs if INFERENCE_ON in run.results), None)
            runs = [run for run in runs if run.results.get(INFERENCE_ON) == where]
        return [run.results[key] for run in runs if run.results.get(key) is not None]

    def mean(self, key: str) -> float | None:
        """Mean over the runs; None where no run has the field."""
        return statistics.fmean(values) if (values := self.values(key)) else None

    def std(self, key: str) -> float | None:
        """Sample standard deviation over the runs; None for fewer than two values."""
        return statistics.stdev(values) if len(values := self.values(key)) > 1 else None

    @property
    def versions(self) -> int:
        """Number of pairs of a commit and a version of PyTorch that trained the runs."""
        return len({(run.results.get("git_commit"), run.results.get("torch")) for run in self.runs})

    @property
    def best(self) -> Row:
        """Results of the run with the highest accuracy after any epoch, which is the paper's selection rule."""
        return max(self.runs, key=lambda run: run.results["best_top1"]).results


def target_of(config: Row, key: str) -> str:
    """The class of the group of a key in a flat config; empty outside of the groups."""
    return str(config.get(f"{key.partition('.')[0]}._target_", ""))


def image_set(results: Row) -> str:
    """The image set of a run; for older results, which lack this field, the name of its class."""
    config = results.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    target = str(data.get("_target_", "")) if isinstance(data, dict) else ""
    return str(results.get("image_set") or target.rpartition(".")[2].lower())


def flatten(config: Mapping[str, Any], prefix: str = "") -> Row:
    """Nested dictionaries flattened into one, with dotted keys."""
    items: Row = {}
    for key, value in config.items():
        items |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return items


def published_rows() -> dict[str, dict[str, str]]:
    """The rows of the paper's tables, keyed by experiment, in the paper's order."""
    with open(Path(__file__).with_name("published.csv"), newline="", encoding="utf-8") as file:
        return {row["experiment"]: row for row in csv.DictReader(file)}


def read_run(path: Path) -> RunRecord:
    """Read a ``results.json``. Never raises: an invalid file gets the status ``unreadable`` or ``foreign``."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        written = path.stat().st_mtime
    except OSError as error:
        return RunRecord(path, "unreadable", error.strerror or type(error).__name__)
    except (ValueError, RecursionError) as error:
        return RunRecord(path, "unreadable", f"incomplete, or not JSON: {error}")
    if not isinstance(results, dict) or not isinstance(results.get("status"), str):
        return RunRecord(path, "foreign", "not written by train.py")
    status = results["status"]
    if status == "finished":
        wrong = next(wrong_fields(results), None)
        if wrong:
            return RunRecord(path, "foreign", f"finished, but {wrong} is missing or invalid")
        return RunRecord(path, status, "", results | inference_fields(path.with_name(COST_FILE)), written)
    epochs = results.get("epochs")
    reason = results.get("error") or ("" if epochs is None else f"epochs done: {epochs}")
    return RunRecord(path, status if status in UNFINISHED else "foreign", str(reason), results)


def inference_fields(path: Path) -> Row:
    """The fields of a ``cost.json`` that the report shows; empty where it is missing or damaged.

    They are those of the variant, compiled or not, with the lower latency.
    """
    try:
        cost = json.loads(path.read_text(encoding="utf-8"))
        variant = min((cost[name] for name in ("eager", "compiled") if cost.get(name)), key=lambda v: v["latency_ms"])
        peaks = {row["batch_size"]: row["peak_gb"] for row in variant["batches"]}
        keys = ("latency_ms", "latency_p95_ms", "images_per_second")
        costs = (*(variant[key] for key in keys), peaks.get(COST_BATCH_SIZE))
        fields = {key: float(cost) for key, cost in zip(INFERENCE_FIELDS, costs, strict=True) if cost is not None}
        on = f"{cost.get('device')}, {cost.get('precision')}"
        if cost.get("device") == "cpu" and cost.get("threads"):
            on += f", {cost['threads']} CPU thread{'s' * (cost['threads'] > 1)}"
        return {**fields, INFERENCE_ON: on + ", with mirror images" * bool(cost.get("mirror_eval"))}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def wrong_fields(results: Row) -> Iterator[str]:
    """Fields of finished results that are missing or have the wrong type."""
    for key in (*NUMBERS, *NUMBERS_OR_NULL):
        value = results.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number and not (value is None and key in NUMBERS_OR_NULL):
            yield key
    if not isinstance(results.get("config"), dict):
        yield "config"
    if not isinstance(results.get("overrides"), list) or not all(isinstance(o, str) for o in results["overrides"]):
        yield "overrides"
    if not isinstance(results.get("history"), list) or not all(isinstance(epoch, dict) for epoch in results["history"]):
        yield "history"


@permission_errors()
def find_runs(directories: Iterable[Path]) -> list[RunRecord]:
    """Read every ``results.json`` below the directories. Links are followed; runs archived by ``rerun=true`` are skipped.

    Raises UserError where a directory does not exist or cannot be read.
    """
    paths: dict[Path, Path] = {}  # keyed by real path, because one directory may contain another
    for directory in directories:
        if directory.is_file():
            raise UserError(f"{directory}: is a file; pass a directory that contains runs, such as {directory.parent}")
        if not directory.is_dir():
            near = directory.parent if directory.parent.is_dir() else Path()
            there = sorted(p.name for p in near.iterdir() if p.is_dir() and not p.name.startswith("."))
            raise UserError(f"{directory}: no such directory; {near.resolve()} contains: {join_names(there)}")
        if not os.access(directory, os.R_OK | os.X_OK):
            raise UserError(f"{directory}: no permission to read it")
        for place, files in walk(directory, may_hold_runs):
            if any(file.name == "results.json" for file in files):
                path = Path(place, "results.json")
                paths.setdefault(path.resolve(), path)
    return [read_run(path) for path in paths.values()]


def may_hold_runs(entry: os.DirEntry[str]) -> bool:
    """Whether to search a directory for runs: it is readable, not hidden, and not an archived run (``previous-N``)."""
    if entry.name.startswith("."):
        return False
    parent = Path(entry.path).parent
    archived = re.fullmatch(r"previous-\d+", entry.name) and any((parent / name).exists() for name in RUN_FILES)
    return not archived and os.access(entry.path, os.R_OK | os.X_OK)


def join_names(names: Iterable[Any], most: int = 40) -> str:
    """At most ``most`` names, separated by commas, for an error message."""
    names = list(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"


def filter_runs(runs: list[RunRecord], conditions: Iterable[str]) -> list[RunRecord]:
    """The runs that satisfy every condition ``key=value``. Raises UserError for an unknown key, or where no run is left."""
    for condition in conditions:
        key, equals, text = condition.partition("=")
        known = sorted({k for run in runs for k in run.fields})
        if not equals or (runs and key not in known):
            raise UserError(f"--where {condition}: expected KEY=VALUE with one of these keys: {join_names(known, 200)}")
        matching = [run for run in runs if run.satisfies(key, text)]
        if runs and not matching:
            values = sorted({as_text(run.fields[key]) for run in runs if key in run.fields})
            raise UserError(f"--where {condition}: no run matches; values of {key}: {join_names(values)}")
        runs = matching
    return runs


def as_text(value: Any) -> str:
    """A value as written on the command line: null, true, 0.001, text without quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def matches(text: str, value: Any) -> bool:
    """Whether ``text`` denotes the value; numbers are compared numerically (1e-3 equals 0.001)."""
    if as_text(value) == text:
        return True
    if isinstance(value, bool | list | dict):
        typed = parse_or_none(f"value={text}")  # with other spaces or letters
        return typed is not None and not typed.is_sweep_override() and bool(typed.value() == value)
    try:
        return not isinstance(value, str) and float(text) == value
    except ValueError:
        return False


def group_seeds(runs: Iterable[RunRecord]) -> tuple[list[Group], list[RunRecord]]:
    """Group the finished runs that differ only in seed and fold; only the newest run of each seed and fold counts.

    Returns the groups, in the paper's order, then by name; and all other runs, with the reason.
    """
    repeats: defaultdict[tuple[str, ...], dict[tuple[str, int | None], RunRecord]] = defaultdict(dict)
    others = []
    newest_first = sorted(runs, key=lambda run: run.written, reverse=True)
    explicit = defaultdict[str, set[tuple[str, str]]](set)
    for run in newest_first:
        if run.status == "finished":
            explicit[run.experiment] |= run.explicit_options
    for run in newest_first:
        if run.status != "finished":
            others.append(run)
            continue
        first = repeats[run.group_key(explicit[run.experiment])].setdefault((run.seed, run.fold), run)
        if first is not run:
            others.append(RunRecord(run.path, run.status, f"skipped: {first.path} is a newer run of the same seed"))
    published = published_rows()
    groups = []
    for of_repeat in repeats.values():
        runs = sorted(of_repeat.values(), key=lambda run: (len(run.seed), run.seed, run.fold or 0))
        groups.append(Group(runs, paper(runs[0], published), changed_of(runs[0])))
    order = [*published]
    groups.sort(key=lambda g: (order.index(x) if (x := g.runs[0].experiment) in order else len(order), g.name))
    disambiguate(groups)
    return groups, sorted(others, key=lambda run: str(run.path))


def paper(run: RunRecord, published: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
    """The paper's row for a run; empty where its experiment is not in the paper, or overrides change the model or the data."""
    keys = {override_key(change) for change in run.changes} - {SAME_MODEL}
    other = any(key.partition(".")[0] in (*MODEL_GROUPS, "data") for key in keys - {*SAME_DATA})
    return {} if other else published.get(run.experiment, {})


def disambiguate(groups: Iterable[Group]) -> None:
    """Make the names of groups unique: append image set, initial weights, device and precision, the options that differ, or
    where those are many, a number."""
    for distinction in (images_of, weights_of, place_of, None):
        same: defaultdict[str, list[Group]] = defaultdict(list)
        for group in groups:
            same[group.name].append(group)
        for alike in (groups for groups in same.values() if len(groups) > 1):
            labels = [distinction(group) for group in alike] if distinction else differing_options(alike)
            if len(set(labels)) > 1:
                for group, label in zip(alike, labels, strict=True):
                    group.distinction += f" ({label})" if label else ""


def differing_options(groups: Sequence[Group]) -> list[str]:
    """For each group, the options in which the configs of these groups differ; their numbers where those are more than 3."""
    runs = [group.runs[0].results for group in groups]
    flat = [flatten(run["config"]) for run in runs]
    keys = {key for config in flat for key in config}
    configs = [with_defaults(config, run, keys) for config, run in zip(flat, runs, strict=True)]
    ignored = {*IGNORED_IN_GROUPS, *(["trainer.init_from"] if any(run.get("init_weights") for run in runs) else [])}
    changed = {key for config in configs for key in changed_keys(configs[0], config, ignored)}
    labels = [", ".join(f"{key}={as_text(config.get(key))}" for key in sorted(changed)) for config in configs]
    unique = 0 < len(changed) <= 3 and len({*labels}) == len(labels)
    return labels if unique else [f"config {i}" for i in range(1, len(groups) + 1)]


def shared_overrides(groups: Sequence[Group]) -> list[str]:
    """The overrides that all groups have; none for a single group."""
    changes = [set(group.runs[0].changes) for group in groups]
    return sorted(set.intersection(*changes)) if len(changes) > 1 else []


def images_of(group: Group) -> str:
    """The image set without its number of images: ``imagefolder 1f3a9c2b4d5e``."""
    return image_set(group.best).partition(" (")[0]


def changed_of(run: RunRecord) -> str:
    """The distinction of runs whose config changed on resume, in the same way for all of a group; else empty."""
    return " (resumed under another config)" if run.results.get("config_changes") else ""


def weights_of(group: Group) -> str:
    """The digest of the initial weights; empty where they were random."""
    weights = group.best.get("init_weights")
    return f"initial weights {weights}" if weights else ""


def place_of(group: Group) -> str:
    """Device and precision of a group, and its number of processes where there are several."""
    processes = group.best.get("processes", 1)
    return f"{group.best.get('device')}, {group.best.get('precision')}" + (f", {processes} processes" if processes > 1 else "")
