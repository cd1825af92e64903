"""trainer.compile on a CPU: what the compiled step computes, how a run with it is continued, and where compiling fails."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from common import assert_same, fit, outcome, run_directory
from conftest import ROOT, TINY, run_train
from forked import Forked, signal_at_file
from omegaconf import DictConfig
from torch import nn
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import LambdaLR

from vix import build_model
from vix.build import parse
from vix.errors import UserError
from vix.training.compile import OPTIONS_ON_CPU, compile_step, compiler_fault, worth_compiling
from vix.training.state import TrainState
from vix.training.train_step import TrainStep, mean_loss

# Steps of 20 images and a last one of 10, which is not compiled.
UNEVEN = (
    *TINY,
    "attention=softmax",  # Nyström's graph takes much longer to compile
    "data.train_size=110",
    "model.dropout=0.1",
    "trainer.compile=true",
    "trainer.checkpoint_every=2",
)
Compose = Callable[..., DictConfig]
ROWS = ("vit", "vip", "vil", "vin")


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_compiled_gradients(compose_config: Compose, name: str) -> None:
    """In float32 loss and gradients are those of float64 without compiling."""
    small = ("embedding.patch_size=4", "model.dim=32", "model.depth=1", "attention.heads=2")
    cfg = compose_config(f"experiment={name}", *small, *(("attention.landmarks=8",) if name == "vin" else ()))
    torch.manual_seed(0)
    model, exact = build_model(cfg), build_model(cfg)
    exact.load_state_dict(model.state_dict())
    images, labels = torch.rand(3, 3, 32, 32) * 2 - 1, torch.tensor([1, 0, 9])
    expected = mean_loss(exact.double(), images.double(), labels, 0.1)
    expected.backward()
    largest = max(float(p.grad.abs().max()) for p in exact.parameters() if p.grad is not None)
    torch.compiler.reset()
    loss = torch.compile(mean_loss, dynamic=False)(model, images, labels, 0.1)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for (key, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None, key
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4 * largest, msg=key)


class Reused(torch.autograd.Function):
    """Weights whose gradients lie where the next backward pass writes its own, as those of a CUDA graph do."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        ctx.memory = memory
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.memory.copy_(gradient).detach(), None  # a tensor that nobody else holds


def test_graphs_gradients_add_up(compose_config: Compose) -> None:
    """Over micro-batches, although each one's gradients are overwritten by those of the next."""
    torch.manual_seed(0)
    model = build_model(compose_config("experiment=quickstart", "model.dim=16"))
    optimizer = torch.optim.AdamW(model.parameters())
    step = TrainStep(TrainState(model, optimizer, LambdaLR(optimizer, lambda _: 1.0)), micro_batch=2)
    batch = torch.rand(6, 1, 8, 8), torch.arange(6)
    step.forward_backward(0, *batch)
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    optimizer.zero_grad(set_to_none=True)
    memory = {key: torch.empty_like(p) for key, p in model.named_parameters()}

    def graph(forward: nn.Module, images: torch.Tensor, labels: torch.Tensor, smoothing: float, _: None) -> torch.Tensor:
        weights = {key: Reused.apply(p, memory[key]) for key, p in forward.named_parameters()}
        logits = torch.func.functional_call(forward, weights, (images,))
        return nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)

    step.compiled, step.compiled_size, step.uses_cuda_graphs = graph, 2, True
    step.forward_backward(0, *batch)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[key], msg=key)


@pytest.mark.slow
def test_an_interrupted_compiled_run_ends_as_if_undisturbed(tmp_path: Path, forked: Forked) -> None:
    """Stopped while compiling (within 10 s) and in the middle of an epoch, and continued: bit-identical."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}

    def start(directory: str) -> subprocess.Popen[str]:
        (tmp_path / directory).mkdir(exist_ok=True)
        command = [sys.executable, str(ROOT / "train.py"), *UNEVEN]
        return subprocess.Popen(
            command,
            cwd=tmp_path / directory,
            env={**os.environ, **cache},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    began = time.monotonic()
    stopped = start("stopped")
    assert stopped.stdout is not None
    for line in stopped.stdout:
        if "Compiling the step" in line:
            break
    patience = max(10, time.monotonic() - began)  # on a slow machine: leaving takes no longer than starting did
    while not list((tmp_path / "cache").rglob("*.cpp")):  # until C++ compilers are at work
        assert stopped.poll() is None
        time.sleep(0.01)
    asked = time.monotonic()
    stopped.send_signal(signal.SIGTERM)
    said = stopped.stdout.read()
    assert stopped.wait() == 128 + signal.SIGTERM, said
    assert time.monotonic() - asked < patience
    results = (run_directory(tmp_path / "stopped") / "results.json").read_text()
    assert '"interrupted"' in results
    assert "epoch 1/2" not in said

    (tmp_path / "whole").mkdir()
    done = run_train(tmp_path / "whole", *UNEVEN, **cache)
    assert done.returncode == 0, done.stderr
    expected = outcome(tmp_path / "whole")
    assert expected[0]["compiled"] is True

    kill = partial(signal_at_file, signal.SIGKILL, "checkpoint.pt", 2)  # after the second step of the first epoch is saved
    assert forked.wait(forked.start(tmp_path / "stopped", *UNEVEN, before=kill, **cache)) == -signal.SIGKILL
    library = next((tmp_path / "cache").rglob("*.main.so"))
    library.write_bytes(b"")  # as by a process that is killed while it compiles
    done = run_train(tmp_path / "stopped", *UNEVEN, **cache)
    assert done.returncode == 0, done.stderr
    assert "Continuing after" in done.stdout + done.stderr
    assert "Compiling again what is incomplete in the compiler's cache" in done.stdout
    assert_same(tmp_path / "stopped", expected)


@pytest.mark.slow
def test_without_a_compiler(tmp_path: Path, compose_config: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` trains all the same, and exactly as without compiling; ``true`` ends in one line."""
    monkeypatch.setenv("CXX", "no-such-compiler")  # for the program; in this process it has been read
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("vix.training.compile.worth_compiling", lambda *_: True)
    plain, _ = fit(compose_config(*UNEVEN, "trainer.compile=false"), tmp_path / "plain")
    with inductor.patch("cpp.cxx", ("no-such-compiler",)):  # pytest's own way would leave it deleted for later tests
        auto, _ = fit(compose_config(*UNEVEN, "trainer.compile=auto"), tmp_path / "auto")
    assert auto["compiled"] is False
    assert [row["train_loss"] for row in auto["history"]] == [row["train_loss"] for row in plain["history"]]
    done = run_train(tmp_path, *UNEVEN)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("error: trainer.compile=true: ")
    assert "Traceback" not in done.stderr


def test_when_it_pays(compose_config: Compose) -> None:
    """On a CPU the paper's runs do and the quickstart does not; on a GPU the number of steps decides."""

    def decided(*overrides: str, images: int, device: str = "cpu") -> bool:
        cfg: Any = compose_config(*overrides)
        model: nn.Module = build_model(cfg)
        shape = (1, 8, 8) if "quickstart" in overrides[0] else (3, 32, 32)
        steps = cfg.trainer.epochs * images // cfg.trainer.batch_size
        with FakeTensorMode():
            batch = torch.empty(cfg.trainer.batch_size, *shape, device=device)
        return worth_compiling(model, batch, steps)

    for row in ROWS:
        assert decided(f"experiment={row}", images=50_000)
        assert not decided(f"experiment={row}", "trainer.epochs=1", images=1000)
        assert decided(f"experiment={row}", images=50_000, device="cuda")
        assert not decided(f"experiment={row}", "trainer.epochs=2", images=50_000, device="cuda")
    assert not decided("experiment=quickstart", images=1437)


def test_cuda_graphs_need_a_gpu(tmp_path: Path) -> None:
    """Refused before any data is read."""
    done = run_train(tmp_path, *TINY, "trainer.compile=cuda_graphs", "trainer.device=cpu")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: trainer.compile=cuda_graphs: needs a CUDA GPU")


def test_a_known_fault_of_the_compiler_is_avoided() -> None:
    """The C++ compiler is called with the separate flag ``-fno-tree-slp-vectorize``.

    Without it, g++ 12.2 miscompiles transpositions of bfloat16 on CPUs with AVX-512.
    """
    from torch._inductor.cpp_builder import CppOptions

    with inductor.patch({k: v for k, v in OPTIONS_ON_CPU.items() if k.startswith("cpp.")}):
        flags = " ".join(f"-{flag}" for flag in CppOptions(compiler="g++").get_cflags())
    assert "-ffp-contract=off -fno-tree-slp-vectorize " in flags


@pytest.mark.parametrize(
    ("factor", "reason"), [(float("nan"), "the compiled step is not finite"), (0.5, "gradients .* differ by 50%")]
)
def test_a_fault_of_the_compiler_is_not_trained_with(
    compose_config: Compose, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, factor: float, reason: str
) -> None:
    """A compiled step that is not finite, or computes something else: refused, and left out under ``auto``."""
    cfg = compose_config(*TINY)
    model = build_model(cfg)
    optimizer = parse(cfg).build_optimizer(model)
    step = TrainStep(TrainState(model, optimizer, LambdaLR(optimizer, lambda _: 1.0), torch.float32))
    batch = torch.rand(4, 1, 8, 8), torch.arange(4)
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *arguments: function(*arguments) * factor)
    with pytest.raises(UserError, match=rf"^trainer\.compile=true: {reason}.*use trainer\.compile=false$"):
        compile_step(step, True, 1, *batch)
    monkeypatch.setattr("vix.training.compile.worth_compiling", lambda *_: True)
    compile_step(step, "auto", 1, *batch)
    assert step.compiled is None
    assert "Continuing without compilation" in caplog.text
    assert step.forward_backward(0, *batch).isfinite()
    # Neither is what another device than the CPU computes, unless it draws random numbers, which differ there.
    step.compiled = torch.compile(mean_loss)
    assert re.search(reason, compiler_fault(step, *batch, same_numbers=False))
    dropout = nn.Dropout(0.1)
    model.head = nn.Sequential(dropout, model.head)
    assert bool(compiler_fault(step, *batch, same_numbers=False)) == math.isnan(factor)
    # Where the model itself is not finite, the compiler is not to blame.
    dropout.p = 0.0
    model.head = model.head[1]
    torch.nn.init.constant_(model.head.bias, float("nan"))
    compile_step(step, True, 1, *batch)
    assert step.compiled is not None
