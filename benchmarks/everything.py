"""``python -m benchmarks everything``: all figures of a machine, in pieces that a later call continues.

A piece is one model of ``python -m benchmarks``, one mixer of ``benchmarks.scaling`` or ``benchmarks.compact``, one published
row of ``benchmarks.rows``, or ``benchmarks.overhead``. Each is kept when it is done, in the folder ``pieces`` below the
results, and the same command measures those that are missing; one that takes longer than a whole call comes last. After each
piece the JSON files, the picture and the page (README.md) with all tables are written anew.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import __main__ as side_by_side
from benchmarks import compact, overhead, rows, scaling
from benchmarks.isolated import first_line
from benchmarks.record import RESULTS, chosen_device, hardware, machine, parser, versions
from benchmarks.scaling_plot import comparable, draw
from benchmarks.variants import MODELS
from vix.errors import UserError
from vix.reporting.table import Table
from vix.runs.results import published_rows

UNFINISHED = 75  # exit status of a call that left pieces for the next one (EX_TEMPFAIL)


class Piece(NamedTuple):
    """A command whose results are kept in one file: ``python -m MODULE ARGUMENTS``, of the benchmark ``kind``."""

    kind: str
    name: str
    module: str
    arguments: tuple[str, ...]


def join_side_by_side(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of all models, and their means."""
    rounds = {(row["model"], row["batch"]): row["rounds"] for record in records for row in record["rows"]}
    joined = side_by_side.summarize_all(rounds, [record["ceilings"] for record in records])
    return {**joined, "refused": [gap for record in records for gap in record["refused"]]}


def join_scaling(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Points of all mixers. The growth of every mixer's costs is that between the largest sizes of all."""
    points = [point for record in records for point in record["points"]]
    skipped = [gap for record in records for gap in record["skipped"]]
    return {"batch": records[0]["batch"], "points": points, "skipped": skipped, "sentences": scaling.sentences(points)}


def join_compact(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of all mixers."""
    return {key: [row for record in records for row in record[key]] for key in ("rows", "refused")}


def join_rows(records: list[dict[str, Any]]) -> dict[str, Any]:
    """All rows."""
    costs = {row: cost for record in records for row, cost in record["rows"].items()}
    return {"rows": costs, "refused": [gap for record in records for gap in record["refused"]]}


def join_overhead(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The one record."""
    return records[0]


# Kind → how its records are joined, and the tables of the joined record.
KINDS: dict[str, tuple[Callable[[list[dict[str, Any]]], dict[str, Any]], Callable[[dict[str, Any]], list[Table]]]] = {
    "side-by-side": (join_side_by_side, side_by_side.tables),
    "scaling": (join_scaling, scaling.tables),
    "compact": (join_compact, compact.tables),
    "rows": (join_rows, rows.tables),
    "overhead": (join_overhead, overhead.tables),
}


# Kind, module, option that selects what a piece measures, and all names that the option takes.
PARTS: tuple[tuple[str, str, str | None, tuple[str, ...]], ...] = (
    ("side-by-side", "benchmarks", "--models", tuple(MODELS)),
    ("scaling", "benchmarks.scaling", "--mixers", tuple(scaling.MIXERS)),
    ("compact", "benchmarks.compact", "--mixers", tuple(compact.NAMES)),
    ("rows", "benchmarks.rows", "--rows", tuple(published_rows())),
    ("overhead", "benchmarks.overhead", None, ("overhead",)),
)


def pieces(options: Namespace) -> list[Piece]:
    """All pieces, the reference of each comparison first."""
    common = ("--device", options.device, "--threads", str(options.threads), *(("--quick",) if options.quick else ()))
    rounds = ("--rounds", str(options.rounds))
    return [
        Piece(
            kind,
            name,
            module,
            (*((select, name) if select else ()), *(rounds if kind == "side-by-side" else ()), *common),
        )
        for kind, module, select, names in PARTS
        for name in names
        if options.only is None or {kind, name} & {*options.only}
    ]


def kept(folder: Path, piece: Piece) -> Path:
    """The file of a piece that was measured."""
    return folder / "pieces" / f"{piece.kind}-{piece.name}.json"


def too_slow(folder: Path, piece: Piece) -> Path:
    """The file that marks a piece as taking longer than a whole call; it contains that call's limit in minutes."""
    return kept(folder, piece).with_suffix(".slow")


def was_too_slow(folder: Path, piece: Piece, minutes: float) -> bool:
    """Whether a piece exceeded a limit of at least ``minutes`` in an earlier call."""
    path = too_slow(folder, piece)
    return path.exists() and float(path.read_text()) >= minutes


def settings(record: dict[str, Any]) -> dict[str, Any]:
    """What must be equal in all records of a folder."""
    options = {key: record["options"][key] for key in ("threads", "quick", "rounds") if key in record["options"]}
    return {"device": record["device"]["name"], **options, "torch": record["versions"]["torch"]}


def check_settings(folder: Path, every: list[Piece], chosen: dict[str, Any]) -> None:
    """Raises UserError where a kept piece was measured with other settings than ``chosen``."""
    for piece in every:
        if (path := kept(folder, piece)).exists():
            for key, value in settings(json.loads(path.read_text(encoding="utf-8"))).items():
                if chosen[key] != value:
                    raise UserError(
                        f"{path}: was measured with {key} {value}, not {chosen[key]}; use another --out, or remove it"
                    )


def measure(piece: Piece, folder: Path, timeout: float | None) -> str | None:
    """Measure a piece in a process of its own, and keep its record; the reason where that failed.

    Raises subprocess.TimeoutExpired after ``timeout`` seconds.
    """
    path = kept(folder, piece)
    new = path.with_suffix(".new")
    new.parent.mkdir(parents=True, exist_ok=True)
    new.unlink(missing_ok=True)
    command = [sys.executable, "-m", piece.module, *piece.arguments, "--out", str(new)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its measuring processes as well
    if process.returncode < 0:
        return f"ended by signal {-process.returncode}"
    record = json.loads(new.read_text(encoding="utf-8")) if new.exists() else {}
    if record.get("errors"):  # the next call tries again
        return first_line(record["errors"][0])
    if process.returncode and not record.get("refused"):
        return (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
    new.rename(path)
    too_slow(folder, piece).unlink(missing_ok=True)
    return None


def write_page(folder: Path, every: list[Piece]) -> None:
    """Write the joined records, the pictures and the page from the pieces that are kept."""
    page = []
    device = ""
    for kind, (join, tables) in KINDS.items():
        mine = [piece for piece in every if piece.kind == kind]
        records = [json.loads(kept(folder, p).read_text(encoding="utf-8")) for p in mine if kept(folder, p).exists()]
        if not records:
            continue
        commits = ", ".join(dict.fromkeys(str(record["git_commit"]) for record in records))
        record = {**records[0], **join(records), "git_commit": commits, "time": max(record["time"] for record in records)}
        device = record["device"]["name"]
        path = folder / f"{kind}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        parts = [table.markdown() for table in tables(record)]
        if kind == "scaling":
            if comparable(record["points"]):
                draw(path)
                parts.append(f"![Time and memory over the number of tokens]({path.with_suffix('.png').name})\n")
            parts.append("\n".join(f"- {line}" for line in record["sentences"]) + "\n")
        for gap in (*record.get("refused", ()), *record.get("skipped", ())):
            what = ", ".join(str(value) for key, value in gap.items() if key != "reason")
            parts.append(f"Not measured: {what}: {first_line(gap)}\n")
        missing = [piece.name for piece in mine if not kept(folder, piece).exists()]
        if missing:
            parts.append(f"Not measured yet: {', '.join(missing)}.\n")
        page.append("\n".join(parts))
    command = "python -m benchmarks everything"
    heading = f"# Benchmarks on {device}\n\nWritten by `{command}` from the JSON files in this folder.\n\n"
    (folder / "README.md").write_text(heading + "\n".join(page), encoding="utf-8")


def page_is_old(folder: Path, every: list[Piece]) -> bool:
    """Whether the page lacks a kept piece, because an earlier call was killed."""
    page = folder / "README.md"
    written = page.stat().st_mtime_ns if page.exists() else 0
    return any(path.stat().st_mtime_ns > written for piece in every if (path := kept(folder, piece)).exists())


def measure_all(missing: list[Piece], every: list[Piece], folder: Path, minutes: float | None) -> list[str]:
    """Measure pieces, until the time is up; returns the failed ones with the reason.

    missing: the pieces to measure.   every: all pieces of the page.   minutes: time limit; None: none.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    durations: list[float] = []
    failed: list[str] = []
    for number, piece in enumerate(missing, 1):
        left = None if end is None else end - time.monotonic()
        if left is not None and left < (1.5 * statistics.median(durations) if durations else 0):
            break
        print(f"{number} of {len(missing)}: {piece.kind}, {piece.name}", file=sys.stderr)
        began = time.monotonic()
        try:
            reason = measure(piece, folder, left)
        except subprocess.TimeoutExpired:
            if not durations:  # no piece was measured before it in this call
                too_slow(folder, piece).write_text(f"{minutes}")
            break
        if reason is None:
            durations.append(time.monotonic() - began)
        else:
            failed.append(f"{piece.kind}, {piece.name}: {reason}")
            print(f"  failed: {reason}", file=sys.stderr)
        write_page(folder, every)
    return failed


def parse_arguments(arguments: list[str]) -> Namespace:
    """The options of the command. Raises UserError for a name that ``--only`` does not take."""
    options = parser("python -m benchmarks everything", "All figures of a machine; the same command continues.")
    options.add_argument("--minutes", type=float, help="time limit in minutes; rerun to continue (default: no limit)")
    options.add_argument("--rounds", type=int, default=1, help="measurements of every variant side by side (default: 1)")
    options.add_argument("--only", nargs="+", metavar="NAME", help="benchmarks, models, mixers, published rows (default: all)")
    chosen = options.parse_args(arguments)
    valid = dict.fromkeys([*KINDS, *(name for *_, names in PARTS for name in names)])
    if wrong := [name for name in chosen.only or () if name not in valid]:
        raise UserError(f"--only {wrong[0]}: unknown; valid: {', '.join(valid)}")
    return chosen


def main(arguments: list[str]) -> None:
    """The command."""
    chosen = parse_arguments(arguments)
    device = chosen_device(chosen.device)
    folder: Path = chosen.out or RESULTS / (machine(device, chosen.threads) + "-quick" * chosen.quick)
    every = pieces(chosen)
    options_of_all = {"threads": chosen.threads, "quick": chosen.quick, "rounds": chosen.rounds}
    check_settings(folder, every, {"device": hardware(device), **options_of_all, "torch": versions()["torch"]})
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that ``measure`` ends its processes
    missing = [piece for piece in every if not kept(folder, piece).exists()]
    missing.sort(key=lambda piece: too_slow(folder, piece).exists())
    shown = [p for p in pieces(Namespace(**{**vars(chosen), "only": None})) if p in every or kept(folder, p).exists()]
    if page_is_old(folder, shown):
        write_page(folder, shown)
    failed = measure_all(missing, shown, folder, chosen.minutes)
    left_over = [piece for piece in every if not kept(folder, piece).exists()]
    print(f"{len(every) - len(left_over)} of {len(every)} pieces are measured; the tables are in {folder / 'README.md'}")
    if failed:
        raise UserError(f"{len(failed)} failed, the first: {failed[0]}")
    slow = [p for p in left_over if chosen.minutes is not None and was_too_slow(folder, p, chosen.minutes)]
    if slow and slow == left_over:
        names = "; ".join(f"{piece.kind}, {piece.name}" for piece in slow)
        raise UserError(f"{names}: takes more than {chosen.minutes:g} minutes; use more")
    if left_over:
        print("The same command continues.")
        sys.exit(UNFINISHED)
