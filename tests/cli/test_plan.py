"""python -m vix plan tells what a sweep then does, and starts nothing."""

import fcntl
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import HANGS, ROOT, TINY, run_train
from omegaconf import DictConfig

from vix.analysis.cost import peak_memory
from vix.build import build_model, parse
from vix.cli import plan as planning
from vix.cli.plan import PlannedRun, expand, plan
from vix.errors import UserError
from vix.layers.checkpointing import set_activation_checkpointing
from vix.runs.results import published_rows

Compose = Callable[..., DictConfig]
SWEEP = (*TINY, "attention.landmarks=8,1000", "seed=0,1")


def only(arguments: Sequence[str]) -> PlannedRun:
    (job,) = plan(arguments)
    return job


@pytest.mark.slow
def test_a_sweep_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, refusals and states are those of the real sweep; the time is the measured one, and unknown before."""
    monkeypatch.chdir(tmp_path)
    before = plan(SWEEP)
    assert [job.state for job in before] == ["new", "new", "refused", "refused"]
    assert all("attention.landmarks=1000 is more than the 65 tokens" in job.reason for job in before[2:])
    assert {job.hours for job in before} == {None}
    assert all(job.gpu_gb and not job.measured for job in before[:2])
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS, ids=" ".join)
def test_memory_told_beforehand(compose_config: Compose, model: tuple[str, ...], precision: str) -> None:
    """Within a tenth of what PyTorch's profiler sees a real step allocate."""
    smaller = ("embedding.patch_size=2",) if model[0] != "experiment=cvn" else ()
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
    assert peak_memory(parse(cfg)) == pytest.approx(peak, rel=0.1)


def test_what_is_computed_twice_is_not_kept(compose_config: Compose) -> None:
    """A compiled step computes less twice, and so keeps more, where only what is cheap is."""
    peaks = [
        peak_memory(
            parse(
                compose_config(
                    "experiment=vip", "trainer.batch_size=4", "trainer.device=cpu", f"trainer.activation_checkpointing={what}"
                )
            )
        )
        for what in ("full", "selective", "null")
    ]
    assert peaks == sorted(set(peaks))


def test_expansion_is_hydras() -> None:
    """Lists, ranges and globs; of two values for a key the last one; and a search has no list of runs."""
    assert expand(["seed=range(3)"]) == [["seed=0"], ["seed=1"], ["seed=2"]]
    assert expand(["seed=1", "seed=2"]) == [["seed=2"]]
    assert ["experiment=cct"] in expand(["experiment=glob(c*)"])
    assert expand(["seed=3,4", "model.dim=${seed}"]) == [[f"seed={seed}", "model.dim=${seed}"] for seed in (3, 4)]
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
