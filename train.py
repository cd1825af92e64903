"""Train a vision transformer, or sweep over many: ``python train.py [-m] [experiment=ROW] [group=option] [key=value]``"""

import gc
import logging
import os
import signal
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vix.batch_sizes import check_batches
from vix.build import build, build_model, optimizer_builder
from vix.checks import ConfigError, UserError
from vix.command_line import about_the_command, explain, git_commit, one_line, repeating_command, run_name
from vix.config import GROUPS, check
from vix.console import protect_output
from vix.distributed import from_first, process_group, processes, rank
from vix.files import only_writer
from vix.memory import limit_memory, out_of_memory
from vix.progress import show_results
from vix.run import Run
from vix.sweep import Job, Sweep, is_sweep

CONFIG_DIR = Path(__file__).parent.resolve() / "conf"
log = logging.getLogger("vix")
OmegaConf.register_new_resolver("run_name", run_name)


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> float:
    """One job of a sweep, or a single run: returns its top-1 accuracy, which a search can maximise."""
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
        "command": repeating_command(job.overrides.task),
        "git_commit": git_commit(),
        "torch": torch.__version__,
    }
    try:
        number = job.job.num if job.mode == RunMode.MULTIRUN else 0
        held = only_writer(directory) if rank() == 0 else nullcontext()  # the first of several processes holds it for all
        with Job(identity["name"], number, cfg.get("fail_fast") is True) as this_job, held, process_group():
            run = Run(directory, identity, OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
            results = train(cfg, run)
            this_job.finished(results, before=results is run.earlier)
            return float(results["top1"])
    except Exception as error:
        if job.mode == RunMode.MULTIRUN:  # the sweep goes on, and its end would tell the first failure only
            log.error("%s: %s", identity["name"], one_line(error))
        elif isinstance(error, UserError):
            sys.exit(f"error: {error}")
        raise


def train(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Build what the config says, train it in the run's directory, and return the results."""
    try:
        check(cfg)  # refuses, like all up to check_batches, before any data is read
        torch.manual_seed(cfg.seed)
        model = build_model(cfg)
        make_optimizer = optimizer_builder(cfg)
        make_optimizer(model)
        trainer, data = build(cfg, "trainer"), build(cfg, "data")
        check_batches(lambda: build_model(cfg), data, trainer)
        if cfg.get("rerun") and rank() == 0:
            run.set_aside()
        results = from_first(lambda: run.finished(trainer.resume))
        if results:
            log.info("Finished before, and not run again: rerun=true starts over")
        else:
            try:
                results = trainer.fit(model, make_optimizer, data, run, cfg.seed)
            finally:
                limit_memory(trainer.torch_device, None)  # not for telling of a failure, nor for the sweep's next job
    except ConfigError as error:
        if HydraConfig.get().mode == RunMode.RUN:
            run.discard_if_empty()
        elif not run.results_path.exists():
            run.write_results(status="refused", error=str(error))
        raise
    except Exception as error:
        told = shortage(cfg, error) if out_of_memory(error) else error
        run.write_results(status="failed", error=one_line(told), traceback=traceback.format_exc())
        if told is not error:
            raise told from error
        raise
    finally:
        # The next job of a sweep in this process must find the memory free.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if rank() == 0:
        show_results(results)
    log.info("The same again: %s", run.identity["command"])
    return results


def shortage(cfg: DictConfig, error: Exception) -> UserError:
    """What is told when the memory of the GPU or of the machine does not suffice."""
    kind = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
    limit = cfg.trainer.memory_limit_gb
    under = f" under trainer.memory_limit_gb={limit}" if limit else ""
    at_once, tested = cfg.trainer.micro_batch or cfg.trainer.batch_size, cfg.trainer.eval_batch_size
    if at_once == "auto":
        return UserError(
            f"out of {kind}{under}, with trainer.micro_batch=auto; unless it happened in a test, of {tested} images at a time "
            f"(trainer.eval_batch_size), no smaller part of a batch would do: take a smaller model, or more memory"
        )
    twice = "" if cfg.trainer.recompute == "everything" else "trainer.recompute=everything keeps less of each, "
    return UserError(
        f"out of {kind}{under}, with {at_once} images at a time (trainer.batch_size={cfg.trainer.batch_size}) or {tested} in a "
        f"test (trainer.eval_batch_size); {twice}trainer.micro_batch={max(1, at_once // 2)} takes fewer and trains the same, "
        f"trainer.micro_batch=auto finds what fits"
    )


def run_from_command_line() -> int:
    """Hydra's ``main`` with its errors in one line each, and after a sweep the table of its jobs. Returns the exit status."""
    protect_output()
    # With this variable set Hydra lets its errors through, and they become one line here.
    wants_tracebacks = os.environ.setdefault("HYDRA_FULL_ERROR", "0") != "0"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Processes that a launcher starts must find vix, wherever this was called from.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CONFIG_DIR.parent), os.environ.get("PYTHONPATH"))))
    if processes() > 1:
        if is_sweep(sys.argv):
            print("error: -m: torchrun is for one run over several processes; start a sweep without it", file=sys.stderr)
            return 2
        if rank() > 0:  # the first process writes, and is heard
            sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
            logging.disable(logging.WARNING)
    with Sweep(sys.argv, CONFIG_DIR / "config.yaml") if is_sweep(sys.argv) else nullcontext() as sweep:
        problem: Exception | None = None
        stopped: SystemExit | KeyboardInterrupt | None = None
        try:
            main()
        except (SystemExit, KeyboardInterrupt) as error:
            stopped = error
        except Exception as error:
            problem = error
        unfinished = sweep.show() if sweep else 0
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
    tellable = isinstance(problem, UserError | OSError) or (problem and about_the_command(problem))
    if problem and (wants_tracebacks or not (unfinished or tellable)):
        raise problem
    if rank() > 0:
        return 1 if problem else 0
    if unfinished:
        print(f"error: {unfinished} of this sweep's jobs did not finish", file=sys.stderr)
    elif problem:
        told = explain(problem, CONFIG_DIR, sys.argv[1:])
        print(f"error: {told}", file=sys.stderr)
    return 1 if problem or unfinished else 0


if __name__ == "__main__":
    sys.exit(run_from_command_line())
