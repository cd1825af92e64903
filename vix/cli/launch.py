"""What ``train.py`` does: a job from its config to its results, errors in one line each, and the exit status."""

import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from vix.build import GROUPS, parse
from vix.composition.command import CONFIG_DIR, expand_arguments, parse_command, reproduce_command
from vix.composition.compose import (
    digest_of_images,
    format_error,
    is_hydra_error,
    left_out_messages,
    refused_reason,
    sweep_outputs,
)
from vix.errors import ConfigError, UserError, first_paragraph
from vix.reporting.console import console, protect_output
from vix.reporting.progress import print_results
from vix.runs.identity import git_commit, run_name_parts
from vix.runs.run import RunDirectory
from vix.runs.snapshot import undo_start
from vix.runs.sweep import JobStatus, Sweep
from vix.system.distributed import broadcast_from_rank0, process_group, rank, world_size
from vix.system.files import LockedError, exclusive_lock
from vix.system.memory import gpu_out_of_memory, limit_memory, out_of_memory
from vix.system.threads import use_given_cpus
from vix.training.batch_sizes import check_batches
from vix.training.compile import release_compiled

REPORT = "VIX_REPORT"  # environment variable: after a sweep, print the report of all runs below its directory (sweep.sh)
log = logging.getLogger("vix")


def run_job(cfg: DictConfig) -> float:
    """Train what a config of Hydra's says, in its directory, and return the top-1 accuracy. Errors are logged in one line."""
    protect_output()  # a launcher may have started this process
    job = HydraConfig.get()
    choices = job.runtime.choices
    directory = Path(job.runtime.output_dir)
    identity = {
        "name": "/".join(directory.parts[-2:]),
        "experiment": choices.get("experiment"),
        "recipe": choices.get("recipe"),
        **{group: choices.get(group) for group in GROUPS if group != "trainer"},
        "overrides": list(job.overrides.task),
        "seed": cfg.get("seed"),
        "command": reproduce_command(job),
        "git_commit": git_commit(),
        "torch": torch.__version__,
    }
    try:
        number = job.job.num if job.mode == RunMode.MULTIRUN else 0
        held = exclusive_lock(directory) if rank() == 0 else nullcontext()  # the first of several processes holds it for all
        parts = [*run_name_parts(choices, job.overrides.task, digest_of_images(cfg)), f"seed={cfg.get('seed')}"]
        outputs = str(job.sweep.dir) if job.mode == RunMode.MULTIRUN else ""
        with JobStatus(parts, number, cfg.get("fail_fast") is True, outputs) as this_job, held, process_group():
            run = RunDirectory(directory, identity, OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
            results = train(cfg, run)
            this_job.finished(results, before=results is run.previous_results)
            return float(results["top1"])
    except Exception as error:
        if isinstance(error, LockedError) and job.mode == RunMode.RUN:
            undo_start(locked=True)
        if job.mode == RunMode.MULTIRUN:  # the sweep goes on, and its end would tell the first failure only
            log.error("%s: %s", identity["name"], first_paragraph(error))
        elif isinstance(error, UserError):
            sys.exit(f"error: {error}")
        raise


def train(cfg: DictConfig, run: RunDirectory) -> dict[str, Any]:
    """Build what the config says, train it in the run's directory, and return the results."""
    hydra_config = HydraConfig.get()
    try:
        use_given_cpus()
        if reason := refused_reason(hydra_config):
            raise ConfigError(reason)
        for note in left_out_messages(hydra_config):
            log.info(note)
        experiment = parse(cfg)  # refuses, like all up to check_batches, before any data is read
        torch.manual_seed(experiment.seed)
        model = experiment.build_model()
        experiment.build_optimizer(model)
        trainer, data, augmentation = experiment.trainer, experiment.data, experiment.augmentation
        check_batches(experiment.build_model, data, trainer)
        run.add_identity(image_set=data.image_set)
        results = broadcast_from_rank0(lambda: run.prepare(experiment.rerun, trainer.resume))
        if results:
            log.info("Already finished, and not run again: rerun=true starts over")
        else:
            try:
                results = trainer.fit(model, experiment.build_optimizer, data, augmentation, run, experiment.seed)
            finally:
                limit_memory(trainer.torch_device, None)  # not for telling of a failure, nor for the sweep's next job
    except ConfigError as error:
        if hydra_config.mode == RunMode.RUN:
            if rank() == 0 and not run.begun:
                undo_start()
        elif not run.results_path.exists():
            run.write_results(status="refused", error=str(error))
        raise
    except Exception as error:
        message = oom_message(cfg, error) if out_of_memory(error) else error
        run.write_failure(status="failed", error=first_paragraph(message), traceback=traceback.format_exc())
        if message is not error:
            raise message from error
        raise
    finally:
        # The next job of a sweep in this process must find the memory free.
        release_compiled()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if rank() == 0:
        print_results(results)
    if results.get("config_changes"):
        log.info("Continued under another config (config_changes in results.json): no single command reproduces this run")
    else:
        log.info("To reproduce: %s", run.identity["command"])
    return results


def oom_message(cfg: DictConfig, error: Exception) -> UserError:
    """What is told when the memory of the GPU or of the machine does not suffice."""
    kind = "GPU memory" if gpu_out_of_memory(error) else "memory"
    limit = cfg.trainer.memory_limit_gb
    under = f" under trainer.memory_limit_gb={limit}" if limit else ""
    at_once, tested = cfg.trainer.micro_batch or cfg.trainer.batch_size, cfg.trainer.eval_batch_size
    if at_once == "auto":
        return UserError(
            f"out of {kind}{under}, with trainer.micro_batch=auto; unless it happened in a test, of {tested} images at a time "
            f"(trainer.eval_batch_size), no smaller part of a batch would do: take a smaller model, or more memory"
        )
    twice = (
        "" if cfg.trainer.activation_checkpointing == "full" else "trainer.activation_checkpointing=full keeps less of each, "
    )
    return UserError(
        f"out of {kind}{under}, with {at_once} images at a time (trainer.batch_size={cfg.trainer.batch_size}) or {tested} in a "
        f"test (trainer.eval_batch_size); {twice}trainer.micro_batch={max(1, at_once // 2)} takes fewer and trains the same, "
        f"trainer.micro_batch=auto finds what fits"
    )


def launch(main: Callable[[], Any]) -> int:
    """Run ``main``, a function that Hydra has wrapped, with errors in one line each, and after a sweep the table of its jobs.

    Returns the exit status.
    """
    protect_output()
    # With this variable set Hydra lets its errors through, and they become one line here.
    wants_tracebacks = os.environ.setdefault("HYDRA_FULL_ERROR", "0") != "0"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Processes that a launcher starts must find vix, wherever this was called from.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CONFIG_DIR.parent), os.environ.get("PYTHONPATH"))))
    sys.argv[1:] = expand_arguments(sys.argv[1:])
    command = parse_command(sys.argv[1:])
    sweep: Sweep | None = None
    unfinished = 0
    problem: Exception | None = None
    stopped: SystemExit | KeyboardInterrupt | None = None
    try:
        outputs = sweep_outputs(command)
        if world_size() > 1 and outputs:
            print("error: -m: torchrun is for one run over several processes; start a sweep without it", file=sys.stderr)
            return 2
        if rank() > 0:  # the first process writes, and is heard
            sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
            logging.disable(logging.WARNING)
        sweep = Sweep(sys.argv, outputs) if outputs else None
    except Exception as error:
        problem = error
    with sweep or nullcontext():
        try:
            if not problem:
                main()
        except (SystemExit, KeyboardInterrupt) as error:
            stopped = error
        except Exception as error:
            problem = error
        unfinished = print_jobs(sweep) if sweep else 0
    if isinstance(stopped, SystemExit):
        if isinstance(stopped.code, int) and stopped.code > 128:  # by a signal: all is saved and told
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stopped.code)  # Python's own end would wait for the C++ compilers that a compiled step has started
        raise stopped
    if stopped:
        print("error: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    tellable = isinstance(problem, UserError | OSError) or (problem and is_hydra_error(problem))
    if problem and (wants_tracebacks or not (unfinished or tellable)):
        raise problem
    if rank() > 0:
        return 1 if problem else 0
    if unfinished:
        print(f"error: {unfinished} of this sweep's jobs did not finish", file=sys.stderr)
    elif problem:
        print(f"error: {format_error(problem, command.overrides, command.flags)}", file=sys.stderr)
    reported = print_report(sweep.outputs) if sweep and os.environ.get(REPORT) else True
    return 1 if problem or unfinished or not reported else 0


def print_jobs(sweep: Sweep) -> int:
    """Print every job of a sweep with its state, and return how many did not finish."""
    jobs = sweep.jobs()
    if not jobs:
        return 0
    sweep.outputs = list(dict.fromkeys(job["outputs"] for job in jobs))
    table = Table(title="jobs of this sweep")
    for column in ("job", "state", "top-1 %", "minutes", *(("why",) if any(job["error"] for job in jobs) else ())):
        table.add_column(column, justify="right" if column in ("top-1 %", "minutes") else "left", overflow="fold")
    for job, name in zip(jobs, distinct([job["parts"] for job in jobs]), strict=True):
        top1, seconds = job.get("top1"), job.get("seconds")
        shown = f"{top1:.2f}" if top1 is not None else "", f"{seconds / 60:.1f}" if seconds is not None else ""
        table.add_row(name, job["state"], *shown, *filter(None, [" ".join(job["error"].split())]))
    console().print(table)
    return sum(not job["state"].startswith("finished") for job in jobs)


def distinct(names: Sequence[Sequence[str]]) -> list[str]:
    """Names of runs, given as their parts, without the parts that all of them share."""
    shared = set.intersection(*map(set, names)) if len(names) > 1 else set()
    return [" ".join(part for part in name if part not in shared) or name[0] for name in names]


def print_report(directories: list[str]) -> bool:
    """``python -m vix report`` on the directories of a sweep; False where it fails."""
    from vix.cli.report import parse_arguments, report

    try:
        report(parse_arguments(directories))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    return True
