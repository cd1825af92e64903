"""Train a vision transformer, or sweep over many: ``python train.py [-m] [experiment=ROW] [group=option] [key=value]``

Hydra composes conf/ and the command line into a config; :func:`vix.cli.launch.run_job` builds what it says and trains it.
"""

import sys

import vix.system.threads  # noqa: F401  before PyTorch, whose OpenMP reads how its threads wait when it is imported

# isort: split
import hydra
from omegaconf import DictConfig

from vix.cli.launch import launch, run_job
from vix.composition.command import CONFIG_DIR, CONFIG_NAME
from vix.composition.compose import VERSION_BASE


@hydra.main(config_path=str(CONFIG_DIR), config_name=CONFIG_NAME, version_base=VERSION_BASE)
def main(cfg: DictConfig) -> float:
    """One job of a sweep, or a single run: returns its top-1 accuracy, which a search can maximize."""
    return run_job(cfg)


if __name__ == "__main__":
    sys.exit(launch(main))
