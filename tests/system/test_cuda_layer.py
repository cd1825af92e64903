"""Every call of torch.cuda that a run makes, through PyTorch's own Python on pretended GPUs (tests/pretended_cuda.py).

What no such test can show is listed in docs/reliability.md.
"""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import fit
from conftest import HANGS, ROOT, TINY
from forked import Forked
from omegaconf import DictConfig
from pretended_cuda import ALLOCATED, RESERVED, Driver, pretended_gpus
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import vix.training.train_step
from benchmarks.record import chosen_device, hardware
from vix.analysis.cost import AllocationCounter, FusedAttention
from vix.analysis.measure import measure
from vix.build import build_model, parse
from vix.data.loader import Split
from vix.errors import ConfigError, UserError
from vix.system import distributed
from vix.system.device import device_name, initial_gpu, resolve_device, resolve_precision
from vix.system.distributed import connect_gpus, peer_lost, process_group
from vix.system.memory import (
    PeakMemory,
    check_memory_limit,
    gpu_out_of_memory,
    initial_fraction,
    limit_memory,
    out_of_memory,
)
from vix.system.rng import get_rng_state, set_rng_state
from vix.training.ema import ModelEMA
from vix.training.micro_batch import dry_run, fits, largest_micro_batch
from vix.training.state import TrainState
from vix.training.train_step import TrainStep

Compose = Callable[..., DictConfig]
STARTER = ROOT / "tests" / "pretended_cuda.py"
PLAIN = (*(o for o in TINY if o != "trainer.precision=fp32"), "trainer.epochs=2", "trainer.batch_size=20")
ALL_PARTS = (
    *("trainer.schedule=cosine", "trainer.warmup_epochs=1.0", "trainer.clip_norm=1.0", "trainer.label_smoothing=0.1"),
    *("trainer.ema_decay=0.999", "augment=modern", "optimizer.no_decay_on_norm_and_bias=true"),
)
RUN = (*PLAIN, *ALL_PARTS)


@pytest.fixture
def gpus() -> Iterator[Driver]:
    """Two of them; what this process has chosen for float32 is restored."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.backends.cuda.enable_cudnn_sdp(True)  # PyTorch's default
    initial_gpu.cache_clear()
    initial_fraction.cache_clear()
    with pretended_gpus(2) as driver:
        yield driver
    initial_gpu.cache_clear()
    initial_fraction.cache_clear()
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32


# STARTER, whose process receives SIGTERM after the third step.
STOPPED = f"""
import os, runpy, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from vix.training.train_step import TrainStep

left, optimizer_step = [3], TrainStep.optimizer_step

def stop(step):
    optimizer_step(step)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGTERM)

TrainStep.optimizer_step = stop
runpy.run_path({str(STARTER)!r}, run_name="__main__")
"""


def start(
    directory: Path, *arguments: str, launcher: tuple[str, ...] = (), starter: Path = STARTER
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(starter), *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=HANGS, env=os.environ, check=False)


def results_of(directory: Path) -> dict[str, Any]:
    (path,) = directory.glob("outputs/*/*/results.json")
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    """Device, limit, peaks, name, checkpoint: written, and read when the same command continues."""
    command = ("2", "80", *RUN, "trainer.memory_limit_gb=4", "trainer.micro_batch=auto")
    done = start(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path)
    assert (results["status"], results["device"], results["precision"]) == ("finished", "Pretended GPU 0", "bf16")
    resident = results["resident_data_gb"]
    assert results["peak_gpu_allocated_gb"] == pytest.approx(ALLOCATED / 1e9 - resident)
    assert results["peak_gpu_reserved_gb"] == pytest.approx(RESERVED / 1e9 - resident)
    calls = json.loads((tmp_path / "calls-0.json").read_text())
    assert calls[0] == ["setDevice", 0]
    limits = [call[1:] for call in calls if call[0] == "setMemoryFraction"]
    assert limits[0] == [0.25, 0]
    assert limits[-1] == [1.0, 0]

    (run,) = tmp_path.glob("outputs/*/*")
    (run / "results.json").write_text(json.dumps({**results, "status": "interrupted"}))
    again = start(tmp_path, *command)
    assert again.returncode == 0, again.stderr
    assert "Continuing after 2 epochs" in again.stdout
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["rng"]["cuda"].dtype is torch.uint8


@pytest.mark.slow
def test_two_processes_from_the_command_line(tmp_path: Path) -> None:
    """Each has a GPU of its own, and numbers of the host meet by gloo although NCCL is there. A signal stops both."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    starter = tmp_path / "stopped.py"
    starter.write_text(STOPPED)
    stopped = start(tmp_path, "2", "80", *RUN, "trainer.micro_batch=auto", launcher=torchrun, starter=starter)
    assert results_of(tmp_path)["status"] == "interrupted", stopped.stderr
    assert results_of(tmp_path)["epochs"] == 0
    done = start(tmp_path, "2", "80", *RUN, "trainer.micro_batch=auto", launcher=torchrun)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path)["processes"] == 2
    for number in range(2):
        calls = json.loads((tmp_path / f"calls-{number}.json").read_text())
        assert calls[0] == ["setDevice", number]
        assert {call[-1] for call in calls if call[0] in ("memoryStats", "setMemoryFraction")} == {number}


@pytest.mark.slow
def test_two_processes_on_the_cpu_of_a_machine_with_a_gpu(tmp_path: Path) -> None:
    """They need no GPU each, and do not touch it."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = start(tmp_path, "1", "80", *RUN, "trainer.device=cpu", launcher=torchrun)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path)["processes"] == 2
    for number in range(2):
        assert json.loads((tmp_path / f"calls-{number}.json").read_text()) == []
    refused = start(tmp_path, "1", "80", *RUN, launcher=torchrun)
    assert "2 processes on this machine need a GPU each, and it has 1" in refused.stderr


def test_nccl_gets_the_gpu_that_the_process_computes_on(gpus: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several machines with one process each: PyTorch would take the first GPU."""
    for key, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "RANK": 1, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(key, str(value))
    made: list[Any] = []
    group = dist.ProcessGroup(0, 1)
    monkeypatch.setattr(dist, "init_process_group", made.append)
    monkeypatch.setattr(dist, "new_group", lambda **options: made.append(options) or group)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: made.append("destroyed"))
    for name in ("cuda:1", "cpu"):
        with process_group():
            connect_gpus(resolve_device(name))
            assert distributed.gpu_group is (group if name == "cuda:1" else None)
    nccl = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device("cuda", 1)}
    assert made == ["gloo", nccl, "destroyed", "gloo", "destroyed"]
    made.clear()

    def fail() -> None:
        with process_group():
            connect_gpus(resolve_device("cuda:1"))
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert "destroyed" not in made  # which would wait for the other processes
    assert distributed.gpu_group is None


def test_which_errors_mean_that_a_process_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for text in ("NCCL error in: NCCLUtils.cpp:94, remote process exited", "NCCL Async Error: x", "[a] gloo/transport/tcp: x"):
        assert peer_lost(RuntimeError(text))
    for text in ("Distributed package doesn't have NCCL built in", "NCCL error: invalid usage. Duplicate GPU detected", "x"):
        assert not peer_lost(RuntimeError(text))


@pytest.mark.slow
def test_a_gpu_without_kernels_is_one_line(tmp_path: Path) -> None:
    done = start(tmp_path, "1", "60", *RUN)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.partition(" (set in ")[0] == (
        "error: trainer.device=cuda: this build of PyTorch has no kernels for that GPU, only for compute capability "
        "7.5, 8.0, 8.6, 9.0, 10.0, 12.0 and compatible ones; valid: auto, cpu, cuda:N"
    )


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_has_its_index(gpus: Driver, name: str, index: int) -> None:
    assert resolve_device(name) == torch.device("cuda", index)
    assert torch.cuda.current_device() == index
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # whose gradients may be not a number: test_gpu.py


def test_a_job_does_not_inherit_the_gpu_of_the_job_before(gpus: Driver) -> None:
    assert [resolve_device(name).index for name in ("cuda:1", "auto")] == [1, 0]


def test_each_process_of_a_machine_has_its_gpu(gpus: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "RANK": 3, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(key, str(value))
    assert resolve_device("auto") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"^trainer\.device=cuda:0: 2 processes .* share that GPU; .*auto"):
        resolve_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"3 processes .* and it has 2; use --nproc-per-node=2$"):
        resolve_device("auto")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # of several machines
    assert resolve_device("cuda:0").index == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(
        ConfigError, match=r"^trainer\.device=cuda: LOCAL_RANK, .* which of 2 GPUs .*, is not set; .* torchrun$"
    ):
        resolve_device("cuda")


def test_what_is_refused(gpus: Driver) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.device=cuda:7: this machine has no such device.*invalid device ordinal"):
        resolve_device("cuda:7")
    with pytest.raises(UserError, match="has 2 CUDA GPUs"):
        chosen_device("cuda:7")
    with pytest.raises(ConfigError, match=r"this GPU has only 16\.0 GB"):
        check_memory_limit(torch.device("cuda", 1), 17.0)


def test_functions_of_a_device(gpus: Driver) -> None:
    """Those that a run calls with the second GPU, which is not the current one."""
    device = torch.device("cuda", 1)
    assert device_name(device) == "Pretended GPU 1"
    assert resolve_precision("auto", device) is torch.bfloat16
    limit_memory(device, 4.0)
    limit_memory(device, None)
    memory = PeakMemory(device, 0)
    memory.start()
    memory.stop()
    graphs = PeakMemory(device, 0, graphs=True)
    graphs.stop()
    assert (memory.allocated, memory.reserved, graphs.allocated) == (ALLOCATED, RESERVED, RESERVED)
    assert {call[-1] for call in gpus.calls if len(call) > 1} == {1}
    resolve_device("cuda:1")
    state = get_rng_state()
    first = torch.rand(3, generator=gpus.generators[1])
    set_rng_state(state)
    assert torch.equal(torch.rand(3, generator=gpus.generators[1]), first)


def test_the_users_own_limit_stays(gpus: Driver) -> None:
    """That of ``PYTORCH_ALLOC_CONF=per_process_memory_fraction:0.5``, on a GPU of 16 GB."""
    device = torch.device("cuda", 1)
    gpus.fractions[1] = 0.5
    for gigabytes, fraction in {4.0: 0.25, None: 0.5, 12.0: 0.5}.items():
        limit_memory(device, gigabytes)
        assert gpus.fractions == [1.0, fraction]


def test_benchmarks_measure_on_a_gpu(gpus: Driver) -> None:
    device = chosen_device("cuda:1")
    cost = measure(lambda: None, device, 0.001, None)
    assert (cost.allocated, cost.reserved) == (ALLOCATED, RESERVED)
    assert cost.seconds == pytest.approx(1e-3)
    assert (chosen_device("auto"), chosen_device("cuda")) == (torch.device("cuda", 0),) * 2
    assert hardware(device) == "Pretended GPU 1"


def test_the_pretended_functions_are_strict(gpus: Driver) -> None:
    """As the real ones: this is how a run with an index-less device ended."""
    with pytest.raises(ValueError, match=r"Expected a torch\.device with a specified index"):
        torch.cuda.set_per_process_memory_fraction(1.0, torch.device("cuda"))
    with pytest.raises(ValueError, match=r"Expected a torch\.device with a specified index"):
        torch.cuda.set_device(torch.device("cuda"))
    with pytest.raises(TypeError):
        torch._C._cuda_setDevice(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.set_device(2)


def test_float32_is_not_rounded_to_tf32(gpus: Driver) -> None:
    resolve_device("cuda")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    for operation in ("conv", "rnn", "matmul"):
        assert torch._C._get_fp32_precision_getter("cuda", operation) != "tf32"


def float16_step(optimizer: Callable[..., torch.optim.Optimizer], lr: float = 0.1, **options: Any) -> TrainStep:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    made = optimizer(model.parameters(), lr=lr, **options)
    return TrainStep(TrainState(model, made, LambdaLR(made, lambda step: 1 / (1 + step)), torch.float16))


BATCH = torch.linspace(-1, 1, 64).view(4, 1, 4, 4), torch.arange(4)


def test_a_trial_leaves_no_trace_in_gradient_scaling() -> None:
    """With a scaler of its own: a second unscaling before the update is an error."""
    step = float16_step(torch.optim.AdamW)
    for number in range(2):
        with dry_run(step):
            step.forward_backward(number, *BATCH)
        assert largest_micro_batch(step, *BATCH, [4, 2, 1]) == 4
        step.forward_backward(number, *BATCH)
        step.optimizer_step()
    assert step.state.skipped_steps == 0


@pytest.mark.parametrize(
    ("optimizer", "fused"),
    [
        (torch.optim.SGD, None),
        (torch.optim.SGD, True),
        (torch.optim.AdamW, None),
        (torch.optim.AdamW, True),
        (torch.optim.NAdam, None),  # it has no fused kernel
    ],
)
def test_a_skipped_step_does_not_move_the_schedule(
    optimizer: Callable[..., torch.optim.Optimizer], fused: bool | None, recwarn: pytest.WarningsRecorder
) -> None:
    step = float16_step(optimizer, **({"fused": True} if fused else {}))
    images, labels = BATCH
    rates = []
    for number, size in enumerate((1.0, 1e30, 1.0)):
        step.forward_backward(number, images * size, labels)
        step.optimizer_step()
        rates.append(step.state.lr)
    assert step.state.skipped_steps == 1
    assert rates == pytest.approx([0.1 / 2, 0.1 / 2, 0.1 / 3])
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_a_schedule_that_ran_ahead_is_taken_back() -> None:
    """As on a GPU, where the host learns of skipped steps later."""
    step = float16_step(torch.optim.SGD)
    for _ in range(5):
        step.state.optimizer.step()
        step.state.lr_scheduler.step()
    step.state.skipped_steps += 2
    for _ in range(2):
        step.state.sync_lr_scheduler()
        assert step.state.lr == pytest.approx(0.1 / 4)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, None), (None, True)])
def test_how_an_optimizer_computes_is_the_configs(before: bool | None, after: bool | None) -> None:
    """In float16, whose scaler goes by what the optimizer was made with."""
    first, second = (float16_step(torch.optim.AdamW, fused=fused) for fused in (before, after))
    for step in (first, second):
        if step is second:
            step.state.load_state_dict(deepcopy(first.state.state_dict()), 1)
        step.forward_backward(0, *BATCH)
        step.optimizer_step()
    assert second.state.optimizer.param_groups[0]["fused"] is after


def test_a_run_of_another_precision_is_continued_in_float16() -> None:
    """As trainer.precision=auto does on another device."""
    step = float16_step(torch.optim.AdamW)
    step.state.load_state_dict({**step.state.state_dict(), "scaler": {}}, 1)
    step.forward_backward(0, *BATCH)
    step.optimizer_step()


def test_the_average_is_pytorchs() -> None:
    """Bit for bit, with BatchNorm's buffers copied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    ours = ModelEMA(model, 0.5)
    theirs = AveragedModel(model)
    for done in range(12):
        theirs.multi_avg_fn = get_ema_multi_avg_fn(min(0.5, (1 + done) / (10 + done)))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(4, 8))
        ours.update(model)
        theirs.update_parameters(model)
    for (name, own), other in zip(ours.module.state_dict().items(), theirs.module.state_dict().values(), strict=True):
        assert torch.equal(own, other), name


def test_a_failed_trial_is_released_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    step = float16_step(torch.optim.AdamW)
    rooms: list[weakref.ref[Tensor]] = []
    empty, gradients = torch.empty, TrainStep.forward_backward

    def spy(*arguments: Any, **options: Any) -> Tensor:
        tensor = empty(*arguments, **options)
        if options.get("dtype") is torch.uint8:
            assert all(room() is None for room in rooms), "the room of the trial before is still there"
            rooms.append(weakref.ref(tensor))
        return tensor

    def too_much(self: TrainStep, number: int, images: Tensor, labels: Tensor) -> Tensor:
        if self.micro_batch != 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return gradients(self, number, images, labels)

    monkeypatch.setattr(vix.training.micro_batch.torch, "empty", spy)
    monkeypatch.setattr(TrainStep, "forward_backward", too_much)
    assert largest_micro_batch(step, *BATCH, [4, 2, 1]) == 1
    assert len(rooms) == 3
    assert not fits(step, 2, *BATCH, last=False)


@pytest.mark.parametrize("how", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_the_first_batch_is_released(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It is for trials only: no step of training may find it in memory."""
    first: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    shuffled, update = Split.train_batches, TrainStep.optimizer_step

    def spy(self: Split, *arguments: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in shuffled(self, *arguments, **options):
            if not first:
                first.append(weakref.ref(images))
            yield images, labels

    def watched(self: TrainStep) -> None:
        alive.append(first[0]() is not None)
        update(self)

    monkeypatch.setattr(Split, "train_batches", spy)
    monkeypatch.setattr(TrainStep, "optimizer_step", watched)
    fit(compose_config(*TINY, "attention=softmax", f"trainer.compile={how}", "trainer.micro_batch=auto"), tmp_path)
    assert alive == [False] * 10


@pytest.mark.slow
def test_a_compiled_float16_run_trains(tmp_path: Path, forked: Forked) -> None:
    """Two trials come before its first step, of the micro-batch and of the compiler: gradient scaling starts as without."""
    command = (*TINY, "attention=softmax", "trainer.precision=fp16", "trainer.compile=true", "trainer.micro_batch=auto")
    status, output = forked.run(tmp_path, *command)
    assert status == 0, output
    results = results_of(tmp_path)
    assert (results["status"], results["compiled"], results["precision"]) == ("finished", True, "fp16")
    assert results["skipped_steps"] == 0
    (run,) = tmp_path.glob("outputs/*/*")
    scaler = torch.load(run / "checkpoint.pt", weights_only=True)["scaler"]
    assert (scaler["scale"], scaler["_growth_tracker"]) == (2.0**16, 10)


@pytest.mark.slow
def test_fused_is_changed_between_starts(tmp_path: Path, forked: Forked) -> None:
    command = (*TINY, "trainer.precision=fp16", "hydra.run.dir=run", "trainer.resume=force")
    for epochs, fused in enumerate(("true", "null", "true", "false"), 1):
        status, output = forked.run(tmp_path, *command, f"trainer.epochs={epochs}", f"optimizer.fused={fused}")
        assert status == 0, output
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert (results["status"], results["epochs"], results["skipped_steps"]) == ("finished", epochs, 0)
        saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
        assert saved["optimizer"]["param_groups"][0]["fused"] is json.loads(fused)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 14.56 GiB",
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "cuFFT error: CUFFT_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "Triton Error [CUDA]: out of memory",
        "CUDA_ERROR_OUT_OF_MEMORY",
        "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        "Failed to CUDA calloc async 608 bytes",
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",  # of InductorError
    ],
)
def test_each_librarys_words_for_too_little_gpu_memory(message: str) -> None:
    assert gpu_out_of_memory(RuntimeError(message))
    assert out_of_memory(RuntimeError(message))


@pytest.mark.parametrize(
    "message", ["CUDA error: device-side assert triggered", "out of resource: shared memory, Required: 1, Hardware limit: 0"]
)
def test_other_errors_of_a_gpu_are_no_shortage(message: str) -> None:
    assert not out_of_memory(RuntimeError(message))
    assert not gpu_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))


def test_the_gradient_of_a_bias_is_counted_for_every_image() -> None:
    """Fused attention on a GPU writes it for the whole batch: 8 images, 4 heads, 1,025² pairs, float32."""

    def peak(biased: bool) -> int:
        with FakeTensorMode(), AllocationCounter() as allocations:
            q, k, v = (torch.empty(8, 4, 1025, 8, requires_grad=True) for _ in range(3))
            bias = torch.empty(1, 4, 1025, 1025, requires_grad=biased)
            FusedAttention.apply(q, k, v, bias).sum().backward()
        return allocations.peak

    assert peak(True) - peak(False) > 0.9 * 8 * 4 * 1025**2 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("parts", [(), ALL_PARTS], ids=["plain", "all"])
def test_no_step_waits_for_the_gpu(compose_config: Compose, precision: str, parts: tuple[str, ...]) -> None:
    """Batches, gradients and update, under PyTorch's own check of waits."""
    cfg = compose_config(*PLAIN, *parts, f"trainer.precision={precision}", "trainer.device=cuda")
    trainer, data = parse(cfg).trainer, parse(cfg).data
    device = trainer.torch_device
    train, _ = data.load(device)
    model = build_model(cfg).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = LambdaLR(optimizer, lambda _: 1.0)
    trainer.micro_batch = 10
    step = trainer.build_step(TrainState(model, optimizer, schedule, resolve_precision(precision, device), trainer.ema_decay))
    batches = train.train_batches(20, 0, 0, augmentation=parse(cfg).augmentation)
    for number in range(2):  # allocates the optimizer's state, and moves the epoch's draws to the GPU
        step.forward_backward(number, *next(batches))
        step.optimizer_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, batch in enumerate(batches, 2):
            step.forward_backward(number, *batch)
            step.optimizer_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
