"""What several test files share: composed configs, real runs of the program, and real CIFAR-10."""

import os

# There is a test process on each core, and threads that wait for one another on busy cores take many times as long. Set before
# PyTorch is imported, and inherited by the programs that the tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from vix.compose import compose

ROOT = Path(__file__).parents[1]

# A model that trains in a second, on real images: for tests of everything but the model.
TINY = (
    "experiment=quickstart",
    "model.dim=16",
    "model.depth=1",
    "attention.heads=2",
    "data.train_size=100",
    "data.test_size=50",
    "trainer.batch_size=20",
    "trainer.epochs=2",
    "trainer.precision=fp32",
)


@pytest.fixture
def compose_config() -> Callable[..., DictConfig]:
    """``compose_config(*overrides)``: the config that ``python train.py OVERRIDES`` would run."""

    def composed(*overrides: str) -> DictConfig:
        return compose(overrides)

    return composed


def run_train(
    directory: Path, *arguments: str, program: Path = ROOT / "train.py", **env: str
) -> subprocess.CompletedProcess[str]:
    """``python train.py ARGUMENTS`` as a user runs it, with its outputs/ below ``directory``."""
    return subprocess.run(
        [sys.executable, str(program), *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **env},
        check=False,
    )


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real CIFAR-10: VIX_DATA, or unpacked from the archive beside this project."""
    root = Path(os.environ.get("VIX_DATA", ROOT / "data"))
    if (root / "cifar-10-batches-py").is_dir():
        return root
    unpack = ROOT.parent / "shared" / "cifar10" / "unpack_cifar10.py"
    if not unpack.is_file():
        pytest.skip("CIFAR-10 is not on this machine: set VIX_DATA to the folder that holds cifar-10-batches-py")
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(unpack), "--out", str(root)], check=True, capture_output=True, timeout=300)
    return root
