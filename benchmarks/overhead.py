"""``python -m benchmarks.overhead``: time that a run needs in addition to its training steps, measured on runs of train.py.

Measures the seconds from the command to the end of the first step, and the additional time to compile it; the ratio of an
epoch's wall time to that of its steps alone, which is the overhead of data, logging and checks; and a sweep's jobs per hour,
sequentially in one process and in several concurrent processes.
"""

import json
import statistics
import sys
import tempfile
from typing import Any

from benchmarks.isolated import isolated, processes
from benchmarks.record import chosen_device, errors_in_one_line, parser, write
from benchmarks.runs import TimedProcess, run_together
from benchmarks.variants import bare_step
from vix.reporting.table import Table


def first_step(job: TimedProcess, images: int) -> float:
    """Seconds from the command to the end of the first step, for a run whose only epoch is that step.

    The measured time is that of the epoch's log line, which follows the evaluation; the time since the step is subtracted.

    images: in the step.
    """
    (results,) = job.results
    return job.first_epoch - (results["seconds"] - images / results["images_per_second"])


def epoch_step(job: TimedProcess, batch_size: int) -> float:
    """Seconds per step within an epoch: the median over all epochs except the first, which is a warm-up."""
    (results,) = job.results
    speeds = [row["images_per_second"] for row in results["history"]]
    return batch_size / statistics.median(speeds[1:])


def shares(jobs: int, at_once: int) -> list[str]:
    """The seeds of a sweep, distributed over ``at_once`` processes: ``seed=0,2``, ``seed=1,3``."""
    return ["seed=" + ",".join(map(str, range(first, jobs, at_once))) for first in range(min(jobs, at_once))]


def tables(record: dict[str, Any]) -> list[Table]:
    """The table of a record."""
    setting = record["setting"]
    rows = [
        ("from the command to the first step", f"{record['seconds_to_first_step']:.1f} s"),
        ("compiling the step (trainer.compile=true)", f"{record['compile_seconds']:.1f} s"),
        ("compiling it with a warm cache", f"{record['compile_seconds_again']:.1f} s"),
        (
            f"an epoch of {setting['steps_per_epoch']} steps relative to its steps alone",
            f"{record['epoch_over_bare_steps']:.3f}",
        ),
        (f"jobs per hour, {setting['jobs']} in one process", f"{record['jobs_per_hour_alone']:.0f}"),
        (f"jobs per hour, {setting['at_once']} concurrent processes", f"{record['jobs_per_hour_packed']:.0f}"),
    ]
    title = f"Overhead: {setting['experiment']}, batch {setting['batch']}, on {record['device']['name']}"
    return [Table(title, ("measurement", "median"), rows, 1)]


def main() -> None:
    """The command."""
    options = parser("python -m benchmarks.overhead", "Time that a run needs in addition to its training steps.")
    options.add_argument("--experiment", help="a file of conf/experiment (default: vit)")
    options.add_argument("--batch", type=int, help="images per step (default: 8 on a CPU, 64 on a GPU)")
    options.add_argument("--steps", type=int, help="steps per epoch (default: 12 on a CPU, 640 on a GPU)")
    options.add_argument("--rounds", type=int, default=3, help="repetitions of every measurement (default: 3)")
    options.add_argument("--jobs", type=int, help="runs of the sweep (default: 4 on a CPU, 8 on a GPU)")
    options.add_argument("--at-once", type=int, help="concurrent processes of the sweep (default: 2 on a CPU, 4 on a GPU)")
    chosen = options.parse_args()
    device = chosen_device(chosen.device)
    gpu, quick = device.type == "cuda", chosen.quick
    experiment = chosen.experiment or ("quickstart" if quick else "vit")
    batch_size = chosen.batch or (64 if gpu else 8)
    steps = chosen.steps or (3 if quick else 640 if gpu else 12)
    jobs = chosen.jobs or (2 if quick else 8 if gpu else 4)
    at_once = chosen.at_once or (4 if gpu else 2)
    # Concurrent jobs on a CPU share its threads.
    threads, threads_packed = chosen.threads, chosen.threads if gpu else max(1, chosen.threads // at_once)
    small = ("model.dim=16", "model.depth=1") if quick else ()
    what = (f"experiment={experiment}", f"trainer.batch_size={batch_size}", *small)
    command = (*what, f"trainer.device={device}", "data.test_size=10")
    train_size = max(steps * batch_size, 10)  # at least one image of each of 10 classes
    epochs = 2 if quick else 4
    context = processes("benchmarks.variants")

    rounds: list[dict[str, Any]] = []
    for number in range(1 if quick else chosen.rounds):
        print(f"round {number + 1} of {1 if quick else chosen.rounds}", file=sys.stderr)
        one_step = max(batch_size, 10)
        startup = run_together(
            [[*command, "trainer.epochs=1", f"trainer.batch_size={one_step}", f"data.train_size={one_step}"]], threads
        )
        once = run_together([[*command, "trainer.epochs=1", f"data.train_size={train_size}"]], threads)
        with tempfile.TemporaryDirectory() as cache:  # empty for the first of the two runs
            compiling = [
                run_together(
                    [[*command, "trainer.epochs=1", f"data.train_size={train_size}", "trainer.compile=true"]],
                    threads,
                    TORCHINDUCTOR_CACHE_DIR=cache,
                )
                for _ in range(2)
            ]
        training = run_together([[*command, f"trainer.epochs={epochs}", f"data.train_size={train_size}"]], threads)
        bare = isolated(context, threads, bare_step, what, device, batch_size, quick, limit=900)
        job = ["-m", *command, "trainer.epochs=1", f"data.train_size={train_size}"]
        alone = run_together([[*job, shares(jobs, 1)[0]]], threads)
        packed = run_together([[*job, share] for share in shares(jobs, at_once)], threads_packed)
        rounds.append(
            {
                "seconds_to_first_step": first_step(startup, one_step),
                "compile_seconds": compiling[0].first_epoch - once.first_epoch,
                "compile_seconds_again": compiling[1].first_epoch - once.first_epoch,
                "epoch_over_bare_steps": epoch_step(training, batch_size) / bare["seconds"],
                "jobs_per_hour_alone": 3600 * len(alone.results) / alone.wall,
                "jobs_per_hour_packed": 3600 * len(packed.results) / packed.wall,
            }
        )
    medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    setting = {
        "experiment": experiment,
        "batch": batch_size,
        "steps_per_epoch": steps,
        "jobs": jobs,
        "at_once": at_once,
    }
    path = write("overhead", device, chosen, {"setting": setting, **medians, "rounds": rounds})
    for table in tables(json.loads(path.read_text(encoding="utf-8"))):
        table.print()
    print(f"Written: {path}")


if __name__ == "__main__":
    errors_in_one_line(main)
