"""python -m vix plan lists what a sweep then does, and starts nothing."""

import fcntl
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import HANGS, ROOT, TINY, run_train
from omegaconf import DictConfig

from vix.analysis import cost
from vix.analysis.cost import PretendedEngine, estimate_memory, evaluation_memory, fit_memory, training_memory
from vix.build import build_model, parse
from vix.cli import plan as planning
from vix.cli.plan import PlannedRun, expand, plan
from vix.composition.compose import compose
from vix.errors import UserError
from vix.layers.checkpointing import ActivationCheckpointing, set_activation_checkpointing
from vix.runs.results import published_rows

Compose = Callable[..., DictConfig]
SWEEP = (*TINY, "attention.landmarks=8,1000", "seed=0,1")


def only(arguments: Sequence[str]) -> PlannedRun:
    (job,) = plan(arguments)
    return job


def test_an_optimizer_that_cannot_take_a_step_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is refused; of a GPU that this machine lacks, it is not known."""
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, "+optimizer.capturable=true", "optimizer.fused=null"]
    job = only(arguments)
    assert (job.state, job.reason.partition(" (")[0]) == ("refused", "optimizer: AdamW cannot train here")
    assert [job.state for job in plan(arguments, device="cuda")] == ["new"]


@pytest.mark.slow
def test_measured_costs_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured memory is close to the estimate. Hours of an earlier run are not replaced by measured ones."""
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, "attention.landmarks=8", "trainer.device=cpu"]
    (new,) = plan(arguments, measuring=True)
    assert new.hours
    assert new.measured_gb == pytest.approx(new.estimated_gb, rel=0.2)

    assert run_train(tmp_path, *arguments).returncode == 0
    known = only([*arguments, "seed=1"])
    (measured,) = plan([*arguments, "seed=1"], measuring=True)
    assert known.hours
    assert known.hours == measured.hours
    assert known.measured_gb is None
    assert measured.measured_gb == pytest.approx(new.measured_gb, rel=0.2)


@pytest.mark.slow
def test_a_sweep_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, refusals and states are those of the real sweep; the time is the measured one, and unknown before."""
    monkeypatch.chdir(tmp_path)
    before = plan(SWEEP)
    assert [job.state for job in before] == ["new", "new", "refused", "refused"]
    assert all("attention.landmarks=1000 is more than the 65 tokens" in job.reason for job in before[2:])
    assert {job.hours for job in before} == {None}
    assert all(job.estimated_gb and job.measured_gb is None for job in before[:2])
    assert all(job.hours for job in plan(SWEEP, measuring=True)[:2])
    assert not any(tmp_path.iterdir())

    assert run_train(tmp_path, "-m", *SWEEP).returncode == 1
    after = plan(SWEEP)
    results = {str(path.parent): json.loads(path.read_text()) for path in Path("outputs").glob("*/*/results.json")}
    assert {str(job.directory) for job in after} == set(results)
    for job in after:
        assert job.state == results[str(job.directory)]["status"]
    assert after[0].summary is not None
    assert after[0].summary.trainable_params == results[str(after[0].directory)]["trainable_params"]

    good = [o.replace("8,1000", "8") for o in SWEEP[:-1]]
    seconds = sorted(r["seconds"] for r in results.values() if r["status"] == "finished")
    again, third = only([*good, "rerun=true"]), only([*good, "seed=2", "trainer.epochs=20"])
    assert (again.state, again.left, third.state, third.left) == ("again", 2, "new", 20)
    assert third.hours == pytest.approx(sum(seconds) / 2 / 2 * 20 / 3600)  # a median of two, of 2 epochs each
    assert only([*good, "trainer.batch_size=10"]).hours is None
    path = before[0].directory / "results.json"  # type: ignore[operator]
    on_cpu = json.loads(path.read_text())
    path.write_text(json.dumps(on_cpu | {"device": "some GPU", "peak_gpu_allocated_gb": 0.5}))
    elsewhere = only([*good, "seed=2"])
    assert elsewhere.measured_gb is None
    if not torch.cuda.is_available():
        (on_gpu,) = plan([*good, "seed=2"], device="cuda")
        assert (on_gpu.measured_gb, on_gpu.hours, on_gpu.device) == (0.5, None, "a CUDA GPU")
        assert on_gpu.estimated_gb
    path.write_text(json.dumps(on_cpu))

    directory = after[0].directory
    assert directory is not None
    with open(directory / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is being written by process" in only(good).reason

    checkpoint = torch.load(directory / "checkpoint.pt", weights_only=True)
    checkpoint["progress"]["epoch"] = 1
    torch.save(checkpoint, directory / "checkpoint.pt")
    finished = json.loads((directory / "results.json").read_text())
    (directory / "results.json").write_text(json.dumps(finished | {"status": "interrupted"}))
    continued = only(good)
    assert (continued.state, continued.left) == ("continues", 1)

    finished["config"]["optimizer"]["lr"] = 0.5
    (directory / "results.json").write_text(json.dumps(finished))
    assert "optimizer.lr was 0.5 and is 0.001" in only(good).reason


@pytest.mark.slow
def test_each_model_is_counted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    counted = []
    real = planning.summarize
    monkeypatch.setattr(planning, "summarize", lambda cfg: counted.append(cfg) or real(cfg))
    assert len(plan([*TINY, "seed=0,1,2", "optimizer.lr=0.1,0.2", "model.depth=1,2"])) == 12
    assert len(counted) == 2


MODELS = [
    ("experiment=vit", "attention.implementation=explicit"),
    ("experiment=vit",),
    ("experiment=vip",),
    ("experiment=vil",),
    ("experiment=vin",),
    ("experiment=fnet",),
    ("experiment=levit",),
    ("experiment=cvn", "data=digits"),
    ("experiment=vit", "posenc=relative2d"),
    ("experiment=vit", "trainer.activation_checkpointing=full"),
    ("experiment=vin", "trainer.activation_checkpointing=full"),
]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS, ids=" ".join)
def test_estimated_memory(compose_config: Compose, model: tuple[str, ...], precision: str) -> None:
    """Within a tenth of what PyTorch's profiler sees a real step allocate."""
    smaller = ("embedding.patch_size=2",) if model[0] != "experiment=cvn" else ()
    smaller += ("model.depth=2",) if model[0] not in ("experiment=cvn", "experiment=levit") else ()
    cfg = compose_config(*model, *smaller, "trainer.batch_size=4", f"trainer.precision={precision}", "trainer.device=cpu")
    data = parse(cfg).data
    net = build_model(cfg)
    set_activation_checkpointing(net, cfg.trainer.activation_checkpointing)
    optimizer = torch.optim.AdamW(net.parameters())
    images, labels = torch.rand(4, data.channels, data.image_size, data.image_size), torch.randint(10, (4,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = torch.nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    before = 3 * sum(p.nbytes for p in net.parameters()) + sum(b.nbytes for b in net.buffers())  # weights and Adam's averages
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = before + max(itertools.accumulate(changes))
    assert training_memory(parse(cfg)) == pytest.approx(peak, rel=0.1)


def test_what_is_computed_twice_is_not_kept(compose_config: Compose) -> None:
    """A compiled step computes less twice, and so keeps more, where only what is cheap is."""
    cfg = compose_config("experiment=vip", "trainer.batch_size=4", "trainer.device=cpu")
    peaks = [training_memory(parse(cfg), activation_checkpointing=mode) for mode in ("full", "selective", None)]
    assert peaks == sorted(set(peaks))


def test_memory_of_micro_batches_includes_the_images_of_the_batch(compose_config: Compose) -> None:
    run = ("experiment=quickstart", "trainer.micro_batch=2", "trainer.device=cpu")
    small, large = (training_memory(parse(compose_config(*run, f"trainer.batch_size={n}"))) for n in (4, 100))
    assert large - small == 96 * (8 * 8 * 4 + 8)  # float32 values, and a label


GPU = torch.device("cuda")


@pytest.mark.parametrize("attention", sorted(path.stem for path in (ROOT / "conf" / "attention").glob("*.yaml")))
def test_memory_of_every_mixer_on_a_gpu(compose_config: Compose, attention: str) -> None:
    """Estimated without one; it grows with the batch."""
    model = ("model=vit", "model.pool=mean", "embedding=linear", "embedding.patch_size=2", "model.depth=1")
    run = parse(compose_config(*model, f"attention={attention}", "trainer.precision=bf16", "trainer.device=cpu"))
    assert 0 < training_memory(run, GPU, 1) < training_memory(run, GPU, 2)


@pytest.mark.parametrize("checkpointing", [None, "full", pytest.param("selective", marks=pytest.mark.slow)])
def test_backward_without_the_engine(
    compose_config: Compose, monkeypatch: pytest.MonkeyPatch, checkpointing: ActivationCheckpointing
) -> None:
    """The nodes of pretended CUDA tensors are executed outside of PyTorch's engine: with the same peak."""
    for model in (("experiment=quickstart", "model.depth=1"), ("experiment=cvt", "data=digits", "model.depth=[1,1,1]")):
        sizes = ("trainer.batch_size=4", "trainer.micro_batch=2")
        cfg = compose_config(*model, *sizes, "trainer.precision=bf16", "trainer.device=cpu")
        expected = training_memory(parse(cfg), activation_checkpointing=checkpointing)
        with monkeypatch.context() as patches:
            patches.setattr(cost, "backward", lambda loss: PretendedEngine(loss).run())
            found = training_memory(parse(cfg), activation_checkpointing=checkpointing)
        assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("precision", "per_channel", "per_weight"), [("fp32", 4 + 4 + 4 + 8 + 8, 0), ("bf16", 4 + 4 + 2 + 4 + 4, 2)]
)
def test_memory_of_a_block_on_a_gpu_by_hand(compose_config: Compose, precision: str, per_channel: int, per_weight: int) -> None:
    """A block without a mixer saves the inputs of both norms (float32), of the MLP's layers and of its GELU.

    CUDA's autocast keeps a norm's output in float32, and the rounded weights until the backward pass.
    """
    batch, tokens, dim = 64, 64, 32
    model = ("model=vit", "model.pool=mean", "attention=identity", f"model.dim={dim}")
    images = ("data=digits", "embedding=linear", "embedding.patch_size=1")
    run = (*model, *images, f"trainer.precision={precision}", f"trainer.batch_size={batch}", "trainer.device=cpu")
    two, three = (training_memory(parse(compose_config(*run, f"model.depth={n}")), GPU) for n in (2, 3))
    matrices, vectors = 4 * dim * dim, 4 * dim + 3 * dim
    norms = 2 * 2 * 4  # mean and reciprocal standard deviation
    expected = batch * tokens * (per_channel * dim + norms) + 12 * (matrices + vectors) + per_weight * matrices
    assert three - two == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_whether_it_fits(compose_config: Compose) -> None:
    """The largest sizes are the last ones whose estimates are within the limit; so is what activation checkpointing saves."""
    small = ("experiment=vit", "embedding.patch_size=4", "model.depth=2", "trainer.device=cpu", "trainer.batch_size=256")
    run = parse(compose_config(*small))
    memory = estimate_memory(run, GPU)
    assert memory.images == 60_000 * (3 * 32 * 32 + 8)
    assert memory.total == memory.training + memory.images
    assert fit_memory(run, GPU, memory.total, memory).fits
    limit = memory.images + 1.2 * memory.evaluation
    fit = fit_memory(run, GPU, limit, memory)
    assert (fit.fits, fit.needed, fit.eval_batch_size) == (False, memory.total, None)
    assert fit.micro_batch
    room = limit - memory.images
    assert training_memory(run, GPU, fit.micro_batch) <= room < training_memory(run, GPU, fit.micro_batch + 1)
    assert fit.checkpointing["full"] == training_memory(run, GPU, activation_checkpointing="full") + memory.images
    assert fit.checkpointing["full"] < fit.checkpointing["selective"] < memory.total

    evaluated = fit_memory(run, GPU, memory.images + memory.evaluation - 1, memory)
    assert evaluated.eval_batch_size == 255
    assert evaluation_memory(run, GPU, 255) < memory.evaluation
    nothing = fit_memory(run, GPU, memory.images, memory)
    assert (nothing.eval_batch_size, nothing.micro_batch, nothing.micro_batch_full) == (0, 0, 0)
    run.trainer.micro_batch = "auto"
    assert fit_memory(run, GPU, limit, memory).fits


def test_averaged_weights_need_memory(compose_config: Compose) -> None:
    """The EMA is a copy of the weights, in training and in evaluation."""
    run = ("experiment=quickstart", "model.depth=1", "trainer.device=cpu")
    plain, averaged = (estimate_memory(parse(compose_config(*run, *o)), GPU) for o in ((), ("trainer.ema_decay=0.99",)))
    weights = sum(p.nbytes for p in build_model(compose_config(*run)).parameters())
    assert averaged.training - plain.training == averaged.evaluation - plain.evaluation == weights


@pytest.mark.slow
def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Planned on a machine without one, with what makes a run fit."""
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("vix").level
    small = ("experiment=quickstart", "model.depth=1", "trainer.device=cuda", "trainer.compile=cuda_graphs", "--device=cuda")
    monkeypatch.setattr(
        sys, "argv", ["vix", *small, "trainer.batch_size=2,64", "trainer.eval_batch_size=16", "--memory-gb", "0.015"]
    )
    with pytest.raises(SystemExit) as end:
        planning.main()
    assert end.value.code == 0
    assert logging.getLogger("vix").level == level  # warnings are off only in the command
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if "/seed=0" in line and " new " in line]
    assert [row[-1] for row in rows] == ["yes", "no"]
    assert "2 runs on a CUDA GPU: 2 new" in shown
    assert re.search(
        r"does not fit: quickstart,.*batch_size=64.*: needs 0\.\d\d GB; .*training fits with trainer\.micro_batch=\d+; ", shown
    )
    monkeypatch.setattr(sys, "argv", ["vix", *small, "--measure"])
    with pytest.raises(SystemExit, match="this machine has no CUDA GPU; leave --measure out for an estimate"):
        planning.main()


@pytest.mark.slow
def test_expansion_is_hydras() -> None:
    """Lists, ranges and globs; of two values for a key the last one; and a search has no list of runs."""
    assert expand(["seed=range(3)"]) == [["seed=0"], ["seed=1"], ["seed=2"]]
    assert expand(["seed=1", "seed=2"]) == [["seed=2"]]
    assert ["experiment=cct"] in expand(["experiment=glob(c*)"])
    jobs = expand(["seed=3,4", "model.dim=${seed}"])  # an interpolation belongs to the job, not to the sweep
    assert jobs == [[f"seed={seed}", r"model.dim=$\{seed\}"] for seed in (3, 4)]
    assert [compose(job).model.dim for job in jobs] == [3, 4]
    assert [job.name for job in plan(["model=vit", "seed=3,4", "model.dim=${seed}", "hydra.sweep.dir=x"])] == [
        f"vit-nystrom-conv-learned,model.dim={seed}/seed={seed}" for seed in (3, 4)
    ]
    with pytest.raises(UserError, match="a search chooses its runs"):
        expand(["hydra/sweeper=optuna_search"])


def run_plan(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # sweep.sh calls python
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=HANGS)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """A table on stdout, reasons on stderr, exit status 1 if any job would be refused or the command makes no sense."""
    good = run_plan(ROOT, "./sweep.sh", "--plan", "table4", f"hydra.sweep.dir={tmp_path}")
    assert good.returncode == 0, good.stderr
    rows = [name for name, row in published_rows().items() if row["table"] == "4"]
    assert [line.split()[:2] for line in good.stdout.splitlines() if "/seed=0" in line] == [
        [f"{r}/seed=0", "new"] for r in rows
    ]
    assert "6 new" in good.stdout
    assert "unknown" in good.stdout
    assert not any(tmp_path.iterdir())

    bad = run_plan(tmp_path, sys.executable, "-m", "vix", "plan", "experiment=quickstart,nosuch", "attention.heads=3")
    assert bad.returncode == 1
    assert "refused: quickstart,attention.heads=3/seed=0: attention.heads=3 does not divide" in bad.stderr
    assert "experiment=nosuch: conf/experiment/ has no such file" in bad.stderr
    assert "1 new" not in bad.stdout
    assert "2 refused" in bad.stdout
    assert "Traceback" not in bad.stderr
    wrong = run_plan(tmp_path, sys.executable, "-m", "vix", "plan", "seed=(")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ")
    assert len(wrong.stderr.splitlines()) == 1
