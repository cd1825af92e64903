"""python -m vix export: the file computes what the model computes, from its metadata alone, or is not written."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import fit
from conftest import TINY

import vix
from vix.cli import export
from vix.composition.compose import compose
from vix.data.digits import Digits
from vix.data.loader import normalize
from vix.training.evaluate import evaluated_logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    fit(compose((*TINY, "trainer.epochs=1", "data.train_size=1400")), directory)
    return directory


def export_run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["vix", *arguments])
    export.main()


def onnx_file(path: Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """What another program does: the function of the file, and its metadata."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, logits.name) == ("images", "logits")
    about = session.get_modelmeta().custom_metadata_map
    return lambda x: session.run(None, {"images": x})[0], about | {
        key: json.loads(about[key]) for key in ("class_names", "preprocessing", "results")
    }


def torch_file(path: Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    files = {"metadata.json": ""}
    module = torch.export.load(path, extra_files=files).module()
    return lambda x: module(torch.from_numpy(x)).detach().numpy(), json.loads(files["metadata.json"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "load"), [("onnx", "model.onnx", onnx_file), ("torch_export", "model.pt2", torch_file)]
)
def test_a_file_by_its_metadata(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, name: str, load: Any
) -> None:
    """Raw images, brought into the form that the metadata describes, give the model's logits, in batches of any size."""
    export_run(monkeypatch, str(trained), "--format", kind, "--weights", "best")
    assert f"Written to {trained / name}" in capsys.readouterr().out
    classify, about = load(trained / name)
    form = about["preprocessing"]
    assert (form["layout"], form["image_size"], form["channels"], form["colors"]) == ("NCHW", 8, 1, "gray")
    assert about["class_names"] == [*"0123456789"]
    assert about["results"]["top1"] == json.loads((trained / "results.json").read_text())["top1"]
    pixels, _ = Digits().read()[1]
    raw = np.asarray(pixels[:64]).transpose(0, 3, 1, 2)
    expected = vix.load_model(trained, "best")(normalize(torch.from_numpy(raw))).detach().numpy()
    for size in (1, 2, 64):
        logits = classify((form["scale"] * raw[:size] + form["offset"]).astype(np.float32))
        np.testing.assert_allclose(logits, expected[:size], atol=1e-4)


def test_whole_or_not_at_all(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that computes something else, or an exporter that fails, leaves the earlier file."""
    out = tmp_path / "model.pt2"
    out.write_text("earlier")

    def wrong(model: Any, example: torch.Tensor, about: Any) -> Any:
        return b"new", lambda images: model(images) + 0.1

    def broken(model: Any, example: torch.Tensor, about: Any) -> Any:
        raise NotImplementedError("aten::x is not supported\nand more")

    for exporter, message in (
        (wrong, r"--format torch_export: the exported model's logits differ from PyTorch's by .*; nothing was written$"),
        (broken, r"this model cannot be exported \(aten::x is not supported\); nothing was written$"),
    ):
        monkeypatch.setitem(export.FORMATS, "torch_export", (exporter, "model.pt2"))
        with pytest.raises(SystemExit, match=message):
            export_run(monkeypatch, str(trained), "--format", "torch_export", "--out", str(out))
        assert out.read_text() == "earlier"
        assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_a_missing_package_or_folder_is_one_line(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export, "PACKAGES", ("onnx", "nosuchpackage"))
    with pytest.raises(SystemExit, match=r"needs nosuchpackage: pip install -r requirements-export\.txt$"):
        export_run(monkeypatch, str(trained), "--out", str(tmp_path / "m.onnx"))
    with pytest.raises(SystemExit, match=r"^error: --out .*: .*nosuch is not a directory$"):
        export_run(monkeypatch, str(trained), "--out", str(tmp_path / "nosuch" / "m.onnx"))
    with pytest.raises(SystemExit, match=r"^error: there is no .*checkpoint\.pt: pass the directory of a run"):
        export_run(monkeypatch, str(tmp_path))


def test_what_is_exported_is_what_was_evaluated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With trainer.mirror_eval, the mean of the logits of images and mirror images: the accuracy of the run is that of both."""
    fit(compose((*TINY, "trainer.epochs=1", "trainer.mirror_eval=true")), tmp_path)
    export_run(monkeypatch, str(tmp_path), "--format", "torch_export")
    classify, about = torch_file(tmp_path / "model.pt2")
    images, model = torch.rand(3, 1, 8, 8) * 2 - 1, vix.load_model(tmp_path)
    with torch.no_grad():
        expected = evaluated_logits(model, images, torch.autocast("cpu", enabled=False), mirror=True)
        assert not torch.allclose(model(images), expected, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(classify(images.numpy())), expected, atol=1e-5, rtol=1e-5)
    assert about["mirror_eval"] is True
