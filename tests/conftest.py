"""What several test files share: composed configs, real runs of the program, and real CIFAR-10."""

import os

# There is a test process on each core, and threads that wait for one another on busy cores take many times as long. Set before
# PyTorch is imported, and inherited by the programs that the tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forked import PROGRAM, Forked
from omegaconf import DictConfig

from vix.composition.compose import compose

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

# Every mixer of the rows, every family, rotary positions and a convolutional embedding.
VARIED = ("vit_rope", "vip_rope", "hybrid_vil_rope", "fnet", "mixer", "ccl", "cvt", "cvn", "hybrid_pip", "levit", "levin")
# All experiments: `pytest` takes the ones above, `pytest -m slow` the others. (Every row trains a step in test_gradients.py.)
EXPERIMENTS = [
    pytest.param(path.stem, marks=[] if path.stem in VARIED else pytest.mark.slow)
    for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
]


def pytest_configure(config: pytest.Config) -> None:
    """Hide this machine's GPUs from all tests but those of ``pytest -m gpu``, so that the others do the same everywhere."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where none is visible, and tests/engines unless VIX_ENGINES is set (docs/sweeps.md)."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU, and `pytest -m gpu`")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    if not os.environ.get("VIX_ENGINES"):
        skip = pytest.mark.skip(reason="starts Slurm, Ray or network namespaces on this machine: set VIX_ENGINES=1")
        for item in items:
            if "engines" in item.path.parts:
                item.add_marker(skip)


@pytest.fixture
def compose_config() -> Callable[..., DictConfig]:
    """``compose_config(*overrides)``: the config that ``python train.py OVERRIDES`` would run, a copy for each call.

    Hydra takes a fifth of a second for one, and many tests ask for the same experiment.
    """

    def composed(*overrides: str) -> DictConfig:
        key = (os.getcwd(), *overrides)
        if key not in COMPOSED:
            COMPOSED[key] = compose(overrides)
        return copy.deepcopy(COMPOSED[key])

    return composed


COMPOSED: dict[tuple[str, ...], DictConfig] = {}


@pytest.fixture(autouse=True)
def unchanged_environment() -> Iterator[None]:
    """Undo what a test, or a library in its process, changes in the environment.

    Otherwise every ``run_train`` after it would start a new interpreter, which takes four times as long.
    """
    before = dict(os.environ)
    yield
    for name in {*before, *os.environ} - {"PYTEST_CURRENT_TEST"}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


# No test waits longer for a process: it hangs. Not a bound on speed, so far beyond what a slow machine takes.
HANGS = 3600.0

# Variables that a forked process still reads; all others may matter when Python starts or a library is imported.
READ_LATE = {
    "COLUMNS",
    "HYDRA_FULL_ERROR",
    "PYTEST_CURRENT_TEST",
    "TERM",
    "TORCHINDUCTOR_CACHE_DIR",
    "VIX_DATA",
    "VIX_PACKAGES",
}
AT_START: dict[str, str] = {}


def pytest_collection_finish() -> None:
    """Note the environment when everything is imported: libraries set variables, too."""
    AT_START.update(os.environ)


def run_train(
    directory: Path, *arguments: str, program: Path = PROGRAM, fresh: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """``python train.py ARGUMENTS`` as a user runs it, with its outputs/ below ``directory``.

    It runs in a process that is forked from one which has imported the libraries (forked.py), unless ``fresh`` asks for a new
    interpreter, or a variable needs one that is read when a library is imported.
    """
    environment = {**os.environ, **env}
    changed = {name for name, _ in environment.items() ^ AT_START.items()}
    if fresh or changed - READ_LATE:
        words = ["-m", program.parent.name] if program.name == "__main__.py" else [str(program)]
        paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        return subprocess.run(
            [sys.executable, *words, *arguments],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=HANGS,
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            check=False,
        )
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        processes = Forked()
        process = processes.start(directory, *arguments, program=program, stdout=stdout, stderr=stderr, **env)
        try:
            status = processes.wait(process, HANGS)
        finally:
            processes.kill_all()
        return subprocess.CompletedProcess(["train.py", *arguments], status, stdout.read_text(), stderr.read_text())


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    """Starts ``train.py`` processes in the background, and ends those that a failed test leaves."""
    forked = Forked()
    yield forked
    forked.kill_all()


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real CIFAR-10: VIX_DATA, or unpacked from the archive next to this project."""
    root = Path(os.environ.get("VIX_DATA", ROOT / "data"))
    if (root / "cifar-10-batches-py").is_dir():
        return root
    unpack = ROOT.parent / "shared" / "cifar10" / "unpack_cifar10.py"
    if not unpack.is_file():
        pytest.skip("CIFAR-10 is not on this machine: set VIX_DATA to the folder that holds cifar-10-batches-py")
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(unpack), "--out", str(root)], check=True, capture_output=True, timeout=HANGS)
    return root
