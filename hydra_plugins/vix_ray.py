"""``hydra/launcher=ray_gpus``: the launcher of hydra-ray-launcher, for jobs that are interrupted or whose machine fails.

It waits for every job of a sweep, also after one of them was lost; Ctrl-C lets the jobs save a checkpoint first; and jobs
run in the directory in which the sweep was started.
"""

import logging
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, filter_overrides, setup_globals
from omegaconf import OmegaConf, open_dict

from vix.errors import UserError, first_paragraph
from vix.runs.sweep import FOLDER, failed_return, record_end

try:
    from hydra_plugins.hydra_ray_launcher import ray_launcher
except ImportError:  # optional: Hydra reports the missing option of hydra/launcher
    ray_launcher = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

if ray_launcher:

    class RayLauncher(ray_launcher.RayLauncher):
        """Runs each run of a sweep as a task of Ray, and waits for all of them."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """Start the tasks and wait for all of them; a task that was lost returns the reason."""
            import ray

            tasks = self.submit(job_overrides, initial_job_idx)
            try:
                ray.wait(tasks, num_returns=len(tasks))
            except KeyboardInterrupt:
                log.warning("Ending the jobs, which save a checkpoint first")
                for task in tasks:
                    ray.cancel(task)  # as Ctrl-C in the task's process
                ray.wait(tasks, num_returns=len(tasks))
                raise
            numbered = enumerate(zip(tasks, job_overrides, strict=True), initial_job_idx)
            return [self.job_return(task, overrides, number) for number, (task, overrides) in numbered]

        def submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
            """Start a task per job."""
            import ray

            setup_globals()
            assert self.config is not None
            assert self.hydra_context is not None
            self.connect()
            options: Any = OmegaConf.to_container(self.ray_cfg.remote, resolve=True)
            run = ray.remote(**options)(run_job)
            tasks = []
            for number, overrides in enumerate(job_overrides, initial_job_idx):
                log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
                cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
                with open_dict(cfg):
                    cfg.hydra.job.id, cfg.hydra.job.num = f"job_id_for_{number}", number
                tasks.append(run.remote(os.getcwd(), self.hydra_context, cfg, self.task_function, Singleton.get_state()))
            return tasks

        def connect(self) -> None:
            """Start Ray, or connect to the cluster of the config. Raises UserError where none answers."""
            import ray
            from hydra_plugins.hydra_ray_launcher._launcher_util import start_ray

            if self.ray_cfg.init.get("address"):  # its machines do not have this command's environment
                variables = {key: value for key, value in os.environ.items() if key.startswith("VIX_")}
                with open_dict(self.ray_cfg):
                    carried = OmegaConf.create({"runtime_env": {"env_vars": variables}})
                    self.ray_cfg.init = OmegaConf.merge(carried, self.ray_cfg.init)
            address = str(self.ray_cfg.init.get("address"))
            host, _, port = address.rpartition(":")
            try:
                if re.fullmatch(r"[\w.-]+", host) and port.isdecimal():  # Ray itself tries for minutes
                    socket.create_connection((host, int(port)), timeout=10).close()
                start_ray(self.ray_cfg.init)
            except (OSError, ray.exceptions.AuthenticationError) as error:
                raise UserError(
                    f"hydra.launcher.ray.init.address={address}: no Ray cluster answers there ({first_paragraph(error)}); "
                    "start one with `ray start --head`, or set RAY_AUTH_MODE=token where it asks for a token"
                ) from error

        def job_return(self, task: Any, overrides: Sequence[str], number: int) -> JobReturn:
            """What a task returned; where it was lost, a failure with the reason, recorded for the sweep and the run."""
            import ray

            try:
                return ray.get(task)
            except ray.exceptions.RayError as error:
                message = first_paragraph(error)
            assert self.config is not None
            kind, state = ("out of memory", "failed") if "memory" in message else ("Ray lost the job", "interrupted")
            reason = f"{kind} ({message}); the same command continues it"
            record_end(Path(self.config.hydra.job.env_set[FOLDER]), number, filter_overrides(overrides), state, reason)
            return failed_return(overrides, reason)


def run_job(directory: str, hydra_context: Any, cfg: Any, task_function: Any, singleton_state: Any) -> JobReturn:
    """Run a job in this process, a worker of Ray, in the directory in which the sweep was started."""
    from hydra_plugins.hydra_ray_launcher._launcher_util import _run_job

    os.chdir(directory)
    try:
        return _run_job(hydra_context, cfg, task_function, singleton_state)
    except (SystemExit, KeyboardInterrupt):  # the run has recorded it; Ray would start the task again
        return failed_return(cfg.hydra.overrides.task, "interrupted; the same command continues it")
