"""Batches that a layer refuses, and numbers that overflow, are refused before any training."""

from collections.abc import Callable
from pathlib import Path

import pytest
from common import fit
from conftest import run_train
from omegaconf import DictConfig
from torch import Tensor

from vix.build import build_model, parse
from vix.cli.plan import plan
from vix.errors import ConfigError
from vix.training.batch_sizes import check_batches
from vix.training.micro_batch import smallest_part
from vix.training.train_step import TrainStep

Compose = Callable[..., DictConfig]
LEVIT = ("experiment=levit_pyramid", "data=digits")


def refuse(cfg: DictConfig) -> None:
    check_batches(lambda: build_model(cfg), parse(cfg).data, parse(cfg).trainer)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.batch_size=718"],
            r"^trainer\.batch_size=718: of 1437 .* 1 image at a time.*needs at least 2 .*work: 717, 719$",
        ),
        (["trainer.batch_size=1"], r"^trainer\.batch_size=1: .*nearest that work: 3$"),
        (["trainer.micro_batch=1"], r"^trainer\.micro_batch=1: .*nearest that work: 5$"),
        (["trainer.batch_size=100", "trainer.micro_batch=99"], r"^trainer\.micro_batch=99: .*nearest that work: 98, 100$"),
    ],
)
def test_a_batch_too_small_for_batchnorm(compose_config: Compose, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        refuse(compose_config(*LEVIT, *overrides))
    assert "\n" not in str(error.value)
    for fine in error.value.args[0].rpartition(": ")[2].split(", "):
        key = error.value.args[0].partition("=")[0]
        refuse(compose_config(*LEVIT, *overrides, f"{key}={fine}"))


def test_shares_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert smallest_part(128, 64, None) == 16
    assert smallest_part(129, 64, None) == 1
    assert smallest_part(7 * 64 + 10, 64, None) == 2
    assert smallest_part(128, 64, 5) == 1


def test_an_automatic_micro_batch_leaves_no_single_image(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one, BatchNorm cannot train: sizes that leave one of a batch of 32, or of the last one of 17, are not tried."""
    cfg = compose_config(*LEVIT, "data.train_size=49", "data.test_size=10", "trainer.batch_size=32", "trainer.epochs=1")
    cfg.trainer.micro_batch = "auto"
    tried: list[int] = []

    def fits(_: TrainStep, size: int, *__: Tensor, last: bool) -> bool:
        tried.append(size)
        return last

    monkeypatch.setattr("vix.training.micro_batch.fits", fits)
    results, _ = fit(cfg, tmp_path / "run")
    assert tried == [32, 15, 7, 3]
    assert (results["status"], results["micro_batch"]) == ("finished", 3)


def test_models_without_batchnorm_train_on_one_image(compose_config: Compose) -> None:
    refuse(compose_config("experiment=quickstart", "trainer.batch_size=1"))
    refuse(compose_config(*LEVIT, "trainer.batch_size=719"))


def test_the_plan_and_the_program_say_it(tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    (job,) = plan([*LEVIT, "trainer.batch_size=718"])
    assert job.state == "refused"
    done = run_train(tmp_path, *LEVIT, "trainer.batch_size=718")  # type: ignore[arg-type]
    assert done.returncode == 1
    assert done.stderr == f"error: {job.reason}\n"


@pytest.mark.parametrize(
    "override",
    [
        *("seed=18446744073709551616", f"seed={10**400}", f"trainer.epochs={10**400}", f"trainer.batch_size={10**30}"),
        *(f"trainer.eval_batch_size={2**63}", f"augment.crop_padding={2**62}", f"data.train_size={10**30}"),
    ],
)
def test_numbers_that_overflow(compose_config: Compose, override: str) -> None:
    with pytest.raises(ConfigError, match=f"^{override.partition('=')[0]}=") as error:
        parse(compose_config("experiment=quickstart", override))
    assert "\n" not in str(error.value)


def test_the_largest_seed(compose_config: Compose) -> None:
    parse(compose_config("experiment=quickstart", f"seed={2**64 - 1}"))


def test_augmentation_of_images_that_are_too_small(compose_config: Compose) -> None:
    cfg = compose_config("data=imagefolder", "data.classes=2", "data.image_size=2", "augment.trivial_augment=1.0")
    with pytest.raises(ConfigError, match=r"^augment\.trivial_augment=1\.0: needs images of 3 pixels"):
        assert parse(cfg).augmentation
