"""ONNX export of every mixer and family, with a free batch size, compared with PyTorch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT
from omegaconf import DictConfig

from vix.build import build_model

MIXERS = sorted(path.stem for path in (ROOT / "conf/attention").glob("*.yaml"))
SMALL = ("data=digits", "embedding=linear", "model.depth=2", "model.dim=32")
OPTIONS = {"nystrom": ["attention.landmarks=16"], "cvt": ["attention.dim_head=8"]}
FAMILIES = {
    "vit": (),
    "pit": ("model.dim=[32,64]", "model.depth=[1,1]"),
    "cct": (),
    "cvt": ("model.depth=[1,1,1]",),
    "levit": ("model.depth=[2]",),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "attention"),
    [*(("vit", name) for name in MIXERS), *((family, "softmax") for family in FAMILIES), ("levit", "levit"), ("cvt", "cvt")],
)
def test_export(compose_config: Callable[..., DictConfig], tmp_path: Path, family: str, attention: str) -> None:
    """Exported with two images, and run with five."""
    torch.manual_seed(0)
    pool = ("model.pool=mean",) if family == "vit" and attention != "softmax" else ()
    depth = ("model.depth=1",) if family == "vit" and attention != "window" else ()  # a second block shifts the windows
    overrides = (
        f"model={family}",
        f"attention={attention}",
        *SMALL,
        *depth,
        *FAMILIES[family],
        *pool,
        *OPTIONS.get(attention, ()),
    )
    model = build_model(compose_config(*overrides)).eval()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.onnx.export(model, (torch.randn(2, 1, 8, 8),), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    assert exported is not None
    exported.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (images,) = session.get_inputs()
    assert not isinstance(images.shape[0], int)
    images_BCYX = torch.randn(5, 1, 8, 8)
    (logits_BK,) = session.run(None, {images.name: images_BCYX.numpy()})
    np.testing.assert_allclose(logits_BK, model(images_BCYX).detach().numpy(), atol=1e-5)
