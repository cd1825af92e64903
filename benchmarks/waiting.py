"""``python -m benchmarks.waiting``: wait policies of OpenMP threads, on an idle and on a shared machine. CPUs only.

Measures training steps with each policy, alone and next to processes that each keep one CPU busy. Every measurement runs in a
new process, because OpenMP reads the variables when it is loaded. Rounds alternate the order of the policies, and a ratio is
the median over the rounds of the ratios within a round.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.record import errors_in_one_line, parser, write
from benchmarks.variants import bare_step
from vix.errors import UserError
from vix.reporting.table import Table
from vix.system.threads import SPIN_COUNT, WAIT_VARIABLES

# Environment variables of each policy; the others are compared with the first. GOMP_SPINCOUNT belongs to GNU's OpenMP, which
# PyTorch includes on Linux: the number of spin iterations before a thread sleeps.
WAYS = {
    "spin (OpenMP's default)": {},
    "spin 10,000 times": {"GOMP_SPINCOUNT": "10000"},
    "spin 1,000 times (ours)": {"GOMP_SPINCOUNT": str(SPIN_COUNT)},
    "spin 100 times": {"GOMP_SPINCOUNT": "100"},
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
QUICK = ("spin (OpenMP's default)", "spin 1,000 times (ours)")  # the policies of the quick setting
CHILD = "import sys; from benchmarks.waiting import measure_here; measure_here(*sys.argv[1:])"
BUSY = "while True: pass"


def measure_here(overrides: str, batch_size: str, threads: str, quick: str) -> None:
    """Measure a training step in this process, and print its cost as JSON. The arguments are strings of a command line."""
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    print(json.dumps(bare_step(tuple(overrides.split()), torch.device("cpu"), int(batch_size), quick == "quick")))


def step_seconds(overrides: str, batch_size: int, threads: int, quick: bool, variables: dict[str, str]) -> float:
    """Seconds per training step, measured in a new process. Raises UserError where it fails.

    variables: environment variables of the policy.
    """
    removed = ("OMP_NUM_THREADS", *WAIT_VARIABLES)
    environment = {name: value for name, value in os.environ.items() if name not in removed} | variables
    if not any(name in variables for name in WAIT_VARIABLES):
        environment["GOMP_SPINCOUNT"] = "300000"  # the default of GNU's OpenMP; unset, vix would set its own value
    count = variables.get("OMP_NUM_THREADS", str(threads))
    command = [sys.executable, "-c", CHILD, overrides, str(batch_size), count, "quick" if quick else "whole"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"a measurement failed: {done.stderr.strip().splitlines()[-1]}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Context manager during which ``number`` processes each keep one CPU busy."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    """The command."""
    options = parser("python -m benchmarks.waiting", "Compare wait policies of OpenMP threads.")
    options.add_argument("--experiments", nargs="+", default=["quickstart", "vip", "vil"], help="files of conf/experiment")
    options.add_argument("--batch", type=int, default=64, help="images per step (default: 64)")
    options.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="concurrent busy processes (default: 0 1)")
    options.add_argument("--rounds", type=int, default=3, help="repetitions of every measurement (default: 3)")
    chosen = options.parse_args()
    rounds, ways = (1, QUICK) if chosen.quick else (chosen.rounds, tuple(WAYS))
    small = " model.dim=16 model.depth=1" if chosen.quick else ""
    rows: list[dict[str, Any]] = []
    for experiment in chosen.experiments:
        for busy in chosen.busy:
            times: dict[str, list[float]] = {way: [] for way in ways}
            for number in range(rounds):
                print(f"{experiment}, {busy} busy, round {number + 1} of {rounds}", file=sys.stderr)
                for way in ways[:: 1 if number % 2 == 0 else -1]:
                    with busy_processes(busy):
                        seconds = step_seconds(
                            f"experiment={experiment}{small}", chosen.batch, chosen.threads, chosen.quick, WAYS[way]
                        )
                    times[way].append(seconds)
            first = times[ways[0]]
            for way, seconds_of in times.items():
                ratios = [own / other for own, other in zip(first, seconds_of, strict=True)]
                rows.append(
                    {
                        "experiment": experiment,
                        "busy": busy,
                        "way": way,
                        "images_per_second": chosen.batch / statistics.median(seconds_of),
                        "speed_over_spinning": statistics.median(ratios),
                        "seconds": seconds_of,
                    }
                )
    path = write("waiting", torch.device("cpu"), chosen, {"rows": rows})
    Table(
        f"Training steps, batch {chosen.batch}, {chosen.threads} threads",
        ("experiment", "busy processes", "wait policy", "images/s", "relative to spinning"),
        [
            (
                row["experiment"],
                str(row["busy"]),
                row["way"],
                f"{row['images_per_second']:.1f}",
                f"{row['speed_over_spinning']:.2f}",
            )
            for row in rows
        ],
        3,
    ).print()
    print(f"Written: {path}")


if __name__ == "__main__":
    errors_in_one_line(main)
