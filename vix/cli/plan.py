"""``python -m vix plan [group=option,option] [key=value,value] …``: list the runs of a sweep and their cost.

Accepts the arguments of ``train.py -m``, composes and builds every run, and prints its state and its cost. A run that would be
refused is printed with the reason, and the exit code is then 1. Reads no data, starts nothing and writes nothing.

``--memory-gb`` prints which runs fit that memory, and what makes the others fit. ``--device cuda`` estimates the memory of runs
on a GPU, on a machine without one, too.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from vix.analysis.cost import Fit, MeasuredCost, estimate_memory, fit_memory, measure_epoch
from vix.analysis.model_summary import Summary, summarize
from vix.build import Experiment, parse
from vix.cli.errors import one_line_errors, without_warnings
from vix.composition.command import Flags, add_flags, expand_arguments, flags_from, typed_overrides
from vix.composition.compose import (
    compose_with_hydra,
    format_error,
    is_hydra_error,
    left_out_messages,
    make_loader,
    naming_file,
    no_jobs,
    sweep_directory,
)
from vix.errors import UserError, permission_errors
from vix.reporting.console import protect_output
from vix.reporting.table import Table
from vix.runs.identity import COST_NEUTRAL_KEYS, MODEL_GROUPS, is_of_the_run
from vix.runs.results import Row, find_runs, flatten, image_set
from vix.runs.run import RunDirectory
from vix.runs.sweep import read_token, rerun_file
from vix.system.device import device_name
from vix.system.files import check_unlocked, run_directory_name
from vix.system.threads import use_given_cpus
from vix.training.batch_sizes import check_batches
from vix.training.init_from import fit_weights, init_identity

HOW_TO_READ = (
    "GFLOPs are per image, for a forward pass and for training. Hours (of the epochs left) and measured GB are taken from\n"
    "earlier runs with the same model, data, batch size and hardware in the same output directory, or unknown (–); --measure\n"
    "trains and evaluates each model for a few uncompiled steps to measure both (earlier runs on a CPU have no memory). GB:\n"
    "peak memory of the training steps, without the image set; the estimate follows from the shapes of all tensors."
)
HOW_TO_FIT = (
    "Fits: whether the estimate of training and evaluation, with the image set, is within {:g} GB of PyTorch's memory. On a\n"
    "GPU, CUDA itself takes about half a GB more, and fragmentation some percent."
)


ABSENT_GPU = torch.device("cuda")  # without an index, in contrast to a GPU of this machine


@dataclass
class PlannedRun:
    """A run of a sweep: its state and its cost.

    name: the run's name, or its overrides where the config cannot be composed.
    state: new, continues, finished, again (rerun=true) or refused.
    reason: why it is refused; else empty.
    directory, outputs: of the run, and of all runs of the sweep; None where the config cannot be composed.
    config, experiment, image_set: the composed config, its validated parts, and the image set.
    left: epochs still to train.
    device: the hardware on which it would run.
    summary: parameters and FLOPs of the model.
    hours: estimated time; None where unknown.
    estimated_gb, measured_gb: peak memory in GB of 10⁹ bytes, from the shapes, and of earlier runs or by --measure; None where
        unknown.
    target: the device whose memory is estimated; it need not exist on this machine.
    fit: whether the run fits the memory of --memory-gb.
    left_out: messages about options of the experiment or recipe that do not apply, because another option was chosen.
    """

    name: str
    state: str = "refused"
    reason: str = ""
    directory: Path | None = None
    outputs: Path | None = None
    config: Row | None = None
    experiment: Experiment | None = None
    image_set: str = ""
    left: int = 0
    device: str = ""
    summary: Summary | None = None
    hours: float | None = None
    estimated_gb: float | None = None
    measured_gb: float | None = None
    target: torch.device | None = None
    fit: Fit | None = None
    left_out: list[str] = field(default_factory=list)


def plan(
    arguments: Sequence[str],
    measuring: bool = False,
    flags: Flags | None = None,
    device: str | None = None,
    memory_gb: float | None = None,
) -> list[PlannedRun]:
    """The jobs of a sweep, in the order in which ``train.py -m`` runs them.

    arguments: overrides of the command line.
    measuring: train a model for a few steps where the cost is not known from an earlier run.
    flags: which config files are used.
    device: cpu or cuda, instead of ``trainer.device``; this machine need not have it.
    memory_gb: memory in GB that the runs should fit; None: not asked.

    Raises Hydra's exceptions for invalid arguments, and UserError for a search, whose runs are not known in advance.
    """
    models: dict[str, Summary] = {}
    rerun = rerun_token(arguments, flags or Flags())
    expanded = enumerate(expand(arguments, flags))
    jobs = [plan_run(number, overrides, models, flags, rerun, device) for number, overrides in expanded]
    outputs = {job.outputs for job in jobs if job.outputs}
    earlier = [run.results for run in find_runs(directory for directory in outputs if directory.is_dir())]
    for job in jobs:
        cost_from_history(job, earlier)
    estimate_cost([job for job in jobs if job.left and job.state != "refused"], measuring, memory_gb)
    return jobs


def expand(arguments: Sequence[str], flags: Flags | None = None) -> list[list[str]]:
    """The overrides of each job, expanded by Hydra's basic sweeper. Raises UserError for another sweeper."""
    master = compose_with_hydra(arguments, flags, RunMode.MULTIRUN)
    sweeper = master.hydra.runtime.choices.get("hydra/sweeper")
    if sweeper != "basic":
        raise UserError(f"hydra/sweeper={sweeper}: a search chooses its runs adaptively, so they cannot be planned")
    params = [f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=make_loader(flags or Flags()))
    parsed = parser.parse_overrides([*params, *typed_overrides(master.hydra.overrides.task)])
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    hydra_overrides = typed_overrides(master.hydra.overrides.hydra)
    if not jobs:
        raise no_jobs(arguments) or UserError("the sweep has no jobs")
    return [[*hydra_overrides, *job] for job in jobs]


def rerun_token(arguments: Sequence[str], flags: Flags) -> str:
    """The token of the rerun that the same arguments of ``train.py -m`` would continue; empty where there is none."""
    outputs = sweep_directory(compose_with_hydra(arguments, flags, RunMode.MULTIRUN))
    return read_token(rerun_file(outputs, arguments, flags))


def plan_run(
    number: int,
    overrides: list[str],
    models: dict[str, Summary],
    flags: Flags | None = None,
    rerun: str = "",
    device: str | None = None,
) -> PlannedRun:
    """Plan one job, with the checks of ``train.py``.

    models: cache of the summaries, which take a third of a second each; extended in place.
    rerun: the token of the sweep's rerun.
    device: as for :func:`plan`.
    """
    job = PlannedRun(" ".join(overrides))
    try:
        cfg = compose_with_hydra(overrides, flags)
        job.left_out = left_out_messages(cfg.hydra)
        job.directory = output_directory(cfg, number)
        job.outputs = Path(str(cfg.hydra.sweep.dir))
        job.name = run_directory_name(job.directory)
        with open_dict(cfg):
            del cfg["hydra"]
        planned = copy.deepcopy(cfg)
        with naming_file(overrides, flags):
            absent = device is not None and choose_device(planned, device)
            job.experiment = parse(planned)
            model = check_experiment(job.experiment)
            if not absent:  # whether an option works depends on the device
                job.experiment.check_optimizer_step()
        config: Row = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
        job.config = config
        job.target = ABSENT_GPU if absent else job.experiment.trainer.torch_device
        resolve_state(job, job.experiment, model, job.directory, rerun)
        key = json.dumps([config[group] for group in (*MODEL_GROUPS, "data")])
        if key not in models:
            models[key] = summarize(job.experiment)
        job.summary = models[key]
    except Exception as error:
        if not (isinstance(error, UserError) or is_hydra_error(error)):
            raise
        job.state = "refused"
        job.reason = format_error(error, overrides, flags)
    return job


def choose_device(cfg: DictConfig, device: str) -> bool:
    """Set a config's device to cpu or cuda; where the machine lacks that GPU, to the CPU. Returns whether it lacks it."""
    absent = device == "cuda" and not torch.cuda.is_available()
    with open_dict(cfg):
        cfg.trainer.device = "cpu" if absent else device
        if absent and cfg.trainer.get("compile") == "cuda_graphs":  # only a GPU accepts it
            cfg.trainer.compile = True
    return absent


def output_directory(cfg: DictConfig, number: int) -> Path:
    """The directory of job ``number`` of the sweep; ``cfg``: its config, with Hydra's part."""
    with open_dict(cfg):
        cfg.hydra.job.num = number
    HydraConfig.instance().set_config(cfg)
    return Path(str(cfg.hydra.sweep.dir)) / str(cfg.hydra.sweep.subdir)


def check_experiment(experiment: Experiment) -> nn.Module:
    """The model, without values. Raises ConfigError where ``train.py`` would refuse the config."""
    with torch.device("meta"):
        model = experiment.build_model()
        experiment.build_optimizer(model)
    experiment.augmentation  # noqa: B018  (constructing it checks the image size)
    experiment.logger  # noqa: B018  (checks that its package is installed)
    check_batches(experiment.build_model, experiment.data, experiment.trainer)
    return model


@permission_errors()
def resolve_state(job: PlannedRun, experiment: Experiment, model: nn.Module, directory: Path, rerun: str) -> None:
    """Set the job's state, device and epochs left. Raises UserError where ``train.py`` would not continue the earlier run."""
    trainer, data = experiment.trainer, experiment.data
    job.device, job.left = device_name(trainer.torch_device) if job.target != ABSENT_GPU else "a CUDA GPU", trainer.epochs
    job.image_set = data.image_set
    check_unlocked(directory)
    identity = {"image_set": job.image_set, "defaults": experiment.defaults, **init_identity(trainer.init_from)}
    run = RunDirectory(directory, identity, job.config or {}, rerun)
    if experiment.rerun and not run.belongs_to_rerun():
        run.check_weights_stay()
        job.state = "again" if run.previous_results else "new"
    elif run.finished_results(trainer.resume):
        job.state, job.left = "finished", 0
    elif saved := run.load_checkpoint(trainer.resume):
        job.state, job.left = "continues", max(0, trainer.epochs - saved["progress"]["epoch"])
    else:
        job.state = "new"
    if job.state in ("new", "again"):
        fit_weights(model, trainer.init_from)


def cost_from_history(job: PlannedRun, earlier: Iterable[Row]) -> None:
    """Set the job's hours and memory to the median of earlier runs with the same cost, if there are any."""
    if job.state == "refused" or job.config is None:
        return
    key = cost_key(job.config)
    alike = [
        r
        for r in earlier
        # The memory of a GPU that this machine lacks is that of any GPU.
        if (r.get("device") == job.device or job.target == ABSENT_GPU)
        and r.get("processes", 1) == 1
        and cost_key(r.get("config")) == key
        # The time of an epoch depends on the image set.
        and image_set(r) == job.image_set
    ]
    seconds = [r["seconds"] / r["epochs"] for r in alike if is_number(r.get("seconds")) and is_number(r.get("epochs"))]
    gigabytes = [r["peak_gpu_allocated_gb"] for r in alike if is_number(r.get("peak_gpu_allocated_gb"))]
    job.hours = statistics.median(seconds) * job.left / 3600 if seconds and job.target != ABSENT_GPU else None
    job.measured_gb = statistics.median(gigabytes) if gigabytes else None
    if not job.left:
        job.hours = 0.0


def estimate_cost(jobs: Iterable[PlannedRun], measuring: bool, memory_gb: float | None = None) -> None:
    """Set each job's estimated memory and whether it fits. If ``measuring``, measure the hours and memory that are unknown.

    Jobs with the same cost are estimated and measured once.

    measuring, memory_gb: as for :func:`plan`.
    """
    measured: dict[str, MeasuredCost] = {}
    estimated: dict[str, tuple[float | None, Fit | None]] = {}
    for job in jobs:
        experiment, kind = job.experiment, json.dumps([job.image_set, cost_key(job.config)], sort_keys=True)
        assert experiment is not None
        assert job.target is not None
        if kind not in estimated:
            estimated[kind] = estimated_memory(experiment, job.target, memory_gb)
        job.estimated_gb, job.fit = estimated[kind]
        if not measuring or not job.left or None not in (job.hours, job.measured_gb):
            continue
        if kind not in measured:
            measured[kind] = measure_epoch(experiment)
        seconds, allocated = measured[kind]
        if job.measured_gb is None:
            job.measured_gb = allocated / 1e9
        if job.hours is None:
            job.hours = seconds * job.left / 3600


def estimated_memory(experiment: Experiment, target: torch.device, memory_gb: float | None) -> tuple[float | None, Fit | None]:
    """The memory of training in GB, and whether the run fits ``memory_gb``; each None where it is unknown, or not asked."""
    try:
        memory = estimate_memory(experiment, target)
        fit = None if memory_gb is None else fit_memory(experiment, target, memory_gb * 1e9, memory)
    except (DataDependentOutputException, DynamicOutputShapeException):  # a module of a user's own reads values
        return None, None
    return memory.training / 1e9, fit


def is_number(value: Any) -> bool:
    """Whether a field of a results.json is a positive number."""
    return isinstance(value, int | float) and value > 0


def cost_key(config: Any) -> Row:
    """The keys of a config that determine its cost; empty where it is not a config.

    Options that are null are omitted: an earlier run may predate them.
    """
    return (
        {k: v for k, v in flatten(config).items() if v is not None and k not in COST_NEUTRAL_KEYS and is_of_the_run(k)}
        if isinstance(config, dict)
        else {}
    )


def number(value: float | None, digits: int) -> str:
    """A number as printed in the table."""
    return "–" if value is None else f"{value:,.{digits}f}"


def print_plan(jobs: Sequence[PlannedRun], memory_gb: float | None = None) -> None:
    """Print the table, the totals, and the reasons of refused jobs."""
    lines = []
    for job in jobs:
        s = job.summary
        costs = (
            (f"{s.trainable_params:,}", *(number(f / 1e9, 3) for f in (s.forward_flops, s.training_flops))) if s else ("–",) * 3
        )
        memory = (number(job.estimated_gb, 2), number(job.measured_gb, 2))
        fits = () if memory_gb is None else ("–" if job.fit is None else "yes" if job.fit.fits else "no",)
        lines.append((job.name, job.state, *costs, str(job.left) if s else "–", number(job.hours, 2), *memory, *fits))
    heads = (
        *("run", "state", "trainable\nparameters", "GFLOPs\nforward", "GFLOPs\ntraining", "epochs\nleft", "hours"),
        *("peak GB\nestimated", "peak GB\nmeasured"),
        *(() if memory_gb is None else (f"fits\n{memory_gb:g} GB",)),
    )
    Table("Plan", heads, lines, words=2).print()
    print(HOW_TO_READ)
    if memory_gb is not None:
        print(HOW_TO_FIT.format(memory_gb))
    states = Counter(job.state for job in jobs)
    device = next((job.device for job in jobs if job.device), "unknown hardware")
    print(f"\n{len(jobs)} runs on {device}: " + ", ".join(f"{count} {state}" for state, count in states.items()))
    print_total(jobs)
    for job in jobs:
        if job.fit and not job.fit.fits and memory_gb is not None:
            print(f"does not fit: {job.name}: {fit_message(job.fit, memory_gb)}")
    for note in dict.fromkeys(note for job in jobs for note in job.left_out):
        print(note)
    for job in jobs:
        if job.reason:
            print(f"refused: {job.name}: {job.reason}", file=sys.stderr)


def print_total(jobs: Sequence[PlannedRun]) -> None:
    """Print the time of all jobs."""
    to_train = [job for job in jobs if job.left and job.state != "refused"]
    hours = [job.hours for job in to_train if job.hours is not None]
    if to_train:
        unknown = f"; unknown for {len(to_train) - len(hours)} of {len(to_train)} runs" if len(hours) < len(to_train) else ""
        print(f"total time, sequentially: {number(sum(hours), 2) + ' hours' if hours else 'unknown'}{unknown if hours else ''}")


def fit_message(fit: Fit, memory_gb: float) -> str:
    """What a run needs that does not fit, and what makes it fit."""

    def size(key: str, value: int) -> str:
        return f"fits with trainer.{key}={value}" if value else f"does not fit with trainer.{key}=1"

    parts = [f"needs {fit.needed / 1e9:.2f} GB"]
    if fit.eval_batch_size is not None:
        parts.append(f"evaluation {size('eval_batch_size', fit.eval_batch_size)}")
    if fit.micro_batch is not None:
        parts.append(f"training {size('micro_batch', fit.micro_batch)}")
    for mode, needed in fit.checkpointing.items():
        works = "fits" if needed <= memory_gb * 1e9 else "does not fit"
        parts.append(f"training {works} with trainer.activation_checkpointing={mode} ({needed / 1e9:.2f} GB)")
    if fit.micro_batch_full is not None:
        parts.append(f"training with trainer.activation_checkpointing=full {size('micro_batch', fit.micro_batch_full)}")
    return "; ".join(parts)


def positive(text: str) -> float:
    """The ``type`` of an argparse argument that is a positive number."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be greater than 0")
    return value


def main() -> None:
    """The command; exits with 1 where a run would be refused."""
    protect_output()
    description = "List the runs of a sweep, their cost, and which would be refused, without starting them."
    parser = argparse.ArgumentParser(prog="python -m vix plan", description=description)
    parser.add_argument("overrides", nargs="*", help="as for train.py -m: experiment=vin,vip seed=0,1 …")
    parser.add_argument("--multirun", "-m", action="store_true", help="accepted for compatibility with train.py; no effect")
    add_flags(parser)
    parser.add_argument("--measure", action="store_true", help="train each model for a few steps to measure time and memory")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="the device of the runs; a GPU need not exist (default: trainer.device)"
    )
    parser.add_argument(
        "--memory-gb", type=positive, metavar="GB", help="print which runs fit this memory, and what makes the others fit"
    )
    parsed = parser.parse_intermixed_args(expand_arguments(sys.argv[1:]))
    overrides, flags = parsed.overrides, flags_from(parsed)
    clock = time.perf_counter()
    with one_line_errors(overrides, flags), without_warnings():  # otherwise every run warns about a missing GPU
        if parsed.measure:
            if parsed.device == "cuda" and not torch.cuda.is_available():
                raise UserError("--measure --device cuda: this machine has no CUDA GPU; leave --measure out for an estimate")
            use_given_cpus()
        jobs = plan(overrides, parsed.measure, flags, parsed.device, parsed.memory_gb)
    print_plan(jobs, parsed.memory_gb)
    print(f"planned in {time.perf_counter() - clock:.0f} s")
    sys.exit(any(job.state == "refused" for job in jobs))
