"""trainer.activation_checkpointing: the same gradients, random numbers and statistics, in less memory."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import fit
from conftest import ROOT, TINY, run_train
from omegaconf import DictConfig
from torch import Tensor, nn

from vix import build_model
from vix.analysis.measure import most_allocated
from vix.layers.checkpointing import Block, set_activation_checkpointing
from vix.training.train_step import mean_loss

Compose = Callable[..., DictConfig]
TWICE = ("selective", "full")
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
# On 8 × 8 pixels, with whatever draws random numbers in training.
SMALL = ("data=digits", "model.dropout=0.2")


def small_model(compose_config: Compose, experiment: str, *changes: str) -> nn.Module:
    cfg = compose_config(f"experiment={experiment}", *SMALL, *changes)
    cfg.data.train_size = None
    if "landmarks" in cfg.attention:
        cfg.attention.landmarks = 4
    if "kv_stride" in cfg.attention:
        cfg.attention.kv_stride = 1
    torch.manual_seed(0)
    return build_model(cfg).train()


def step(model: nn.Module, dtype: torch.dtype | None) -> tuple[Tensor, dict[str, Tensor | None], Tensor]:
    """Loss, gradients and the state of the random generator afterwards, of a batch of digits that are noise."""
    torch.manual_seed(1)
    images, labels = torch.rand(3, 1, 8, 8) * 2 - 1, torch.tensor([1, 0, 9])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = mean_loss(model, images, labels, 0.1)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, torch.get_rng_state()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_step_is_the_same_to_the_bit(compose_config: Compose, experiment: str, dtype: torch.dtype) -> None:
    """Loss, gradients, BatchNorms' statistics and the random numbers that follow."""
    model = small_model(compose_config, experiment)
    expected = copy.deepcopy(model)
    loss, gradients, generator = step(expected, dtype)
    for what in TWICE:
        ours = copy.deepcopy(model)
        set_activation_checkpointing(ours, what)  # type: ignore[arg-type]
        our_loss, our_gradients, our_generator = step(ours, dtype)
        assert torch.equal(our_loss, loss)
        assert torch.equal(our_generator, generator)
        assert our_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert gradient is not None, name
            assert torch.equal(our_gradients[name], gradient), name  # type: ignore[arg-type]
        for (name, buffer), before in zip(ours.named_buffers(), expected.buffers(), strict=True):
            assert torch.equal(buffer, before), name


@pytest.mark.slow
def test_every_family_has_blocks(compose_config: Compose) -> None:
    """And only those with a BatchNorm are left out."""
    for experiment in EXPERIMENTS:
        model = small_model(compose_config, experiment)
        set_activation_checkpointing(model, "selective")
        blocks = [block for block in model.modules() if isinstance(block, Block)]
        assert blocks, experiment
        with_batch_norm = experiment in ("levit", "cvt", "levit_pyramid", "cvt_pyramid")
        assert {block.activation_checkpointing for block in blocks} == {None if with_batch_norm else "selective"}, experiment


def allocated(model: nn.Module) -> int:
    """Bytes that PyTorch's profiler sees a step of batch 4 on 32 × 32 pixels hold at most."""

    def train() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = mean_loss(model, torch.rand(4, 3, 32, 32), torch.arange(4), 0.0)
        loss.backward()
        model.zero_grad()

    train()
    return most_allocated(train)


@pytest.mark.parametrize(
    ("experiment", "bound"),
    [("vit", 0.45), ("vip", 0.4), ("vil", 0.5), ("vin", 0.4)],  # measured: 0.38, 0.35, 0.44, 0.30
)
def test_less_memory(compose_config: Compose, experiment: str, bound: float) -> None:
    model = build_model(compose_config(f"experiment={experiment}", "embedding.patch_size=2"))
    before = allocated(model)
    set_activation_checkpointing(model, "full")
    assert allocated(model) < bound * before


@pytest.mark.slow
def test_compiled_gradients_of_a_model_that_draws(compose_config: Compose) -> None:
    """In float64 they are the difference quotients of the compiled loss, for which the same dropout is drawn again.

    Compiled, what is cheap alone is not kept: less than of a step that computes nothing twice, more than of everything.
    """
    model = small_model(compose_config, "vil", "model.dim=64", "model.depth=2", "attention.heads=2").double()
    images, labels = torch.rand(3, 1, 8, 8, dtype=torch.float64) * 2 - 1, torch.tensor([1, 0, 9])
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def value(function: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(1)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return function(model, images, labels, 0.1)

    value(mean_loss)
    sizes = [sum(kept.values())]
    for what in TWICE:
        set_activation_checkpointing(model, what)  # type: ignore[arg-type]
        torch.compiler.reset()
        compiled = torch.compile(mean_loss, dynamic=False)
        model.zero_grad()
        value(compiled).backward()
        sizes.append(sum(kept.values()))
        directions = [torch.randn_like(p) for p in model.parameters()]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        ends = []
        for distance in (1e-5, -2e-5, 1e-5):
            with torch.no_grad():
                for p, d in zip(model.parameters(), directions, strict=True):
                    p.add_(distance * d)
            ends.append(value(compiled).item())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)
    assert sizes[2] < 0.6 * sizes[1] < 0.6 * 0.8 * sizes[0]


@pytest.mark.slow
def test_compiled_gradients_where_what_is_kept_is_changed_in_place(compose_config: Compose) -> None:
    """Performer does so with its products, which are kept where a head is as wide as here: the gradients are the uncompiled."""
    model = small_model(compose_config, "vip_rope", "model.dropout=0", "model.dim=64", "attention.heads=1").double()
    images, labels = torch.rand(3, 1, 8, 8, dtype=torch.float64) * 2 - 1, torch.tensor([1, 0, 9])
    mean_loss(model, images, labels, 0.1).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    set_activation_checkpointing(model, "selective")
    torch.compiler.reset()
    torch.compile(mean_loss, dynamic=False)(model, images, labels, 0.1).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


@pytest.mark.slow
def test_a_run_is_the_same_and_may_be_continued(compose_config: Compose, tmp_path: Path) -> None:
    """Bit-identical, with all that a step can do; what is computed twice may change when a run is continued."""
    common = (*TINY, "model.dropout=0.1", "trainer.micro_batch=7", "trainer.ema_decay=0.9", "trainer.clip_norm=1.0")
    expected, model = fit(compose_config(*common), tmp_path / "nothing")
    for what in TWICE:
        found, ours = fit(compose_config(*common, f"trainer.activation_checkpointing={what}"), tmp_path / what)
        assert [row["train_loss"] for row in found["history"]] == [row["train_loss"] for row in expected["history"]]
        for a, b in zip(ours.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)
    assert (
        run_train(
            tmp_path, *TINY, "trainer.epochs=1", "trainer.activation_checkpointing=selective", "hydra.run.dir=run"
        ).returncode
        == 0
    )
    done = run_train(tmp_path, *TINY, "trainer.epochs=1", "trainer.activation_checkpointing=full", "hydra.run.dir=run")
    assert done.returncode == 0
    assert "Already finished" in done.stdout + done.stderr


def test_a_sweep_compares_them(tmp_path: Path) -> None:
    """Each is a run of its own, and the results say which."""
    done = run_train(
        tmp_path, "-m", *TINY, "trainer.epochs=1", "trainer.activation_checkpointing=null,full", "hydra.sweep.dir=sweep"
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/*/results.json")]
    assert sorted(str(run["config"]["trainer"]["activation_checkpointing"]) for run in runs) == ["None", "full"]
    assert len({run["train_loss"] for run in runs}) == 1
