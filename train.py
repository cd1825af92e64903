"""Train a vision transformer, or sweep over several: ``python train.py [-m] [experiment=ROW] [group=option] [key=value]``

Hydra composes a config from conf/ and the command line; :func:`vix.cli.launch.run_job` builds the model and trains it.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends the process without a traceback; vix.cli.launch.raised_by restores the handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import vix.system.threads  # noqa: F401  before PyTorch, because OpenMP reads its wait policy when PyTorch is imported

# isort: split
import hydra
from omegaconf import DictConfig

from vix.cli.launch import launch, run_job
from vix.composition.command import CONFIG_DIR, CONFIG_NAME
from vix.composition.compose import VERSION_BASE


@hydra.main(config_path=str(CONFIG_DIR), config_name=CONFIG_NAME, version_base=VERSION_BASE)
def main(cfg: DictConfig) -> float:
    """Run one job of a sweep, or a single run, and return its top-1 accuracy in percent, which a search can maximize."""
    return run_job(cfg)


if __name__ == "__main__":
    sys.exit(launch(main))
