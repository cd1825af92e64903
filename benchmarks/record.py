"""The JSON file of a benchmark, with hardware, versions, commit and options; and the options that all benchmarks share."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vix.errors import UserError
from vix.reporting.console import protect_output
from vix.runs.identity import git_commit
from vix.system.device import resolve_device
from vix.system.files import user_path

RESULTS = Path(__file__).parent.resolve() / "results"
PACKAGES = (
    *("vit-pytorch", "performer-pytorch", "linformer", "nystrom-attention", "timm", "fightingcv-attention"),
    *("agent-attention-pytorch", "isab-pytorch", "linear-attention-transformer", "transformers"),
)


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    options = argparse.ArgumentParser(prog=program, description=description)
    options.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options.add_argument("--threads", type=int, default=cores, help=f"CPU threads per process (default: {cores})")
    default = "a file in benchmarks/results/, whose name ends in -quick or -part where it is no whole measurement"
    options.add_argument("--out", type=user_path, help=f"JSON file to write (default: {default})")
    options.add_argument(
        "--quick", action="store_true", help="small models and few repeats: a smoke test without meaningful results"
    )
    return options


def chosen_device(name: str) -> torch.device:
    """``--device`` → the device; a GPU always has an index. CUDA is not initialized, because other processes measure.

    Raises UserError where this machine lacks the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return resolve_device(name)
    try:
        index = torch.device(name).index or 0
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; valid: auto, cpu, cuda:N") from error
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or index >= count:
        gpus = f"{count} CUDA GPUs" if count else "no CUDA GPU"
        raise UserError(f"--device {name}: this machine has {gpus} that PyTorch can use; use auto or cpu")
    return torch.device("cuda", index)


def hardware(device: torch.device) -> str:
    """The name of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine(device: torch.device, threads: int) -> str:
    """The machine in the name of a file: hardware and, on a CPU, the number of threads."""
    slug = re.sub(r"[^a-z0-9]+", "-", hardware(device).lower().replace("(r)", "")).strip("-")
    return slug if device.type == "cuda" else f"{slug}-{threads}-threads"


def write(
    benchmark: str, device: torch.device, options: argparse.Namespace, measured: dict[str, Any], part: bool = False
) -> Path:
    """Write the measurements with hardware, versions, commit and options, and return the path.

    benchmark: its name, which begins the file name.   measured: the measurements.
    part: whether they are only some of the benchmark's. Neither these nor those of ``--quick`` replace whole ones.
    """
    name = hardware(device)
    kind = "-quick" if options.quick else "-part" if part else ""
    path: Path = options.out or RESULTS / f"{benchmark}-{machine(device, options.threads)}{kind}.json"
    record = {
        "benchmark": benchmark,
        "device": {"type": device.type, "name": name, "threads": options.threads, "cores": os.cpu_count()},
        "versions": versions(),
        "git_commit": git_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items() if key != "out"
        },
        **measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def versions() -> dict[str, str | None]:
    """Versions of Python, PyTorch, CUDA and the compared packages; None for a package that is not installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def errors_in_one_line(main: Callable[[], None]) -> None:
    """Run the main function of a benchmark; a UserError ends it with a one-line message."""
    protect_output()
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
