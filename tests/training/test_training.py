"""The training loop, against a plain one, and what its options do."""

import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import IDENTITY, fit
from conftest import TINY
from omegaconf import DictConfig
from torch import nn

import vix
from vix.build import Experiment, parse
from vix.cli.replay import repeat_step
from vix.errors import ConfigError, UserError
from vix.runs.run import RunDirectory
from vix.system.device import resolve_device, resolve_precision
from vix.system.rng import get_rng_state, set_rng_state
from vix.training import nonfinite
from vix.training.evaluate import accuracy
from vix.training.lr_schedule import lr_lambda
from vix.training.nonfinite import NonFiniteError, locate_layer

Compose = Callable[..., DictConfig]
CPU = torch.device("cpu")


def test_the_loop_is_plain_training(compose_config: Compose, tmp_path: Path) -> None:
    """Losses, accuracies and weights are those of a loop written out here, with clipping, smoothing and a schedule."""
    extra = ("trainer.clip_norm=0.5", "trainer.label_smoothing=0.1", "trainer.schedule=cosine", "trainer.warmup_epochs=1")
    cfg = compose_config(*TINY, *extra)
    results, model = fit(cfg, tmp_path)

    torch.manual_seed(cfg.seed)
    reference = vix.build_model(cfg)
    train, test = parse(cfg).data.load(CPU)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.01)
    step = 0
    for epoch in range(2):
        losses = []
        for images, labels in train.train_batches(20, cfg.seed, epoch):
            rate = 1e-3 * ((step + 1) / 6 if step < 5 else (1 + math.cos(math.pi * (step - 5) / 5)) / 2)
            optimizer.param_groups[0]["lr"] = rate
            loss = F.cross_entropy(reference(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.item())
            step += 1
        assert results["history"][epoch]["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert results["history"][epoch]["lr"] == pytest.approx(rate, rel=1e-6)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        logits = reference.eval()(next(test.eval_batches(50))[0])
    top = logits.topk(5).indices == test.labels[:, None]
    assert results["top1"] == pytest.approx(100 * top[:, 0].float().mean().item())
    assert results["top5"] == pytest.approx(100 * top.any(dim=1).float().mean().item())
    assert results["test_loss"] == pytest.approx(F.cross_entropy(logits, test.labels).item(), rel=1e-5)
    of_class = [100 * top[test.labels == k, 0].float().mean().item() for k in range(10)]
    assert results["class_accuracy"] == pytest.approx(of_class)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "micro"), [(20, 20), (20, 7), (20, 1), (30, 64)])
def test_micro_batches_train_the_same(compose_config: Compose, tmp_path: Path, batch: int, micro: int) -> None:
    """Gradients add up to the whole batch's, also of a short last batch: losses and weights agree to 1e-6 in float32."""
    common = (*TINY, f"trainer.batch_size={batch}", "trainer.label_smoothing=0.1", "trainer.clip_norm=1.0")
    whole, model = fit(compose_config(*common), tmp_path / "whole")
    parts, micro_model = fit(compose_config(*common, f"trainer.micro_batch={micro}"), tmp_path / "parts")
    assert parts["micro_batch"] == micro
    for ours, theirs in zip(parts["history"], whole["history"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-6)
    for ours, theirs in zip(micro_model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)  # AdamW's first steps divide by tiny gradients


def test_accuracy_counts_every_image_the_same() -> None:
    """The mean of per-batch percentages, which the paper took, would overweight the last image here."""
    logits = torch.eye(7)[torch.tensor([0, 1, 2, 3, 6])]
    labels = torch.tensor([0, 1, 2, 3, 5])
    batches = [(logits[:4], labels[:4]), (logits[4:], labels[4:])]
    scores = accuracy(torch.nn.Identity(), batches, torch.autocast("cpu", enabled=False), 7)
    assert scores["top1"] == pytest.approx(80)
    assert scores["test_loss"] == pytest.approx(math.log(math.e + 6) - 0.8)
    assert scores["class_accuracy"][:4] == [100] * 4
    assert scores["class_accuracy"][5] == 0
    two = accuracy(torch.nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))], torch.autocast("cpu", enabled=False), 2)
    assert (two["top1"], two["top5"]) == (50, 100)
    assert two["class_accuracy"] == [50, pytest.approx(math.nan, nan_ok=True)]


def test_precisions(compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward *and* loss run under autocast in every precision, and all three learn alike."""
    seen = []
    cross_entropy = F.cross_entropy

    def spy(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_grad_enabled():  # it trains
            seen.append((torch.is_autocast_enabled("cpu"), logits.dtype))
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", spy)
    losses = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        seen.clear()
        results, _ = fit(compose_config(*TINY, f"trainer.precision={precision}"), tmp_path / precision)
        assert set(seen) == {(precision != "fp32", dtype)}
        assert results["precision"] == precision
        saved = torch.load(tmp_path / precision / "checkpoint.pt", weights_only=True)
        assert bool(saved["scaler"]) == (precision == "fp16")
        losses[precision] = results["train_loss"]
    assert len(set(losses.values())) == 3
    assert list(losses.values()) == pytest.approx([losses["fp32"]] * 3, rel=0.01)


def test_automatic_precision_follows_the_hardware() -> None:
    with open("/proc/cpuinfo") as file:
        flags = file.read()
    native = "amx_bf16" in flags or "avx512_bf16" in flags
    assert resolve_precision("auto", CPU) is (torch.bfloat16 if native else torch.float32)
    if torch.cuda.is_available():
        native = torch.cuda.get_device_capability() >= (8, 0)
        assert resolve_precision("auto", torch.device("cuda")) is (torch.bfloat16 if native else torch.float16)


@pytest.mark.parametrize("shape", [(128, 128, 128), (384, 8200, 128), (8200, 32, 110), (32, 1025, 110, 33), (32, 64, 64, 64)])
def test_float32_products_on_a_cpu_round_nothing(shape: tuple[int, ...]) -> None:
    """Whichever library does them: of numbers that neither bfloat16 nor TF32 can hold, and with transposed ones."""
    resolve_device("cpu")
    *batch, rows, inner, columns = shape
    a, b = torch.rand(*batch, inner, rows).mT + 1, torch.rand(*batch, columns, inner).mT + 1
    for left, right in ((a, b), (a.contiguous(), b.contiguous())):
        exact = left.double() @ right.double()
        assert ((left @ right - exact).abs() <= 5e-6 * exact).all()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules(schedule: str) -> None:
    factor = lr_lambda(schedule, warmup=10, total=110)
    assert [factor(i) for i in range(11)] == pytest.approx([(i + 1) / 11 for i in range(11)])
    assert factor(60) == pytest.approx(1.0 if schedule == "constant" else 0.5)
    assert factor(110) == pytest.approx(1.0 if schedule == "constant" else 0.0)


def test_last_and_best_weights_are_kept(compose_config: Compose, tmp_path: Path) -> None:
    """The reloaded models score what the run wrote; best and last differ where a later epoch was worse."""
    cfg = compose_config(*TINY, "trainer.epochs=6", "optimizer.lr=0.1")
    results, model = fit(cfg, tmp_path)
    assert results["best_epoch"] < results["epochs"] == 6
    _, test = parse(cfg).data.load(CPU)
    for weights, key in (("last", "top1"), ("best", "best_top1")):
        loaded = vix.load_model(tmp_path, weights=weights)  # type: ignore[arg-type]
        scores = accuracy(loaded, test.eval_batches(256), torch.autocast("cpu", enabled=False), 10)
        assert scores["top1"] == pytest.approx(results[key])
    images = torch.rand(5, 1, 8, 8)
    assert torch.equal(vix.load_model(tmp_path)(images), model.eval()(images))


def test_early_stopping(compose_config: Compose, tmp_path: Path) -> None:
    """The run ends after the first ``patience`` epochs in a row without a higher top-1, with the results of a longer run."""
    common = (*TINY, "trainer.epochs=12", "optimizer.lr=0.05")
    whole, _ = fit(compose_config(*common), tmp_path / "whole")
    assert whole["stopped_early"] is False
    top1 = [row["top1"] for row in whole["history"]]
    last = next(i for i in range(2, 12) if max(top1[i - 1 : i + 1]) <= max(top1[: i - 1])) + 1
    assert last < 12
    stopped, _ = fit(compose_config(*common, "trainer.patience=2"), tmp_path / "stopped")
    assert (stopped["epochs"], stopped["stopped_early"], stopped["status"]) == (last, True, "finished")
    assert [row["top1"] for row in stopped["history"]] == top1[:last]
    assert stopped["best_epoch"] == last - 2


def test_redrawn_features(compose_config: Compose, tmp_path: Path) -> None:
    """From the loop's own step counter; the last ones are in the checkpoint."""
    common = [*TINY[1:], "model=vit", "attention=performer", "embedding=linear", "data=digits"]
    kept = torch.nn.Module.state_dict(fit(compose_config(*common), tmp_path / "kept")[1])
    cfg = compose_config(*common, "attention.redraw_every=4")
    redrawn = fit(cfg, tmp_path / "redrawn")[1].state_dict()
    name = "blocks.0.mixer.features_ME"
    torch.manual_seed(cfg.seed)
    first = vix.build_model(cfg).state_dict()[name]
    assert torch.equal(kept[name], first)
    assert not torch.equal(redrawn[name], first)
    saved = torch.load(tmp_path / "redrawn" / "checkpoint.pt", weights_only=True)
    assert torch.equal(saved["model"][name], redrawn[name])


def test_random_generators_are_restored() -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    draw()
    state = get_rng_state()
    first = draw()
    draw()
    set_rng_state(state)
    assert draw() == first


def test_results_are_strict_json(compose_config: Compose, tmp_path: Path) -> None:
    """A number that is not finite is null in the file, which any reader of JSON then reads."""
    run = RunDirectory(tmp_path, IDENTITY, {})
    run.write_results(train_loss=float("nan"), history=[{"train_loss": float("inf")}])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert read["train_loss"] is None
    assert read["history"] == [{"train_loss": None}]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gpu_memory_is_the_steps_own(compose_config: Compose, tmp_path: Path, precision: str) -> None:
    """A second run in the same process reports the first one's peak, not both; the data set is reported apart."""
    cfg = compose_config(*TINY, f"trainer.precision={precision}", "trainer.device=cuda")
    first, _ = fit(cfg, tmp_path / "first")
    ballast = torch.empty(2**28, device="cuda")  # 1 GB that an evaluation or a job before might have taken
    del ballast
    torch.cuda.empty_cache()
    second, _ = fit(cfg, tmp_path / "second")
    assert 0 < second["peak_gpu_allocated_gb"] <= second["peak_gpu_reserved_gb"] + second["resident_data_gb"]
    assert second["peak_gpu_allocated_gb"] == pytest.approx(first["peak_gpu_allocated_gb"], rel=0.05, abs=0.002)
    assert second["resident_data_gb"] == pytest.approx((100 + 50) * (64 + 8) / 1e9)


def test_a_step_that_is_not_finite_is_located_in_micro_batches(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more images at once than in the step itself; too little memory for that does not hide what happened."""
    cfg = compose_config(*TINY, "optimizer.lr=1e30", "trainer.micro_batch=7")
    model = vix.build_model(cfg)
    with pytest.raises(
        NonFiniteError, match=r"not finite at step \d+: the output of blocks\.0.* \(loss nan, learning rate 1e\+30"
    ):
        fit(cfg, tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "nonfinite.pt", weights_only=True)
    sizes, activations = [], []
    model.register_forward_hook(lambda _, arguments, __: sizes.append(len(arguments[0])))
    refs: list[Any] = []
    model.register_forward_pre_hook(lambda *_: activations.append([ref() for ref in refs]))
    model.blocks[0].register_forward_hook(lambda _, __, output: refs.append(weakref.ref(output)))
    model.load_state_dict(saved["model"])
    assert "the output of blocks.0" in locate_layer(model, saved)
    assert sizes == [7, 7, 6]
    assert activations == [[], [None], [None, None]]  # those of one micro-batch at a time
    modes: list[Any] = []
    monkeypatch.setattr("vix.cli.replay.locate_layer", lambda m, _: modes.extend(b.activation_checkpointing for b in m.blocks))
    saved["config"]["trainer"]["activation_checkpointing"] = "full"
    torch.save(saved, tmp_path / "run" / "nonfinite.pt")
    repeat_step(tmp_path / "run")
    assert modes == ["full"]

    def too_large(*_: Any) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nonfinite, "locate_layer", too_large)
    with pytest.raises(
        NonFiniteError, match=r"not finite at step \d+; the memory does not suffice to locate the layer; `python"
    ):
        fit(cfg, tmp_path / "again")


def test_an_evaluation_that_is_not_finite_ends_the_run(compose_config: Compose, tmp_path: Path) -> None:
    """The last update of an epoch broke the weights: neither "finished" nor a checkpoint, so that the one before continues."""
    one_step = ("data.train_size=20", "trainer.batch_size=20", "optimizer=sgd", "trainer.precision=fp32")
    cfg = compose_config(*TINY, *one_step, "optimizer.lr=1e38", "trainer.epochs=2")
    with pytest.raises(UserError, match=r"^the loss of the evaluation after epoch 1 is not finite: training has diverged"):
        fit(cfg, tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["progress"]["epoch"] == 0
    results, _ = fit(compose_config(*TINY, *one_step, "trainer.epochs=2", "trainer.resume=force"), tmp_path / "run")
    assert results["status"] == "finished"


def test_more_skipped_steps_than_an_epoch_has_now(compose_config: Compose, tmp_path: Path) -> None:
    """As after float16 with a smaller batch size: the schedule begins at its start, and never with a negative rate."""
    warmed_up = ("trainer.schedule=linear", "trainer.warmup_epochs=1", "trainer.resume=force")
    fit(compose_config(*TINY, *warmed_up, "trainer.epochs=1"), tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"skipped_steps": 100}, tmp_path / "run" / "checkpoint.pt")
    results, _ = fit(compose_config(*TINY, *warmed_up, "trainer.epochs=3"), tmp_path / "run")
    assert all(row["lr"] > 0 for row in results["history"])


def test_in_float16_a_gradient_that_is_never_finite_ends_the_run(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler takes it for an overflow, halves the scale from 65,536 on and skips the step; below 1 it was none."""
    build = Experiment.build_model

    def build_model(experiment: Experiment) -> nn.Module:
        model = build(experiment)
        model.head.weight.register_hook(lambda gradient: gradient * math.nan)
        return model

    monkeypatch.setattr(Experiment, "build_model", build_model)
    cfg = compose_config(*TINY, "trainer.precision=fp16", "trainer.epochs=5")
    with pytest.raises(NonFiniteError, match=r"not finite at step 17: the gradient of head\.weight .* scale 0\.5\)"):
        fit(cfg, tmp_path / "run")


def test_a_step_with_new_features_is_repeated_with_them(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Performer's are drawn again before the step that is not finite."""
    cfg = compose_config(*TINY, "attention=performer", "attention.redraw_every=3", "optimizer.lr=1e-3")
    drawn: list[int] = []

    def draw(count: int, width: int) -> torch.Tensor:
        drawn.append(1)
        features = torch.randn(count, width)
        return features if len(drawn) == 1 else torch.full_like(features, torch.nan)  # after those of the only layer

    monkeypatch.setattr("vix.attention.performer.orthogonal_features", draw)
    with pytest.raises(NonFiniteError, match=r"not finite at step 3: the output of blocks\.0"):
        fit(cfg, tmp_path / "run")


def test_a_trainer_without_a_number_of_epochs_is_refused(compose_config: Compose) -> None:
    """Its checkpoints could not be continued."""
    with pytest.raises(ConfigError, match=r"^trainer\.epochs"):
        _ = parse(compose_config(*TINY, "~trainer.epochs")).trainer


@pytest.mark.parametrize("attention", ["levit", "softmax"])
def test_blocks_that_are_not_checkpointed_are_logged(
    compose_config: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture, attention: str
) -> None:
    cfg = compose_config(*TINY, f"attention={attention}", "trainer.epochs=1", "trainer.activation_checkpointing=full")
    fit(cfg, tmp_path)
    message = "trainer.activation_checkpointing=full has no effect on 1 of 1 blocks, which contain a BatchNorm"
    assert (message in caplog.messages) == (attention == "levit")
