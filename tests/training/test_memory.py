"""Memory that does not suffice: real train.py processes under a real limit, on a CPU and, where there is one, on a GPU."""

import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, run_train
from omegaconf import DictConfig, open_dict

from vix.analysis.cost import training_memory
from vix.build import parse
from vix.cli.launch import oom_message
from vix.errors import ConfigError
from vix.system.memory import check_memory_limit, limit_memory, out_of_memory

Compose = Callable[..., DictConfig]
CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RUN = (
    *("model=vit", "model.dim=64", "model.dropout=0.1", "attention=softmax", "embedding=linear", "posenc=learned"),
    *("data=digits", "data.train_size=800", "data.test_size=50", "trainer.batch_size=800", "trainer.eval_batch_size=50"),
    *("trainer.epochs=2", "trainer.precision=fp32", "trainer.compile=false"),
)


def half_of_it(compose_config: Compose, device: str) -> tuple[str, ...]:
    """Overrides that give this run half of the memory that its steps allocate."""
    run = (*RUN, f"trainer.device={device}")
    return (*run, f"trainer.memory_limit_gb={training_memory(parse(compose_config(*run))) / 2e9:.3f}")


def results(directory: Path, *overrides: str) -> dict[str, Any]:
    """Of the one run below ``directory`` whose command ends with these overrides."""
    found = [json.loads(path.read_text()) for path in directory.glob("outputs/**/results.json")]
    (one,) = [run for run in found if tuple(run["overrides"][-len(overrides) :]) == overrides]
    return one


@pytest.mark.parametrize("device", DEVICES)
def test_too_little_memory_is_one_line(compose_config: Compose, tmp_path: Path, device: str) -> None:
    """It names the limit, and the two ways out with their values."""
    arguments = half_of_it(compose_config, device)
    done = run_train(tmp_path, *arguments)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith(
        f"error: out of {'GPU ' if device == 'cuda' else ''}memory under {arguments[-1]}, with micro-batches of 800 images"
    )
    assert "trainer.micro_batch=400" in line
    assert "trainer.micro_batch=auto" in line
    assert "trainer.activation_checkpointing=full" in line
    assert "Traceback" not in done.stderr
    failed = results(tmp_path, arguments[-1])
    assert failed["status"] == "failed"
    assert line == f"error: {failed['error']}"


def test_it_is_said_for_options_that_the_trainers_file_leaves_out(compose_config: Compose) -> None:
    cfg = compose_config(*TINY)
    with open_dict(cfg):
        for option in ("micro_batch", "eval_batch_size", "activation_checkpointing", "memory_limit_gb"):
            del cfg.trainer[option]
    assert str(oom_message(cfg, MemoryError())).startswith(
        "out of memory, with micro-batches of 20 images (trainer.batch_size=20) in training and trainer.eval_batch_size=256"
    )


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_the_largest_micro_batch_that_fits(compose_config: Compose, tmp_path: Path, device: str) -> None:
    """Where the whole batch does not fit, auto finds a part that does, and the trials leave no trace in what is computed."""
    arguments = half_of_it(compose_config, device)
    done = run_train(tmp_path, *arguments, "trainer.micro_batch=auto")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path, "trainer.micro_batch=auto")
    size = found["micro_batch"]
    assert size in (400, 200, 100)
    assert re.search(rf"Micro-batch: {size} images of 800 fit the memory", done.stdout + done.stderr)

    done = run_train(tmp_path, *arguments, f"trainer.micro_batch={size}")
    assert done.returncode == 0, done.stderr
    given = results(tmp_path, f"trainer.micro_batch={size}")
    losses, expected = ([row["train_loss"] for row in run["history"]] for run in (found, given))
    assert losses == (expected if device == "cpu" else pytest.approx(expected, rel=1e-5))
    if device == "cuda":
        assert found["peak_gpu_reserved_gb"] + found["resident_data_gb"] <= float(arguments[-1].split("=")[1])


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_no_job_inherits_a_limit(compose_config: Compose, tmp_path: Path, device: str) -> None:
    """After a job that its limit ended, the next one in the same process has all memory."""
    *run, limit = half_of_it(compose_config, device)
    done = run_train(tmp_path, "-m", *run, f"{limit},null")
    assert done.returncode == 1
    assert results(tmp_path, limit)["status"] == "failed"
    assert results(tmp_path, "trainer.memory_limit_gb=null")["status"] == "finished", done.stderr


def test_a_limit_is_lifted_to_what_the_process_began_with() -> None:
    """PyTorch's own shortage and Python's are recognised; oneDNN is off meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit_memory(CPU, 0.05)
    try:
        assert resource.getrlimit(resource.RLIMIT_DATA) != before
        # More than earlier tests of this process can have left to the C allocator, which would not ask for it.
        for take in (lambda: torch.empty(10**10, dtype=torch.uint8), lambda: bytearray(10**10)):
            with pytest.raises((RuntimeError, MemoryError)) as shortage:
                take()
            assert out_of_memory(shortage.value)
        assert not torch.backends.mkldnn.enabled
        torch.empty(10**7, dtype=torch.uint8)
    finally:
        limit_memory(CPU, None)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert torch.backends.mkldnn.enabled
    torch.empty(10**8, dtype=torch.uint8)


def test_other_errors_are_no_shortage() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not out_of_memory(error.value)


def test_a_device_without_limits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.memory_limit_gb=4\.0: .*use null$"):
        check_memory_limit(torch.device("meta"), 4.0)
    if torch.cuda.is_available():
        with pytest.raises(ConfigError, match="this GPU has"):
            check_memory_limit(torch.device("cuda"), 1e6)
