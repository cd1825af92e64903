"""python -m vix cost measures a model in inference, and the report shows it."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import fit
from conftest import TINY
from omegaconf import DictConfig

from vix.analysis import inference
from vix.analysis.inference import Inference, inference_cost
from vix.analysis.model_summary import summarize
from vix.build import parse
from vix.cli.cost import main
from vix.cli.report import parse_arguments, report
from vix.runs.results import inference_fields

Compose = Callable[..., DictConfig]


@pytest.mark.slow
def test_of_a_run(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured compiled and not, kept next to the run, and shown by the report with two more pictures."""
    cfg = compose_config(*TINY, "attention=softmax", "trainer.epochs=1")
    run = tmp_path / "quickstart" / "seed=0"
    run.mkdir(parents=True)
    fit(cfg, run)
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"overrides": [], "seed": 0}))
    monkeypatch.setattr(inference, "MAX_BATCH", 128)
    monkeypatch.setattr(sys, "argv", ["vix", str(run), "--device", "cpu", "--batches", "64,1", "--seconds", "0.05"])
    main()
    cost = json.loads((run / "cost.json").read_text())
    summary = summarize(parse(cfg))
    assert cost["trainable_params"] == summary.trainable_params == results["trainable_params"]
    assert (cost["forward_flops"], cost["checkpoint_mb"]) == (summary.forward_flops, summary.checkpoint_mb)
    assert cost["device"] == "cpu"
    for variant in (cost["eager"], cost["compiled"]):
        sizes = [row["batch_size"] for row in variant["batches"]]
        assert sizes in ([1, 64], [1, 64, 128])
        speeds = {row["images_per_second"]: row["batch_size"] for row in variant["batches"]}
        assert variant["best_batch_size"] == speeds[variant["images_per_second"]] == speeds[max(speeds)]
        assert 0 < variant["latency_ms"] <= variant["latency_p95_ms"]
        peaks = [row["peak_gb"] for row in variant["batches"]]
        assert peaks == sorted(peaks)
    assert "latency of one image, compiled" in capsys.readouterr().out

    report(parse_arguments([str(tmp_path)]))
    (row,) = csv.DictReader((tmp_path / "report.csv").open())
    faster = min(cost["eager"], cost["compiled"], key=lambda variant: variant["latency_ms"])
    assert float(row["latency_ms"]) == faster["latency_ms"]
    assert float(row["inference_images_per_second"]) == faster["images_per_second"]
    assert float(row["inference_gb"]) == faster["batches"][1]["peak_gb"]
    for picture in ("accuracy_latency.png", "accuracy_inference_memory.png"):
        assert (tmp_path / picture).is_file()
        assert f"]({picture})" in (tmp_path / "report.md").read_text()


def test_memory_and_the_best_batch_size(compose_config: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak holds the weights, the images and the largest pair of activations; sizes double until speed rises no more."""
    experiment = parse(compose_config(*TINY, "trainer.device=cpu"))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1000, bias=False))
    inference = Inference(experiment, model, 0.0, compiled=False)
    torch.set_float32_matmul_precision("highest")  # MKL on every processor: oneDNN also allocates a scratchpad
    row = inference.batch(8)
    assert row["peak_gb"] * 1e9 == 4 * (64 * 1000 + 8 * 64 + 8 * 1000)
    speeds = {1: 10.0, 4: 20.0, 8: 40.0, 16: 41.0}
    shown: list[int] = []

    def batch(self: Inference, size: int) -> dict[str, float]:
        shown.append(size)
        return {"batch_size": size, "images_per_second": speeds[size], "peak_gb": 0.1}

    monkeypatch.setattr(Inference, "batch", batch)
    cost = inference_cost(experiment, model, [1, 4], 0.0, compiled=False)
    assert cost is not None
    assert (shown, cost["best_batch_size"]) == ([1, 4, 8, 16], 16)

    def short(self: Inference, size: int) -> dict[str, float]:
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch(self, size)

    monkeypatch.setattr(Inference, "batch", short)
    cost = inference_cost(experiment, model, [1, 4], 0.0, compiled=False)
    assert cost is not None
    assert cost["best_batch_size"] == 4


def test_without_a_compiler(compose_config: Compose, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A warning, and no figures of the compiled model."""

    def compile_nothing(*_: Any, **__: Any) -> None:
        raise RuntimeError("no C++ compiler\nat all")

    monkeypatch.setattr(inference.torch, "compile", compile_nothing)
    experiment = parse(compose_config(*TINY, "trainer.device=cpu"))
    assert inference_cost(experiment, experiment.build_model(), [1], 0.0, compiled=True) is None
    assert caplog.messages == ["The model cannot be compiled: no C++ compiler"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"eager": {"latency_ms": "x"}}', '{"eager": 3}'])
def test_a_damaged_file_is_no_cost(tmp_path: Path, content: str) -> None:
    (tmp_path / "cost.json").write_text(content)
    assert inference_fields(tmp_path / "cost.json") == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "error: there is no nosuch/checkpoint.pt: pass the directory of a run"),
        (["experiment=vni"], "error: experiment=vni: conf/experiment/ has no such file; nearest: vit, vip, vin"),
        (["nosuch", "experiment=vin"], "error: pass either directories of runs or overrides, not both"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.setattr(sys, "argv", ["vix", *arguments])
    with pytest.raises(SystemExit) as refused:
        main()
    assert str(refused.value.code).startswith(message)
    assert "\n" not in str(refused.value.code)


@pytest.mark.parametrize("mirror", [False, True])
def test_the_cost_is_that_of_the_evaluation(compose_config: Compose, mirror: bool) -> None:
    experiment = parse(compose_config(*TINY, f"trainer.mirror_eval={mirror}"))
    model = experiment.build_model()
    passes: list[int] = []
    model.register_forward_hook(lambda _, images, __: passes.append(len(images[0])))
    inference.Inference(experiment, model, 0.0, compiled=False).forward(3)()
    assert passes == [3] * (1 + mirror)


def test_a_run_that_cannot_be_loaded_does_not_end_the_others(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(compose_config(*TINY, "attention=softmax", "trainer.epochs=1"), tmp_path / "run")
    options = ["--device", "cpu", "--batches", "1", "--seconds", "0.01", "--no-compile"]
    monkeypatch.setattr(sys, "argv", ["vix", str(tmp_path / "nosuch"), str(tmp_path / "run"), *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value.code).startswith(f"error: there is no {tmp_path}/nosuch/checkpoint.pt")
    assert json.loads((tmp_path / "run" / "cost.json").read_text())["eager"]
