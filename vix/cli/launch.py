"""``train.py``: runs one job from its config to its results, and maps errors to one-line messages and exit codes."""

import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from vix.build import GROUPS, parse
from vix.composition.command import (
    CONFIG_DIR,
    Command,
    expand_arguments,
    flags_of,
    parse_command,
    reproduce_command,
    resolved_overrides,
    typed_overrides,
)
from vix.composition.compose import (
    digest_of_images,
    digest_of_weights,
    format_error,
    is_hydra_error,
    is_search,
    left_out_messages,
    naming_file,
    no_jobs,
    os_error,
    refused_reason,
    sweep_outputs,
)
from vix.config import to_plain
from vix.errors import ConfigError, UserError, first_paragraph
from vix.reporting.console import console, protect_output
from vix.reporting.progress import print_results
from vix.runs.identity import git_commit, run_name_parts
from vix.runs.run import RunDirectory
from vix.runs.snapshot import undo_start
from vix.runs.sweep import RERUN, JobStatus, NotRunError, Sweep, rerun_file
from vix.system.distributed import (
    PeerLostError,
    broadcast_from_rank0,
    check_environment,
    connect_gpus,
    peer_lost,
    process_group,
    rank,
    world_size,
)
from vix.system.files import LockedError, exclusive_lock, expand_home, run_directory_name
from vix.system.memory import gpu_out_of_memory, limit_memory, out_of_memory
from vix.system.threads import use_given_cpus
from vix.training.batch_sizes import check_batches
from vix.training.compile import release_compiled
from vix.training.init_from import fit_weights, init_identity
from vix.training.trainer import Trainer

REPORT = "VIX_REPORT"  # environment variable that sweep.sh sets: print the report of all runs after the sweep
log = logging.getLogger("vix")


def run_job(cfg: DictConfig) -> float:
    """Run one job in its output directory, and return its top-1 accuracy in percent.

    cfg: the config that Hydra composed for the job.

    Errors of a job of a sweep are logged in one line and raised; a UserError of a single run ends the process.
    """
    protect_output()  # a launcher may have started this process
    job = HydraConfig.get()
    if job.job.chdir:
        make_paths_absolute(cfg, Path(job.runtime.cwd))
    choices, overrides = job.runtime.choices, resolved_overrides(job.overrides.task, cfg)
    directory = Path(job.runtime.output_dir)
    identity = {
        "name": run_directory_name(directory),
        "experiment": choices.get("experiment"),
        "recipe": choices.get("recipe"),
        **{group: choices.get(group) for group in GROUPS if group not in ("trainer", "logger")},
        "overrides": overrides,
        "seed": cfg.get("seed"),
        "command": reproduce_command(job, overrides),
        "git_commit": git_commit(),
        "torch": torch.__version__,
    }
    try:
        number = job.job.num if job.mode == RunMode.MULTIRUN else 0
        lock = exclusive_lock(directory) if rank() == 0 else nullcontext()  # rank 0 holds it for all processes
        digests = digest_of_images(cfg), digest_of_weights(cfg)
        parts = [*run_name_parts(choices, overrides, *digests), f"seed={cfg.get('seed')}"]
        outputs = str(job.sweep.dir) if job.mode == RunMode.MULTIRUN else ""
        status = JobStatus(parts, number, cfg.get("fail_fast") is True, outputs, directory)
        with process_group(), status as job_status, lock:
            run = RunDirectory(directory, identity, plain_config(cfg), os.environ.get(RERUN, ""))
            job_status.update(results=run.results)  # for a job that is killed before it writes them
            results = train(cfg, run)
            job_status.finished(results, before=results is run.previous_results)
            return float(results["top1"])
    except Exception as error:
        if isinstance(error, LockedError | NotRunError):
            undo_start(locked=True)
        if job.mode == RunMode.MULTIRUN:  # the sweep continues, and Hydra reports only the first failure at its end
            log.error("%s: %s", identity["name"], first_paragraph(error))
        elif isinstance(error, UserError):
            sys.exit(f"error: {error}")
        raise


def make_paths_absolute(cfg: DictConfig, directory: Path) -> None:
    """Make the paths of what a run reads absolute, in place: with ``hydra.job.chdir``, its directory is the current one.

    directory: in which the command was started.
    """
    for key in ("data.root", "trainer.init_from"):
        with suppress(OmegaConfBaseException, UserError):  # reported by vix.build.parse
            path = OmegaConf.select(cfg, key)
            if isinstance(path, str):
                OmegaConf.update(cfg, key, str(directory / expand_home(path)))


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """A config as plain containers; with its ``${…}`` where one cannot be resolved, which :func:`vix.build.parse` reports."""
    try:
        return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]
    except (OmegaConfBaseException, RecursionError):
        return OmegaConf.to_container(cfg, resolve=False)  # type: ignore[return-value]


def train(cfg: DictConfig, run: RunDirectory) -> dict[str, Any]:
    """Build and train the model of a config in the run's directory, and return the results.

    Raises ConfigError where the config is invalid, and UserError where memory does not suffice. The status in results.json is
    then ``refused`` or ``failed``.
    """
    try:
        results = build_and_fit(cfg, run)
    except ConfigError as error:
        record_refusal(run, error)
        raise
    except Exception as error:
        message = oom_message(cfg, error) if out_of_memory(error) else peer_lost(error) or error
        status = "interrupted" if isinstance(message, PeerLostError) else "failed"
        run.write_failure(status=status, error=first_paragraph(message), traceback=traceback.format_exc())
        if message is not error:
            raise message from error
        raise
    finally:
        free_memory()
    if rank() == 0:
        print_results(results)
    if results.get("config_changes"):
        log.info("Resumed under another config (config_changes in results.json): no single command reproduces this run")
    else:
        log.info("To reproduce: %s", run.identity["command"])
    return results


def build_and_fit(cfg: DictConfig, run: RunDirectory) -> dict[str, Any]:
    """Parse the config, build what it says and train it; skip a run that is already finished."""
    use_given_cpus()
    hydra_config = HydraConfig.get()
    if reason := refused_reason(hydra_config):
        raise ConfigError(reason)
    for note in left_out_messages(hydra_config):
        log.info(note)
    typed = [*typed_overrides(hydra_config.overrides.hydra), *typed_overrides(hydra_config.overrides.task)]
    with naming_file(typed, flags_of(hydra_config)):
        experiment = parse(cfg)  # config errors are raised here and up to check_batches, before data is read
        torch.manual_seed(experiment.seed)
        model = experiment.build_model()
        experiment.build_optimizer(model)
        trainer, data, augmentation = experiment.trainer, experiment.data, experiment.augmentation
        experiment.check_optimizer_step()
        check_batches(experiment.build_model, data, trainer)
        make_logger = experiment.logger
    run.add_identity(image_set=data.image_set, defaults=experiment.defaults, **init_identity(trainer.init_from))
    results = broadcast_from_rank0(
        lambda: run.prepare(experiment.rerun, trainer.resume, lambda: fit_weights(model, trainer.init_from))
    )
    if results:
        log.info("Already finished, skipping (%s)", "in this rerun" if experiment.rerun else "rerun=true starts over")
        return results
    connect_gpus(trainer.torch_device)
    try:
        return trainer.fit(model, experiment.build_optimizer, data, augmentation, run, experiment.seed, make_logger)
    finally:
        limit_memory(trainer.torch_device, None)  # for the error handling, and the next job of a sweep


def record_refusal(run: RunDirectory, error: ConfigError) -> None:
    """Leave no trace of a refused single run; write the reason into the directory of a refused job of a sweep.

    Where that holds an earlier run, it stays as it is.
    """
    if HydraConfig.get().mode == RunMode.RUN:
        if rank() == 0 and not run.begun:
            undo_start()
    elif not run.results_path.exists():
        run.write_results(status="refused", error=str(error))
    elif not run.begun:
        undo_start(locked=True)


def free_memory() -> None:
    """Free what a run holds, for the next job of a sweep in this process."""
    release_compiled()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def oom_message(cfg: DictConfig, error: Exception) -> UserError:
    """The error for an out-of-memory error of the GPU or of the machine, with the options that reduce memory."""
    kind = "GPU memory" if gpu_out_of_memory(error) else "memory"
    # The trainer's file may leave options out.
    defaults: dict[str, Any] = {field.name: field.default for field in fields(Trainer)}
    options = defaults | to_plain(cfg, "trainer")
    limit, batch_size, eval_batch = options["memory_limit_gb"], options["batch_size"], options["eval_batch_size"]
    under = f" under trainer.memory_limit_gb={limit}" if limit else ""
    micro_batch = options["micro_batch"] or batch_size
    if micro_batch == "auto":
        return UserError(
            f"out of {kind}{under}, with trainer.micro_batch=auto; if in training, even the smallest micro-batch does not fit: "
            f"use a smaller model or more memory; if in evaluation, reduce trainer.eval_batch_size={eval_batch}"
        )
    full = options["activation_checkpointing"] == "full"
    checkpointing = "" if full else "trainer.activation_checkpointing=full stores fewer activations, "
    return UserError(
        f"out of {kind}{under}, with micro-batches of {micro_batch} images (trainer.batch_size={batch_size}) in "
        f"training and trainer.eval_batch_size={eval_batch} in evaluation; {checkpointing}"
        f"trainer.micro_batch={max(1, micro_batch // 2)} uses smaller micro-batches and trains the same, "
        "trainer.micro_batch=auto finds a size that fits"
    )


def launch(main: Callable[[], Any]) -> int:
    """Run ``main``, a function wrapped by ``hydra.main``; print errors in one line, and after a sweep the table of its jobs.

    Returns the exit code: 0, 1 for an error or an unfinished job, 2 for wrong usage, 128 + N after signal N.
    """
    protect_output()
    try:
        check_environment()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # With this variable set, Hydra raises its errors instead of printing them; they are printed in one line below.
    wants_tracebacks = os.environ.setdefault("HYDRA_FULL_ERROR", "0") != "0"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Processes started by a launcher must be able to import vix, whatever the working directory.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CONFIG_DIR.parent), os.environ.get("PYTHONPATH"))))
    try:
        sys.argv[1:] = expand_arguments(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = parse_command(sys.argv[1:])
    sweep: Sweep | None = None
    unfinished = 0
    failure: BaseException | None = None
    try:
        outputs = sweep_outputs(command)
        if world_size() > 1 and outputs:
            print("error: -m: torchrun starts one run in several processes; start a sweep without it", file=sys.stderr)
            return 2
        if rank() > 0:  # only rank 0 writes files and logs
            sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
            logging.disable(logging.WARNING)
        sweep = Sweep(sys.argv, outputs, rerun_file(outputs, command.overrides, command.flags)) if outputs else None
    except Exception as error:
        failure = error
    with sweep or nullcontext():
        failure = failure or raised_by(main)
        unfinished = unfinished_jobs(command, sweep, failure) if sweep else 0
        if sweep and not failure and not sweep.jobs():
            failure = no_jobs(command.overrides)
        if sweep and not failure and not unfinished:
            sweep.end_rerun()
    if isinstance(failure, SystemExit):
        leave(failure)
    if isinstance(failure, KeyboardInterrupt):
        print("error: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    return exit_code(command, sweep, failure, unfinished, wants_tracebacks)


def raised_by(main: Callable[[], Any]) -> BaseException | None:
    """What a call of ``main`` raises; None where it returns. From here on Ctrl-C raises KeyboardInterrupt (see train.py)."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except ValueError as error:
        return os_error(error)  # logging cannot open the log file
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return error
    return None


def leave(stop: SystemExit) -> NoReturn:
    """End the process with the code of an exit that was requested; after a signal without waiting for other processes."""
    if isinstance(stop.code, int) and stop.code > 128:  # a signal: everything is already saved and logged
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code)  # a normal exit would wait for the C++ compilers that a compiled step has started
    raise stop


def exit_code(
    command: Command, sweep: Sweep | None, failure: BaseException | None, unfinished: int, wants_tracebacks: bool
) -> int:
    """Print what failed in one line, and the report that sweep.sh requests; return the exit code.

    Raises ``failure`` where it is a fault of the program and not of its usage, or tracebacks are requested.
    """
    if isinstance(failure, Exception):
        user_error = isinstance(failure, UserError | OSError) or is_hydra_error(failure)
        if wants_tracebacks or not (unfinished or user_error):
            raise failure
    if rank() > 0:
        return 1 if failure else 0
    if unfinished:
        print(f"error: {unfinished} of this sweep's jobs did not finish", file=sys.stderr)
    elif isinstance(failure, Exception):
        print(f"error: {format_error(failure, command.overrides, command.flags)}", file=sys.stderr)
    reported = print_report(sweep.outputs) if sweep and os.environ.get(REPORT) else True
    return 1 if failure or unfinished or not reported else 0


def unfinished_jobs(command: Command, sweep: Sweep, failure: BaseException | None) -> int:
    """Print the table of a sweep's jobs, and return how many did not finish; of a search, 0 where some trials did."""
    unfinished = print_jobs(sweep)
    if not failure and 0 < unfinished < len(sweep.jobs()) and is_search(command):
        print(f"{unfinished} trials did not finish, and were not chosen", file=sys.stderr)
        return 0
    return unfinished


def print_jobs(sweep: Sweep) -> int:
    """Print a table of the jobs of a sweep with their states, and return the number of unfinished jobs."""
    jobs = sweep.jobs()
    if not jobs:
        return 0
    sweep.outputs = list(dict.fromkeys(job["outputs"] for job in jobs))
    table = Table(title="jobs of this sweep")
    for column in ("job", "state", "top-1 %", "minutes", *(("reason",) if any(job["error"] for job in jobs) else ())):
        table.add_column(column, justify="right" if column in ("top-1 %", "minutes") else "left", overflow="fold")
    for job, name in zip(jobs, distinct([job["parts"] for job in jobs]), strict=True):
        top1, seconds = job.get("top1"), job.get("seconds")
        shown = f"{top1:.2f}" if top1 is not None else "", f"{seconds / 60:.1f}" if seconds is not None else ""
        table.add_row(name, job["state"], *shown, *filter(None, [" ".join(job["error"].split())]))
    console().print(table)
    return sum(not job["state"].startswith("finished") for job in jobs)


def distinct(names: Sequence[Sequence[str]]) -> list[str]:
    """Names of runs, given as lists of parts, without the parts that all of them share."""
    shared = set.intersection(*map(set, names)) if len(names) > 1 else set()
    return [" ".join(part for part in name if part not in shared) or name[0] for name in names]


def print_report(directories: list[str]) -> bool:
    """Print the report of the directories of a sweep; False where that fails."""
    from vix.cli.report import parse_arguments, report

    try:
        report(parse_arguments(directories))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    return True
