"""``python -m vix export RUN --format onnx|torch_export``: a trained model as one file for other programs.

The file takes any number of images at once. It holds the class names and the preprocessing as metadata, and is written only
after its logits were compared with the model's.
"""

import argparse
import importlib.util
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vix.build import LoadedRun, load_run
from vix.errors import UserError
from vix.reporting.console import protect_output
from vix.runs.identity import git_commit
from vix.system.files import atomic_write, out_file, run_directory_name, user_path
from vix.system.threads import use_given_cpus

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
EXAMPLES, CHECKED = 2, (1, 5)  # batch sizes of the export, and of the comparison with the model
TOLERANCE = 1e-4  # of the largest logit
DYNAMIC_BATCH = ({0: torch.export.Dim.DYNAMIC},)
Classify = Callable[[Tensor], Tensor]


class Mirrored(nn.Module):
    """A model evaluated with ``trainer.mirror_eval``: (B, C, Y, X) → the mean logits (B, K) of images and mirror images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCYX: Tensor) -> Tensor:
        return (self.model(images_BCYX) + self.model(images_BCYX.flip(-1))) / 2


def metadata(run: LoadedRun, directory: Path, weights: str) -> dict[str, Any]:
    """Everything that a program needs to use the file, apart from the model."""
    data = run.experiment.data
    return {
        "class_names": run.class_names,
        "preprocessing": {
            "layout": "NCHW",
            "image_size": data.image_size,
            "channels": data.channels,
            "colors": "RGB" if data.channels == 3 else "gray",
            "resize": "center crop to a square, then bilinear",
            "scale": 1 / 127.5,  # float32 input = scale · pixel + offset, for pixels from 0 to 255
            "offset": -1.0,
        },
        "run": run_directory_name(directory),
        "weights": weights,
        "mirror_eval": run.experiment.trainer.mirror_eval,
        "results": {key: run.results.get(key) for key in ("top1", "best_top1", "image_set", "tested_on")},
        "torch": torch.__version__,
        "git_commit": git_commit(),
    }


def to_onnx(model: nn.Module, example: Tensor, about: dict[str, Any]) -> tuple[bytes, Classify]:
    """The model as an ONNX file, and a function that runs that file with ONNX Runtime."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install -r requirements-export.txt")
    import onnxruntime

    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=DYNAMIC_BATCH, verbose=False, **names)
    assert program is not None
    program.model.metadata_props.update(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    )
    contents: bytes = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])

    def classify(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(np.asarray(logits))

    return contents, classify


def to_torch_export(model: nn.Module, example: Tensor, about: dict[str, Any]) -> tuple[bytes, Classify]:
    """The model as a file of torch.export, and a function that runs that file."""
    program = torch.export.export(model, (example,), dynamic_shapes=DYNAMIC_BATCH)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(about)})
    loaded: Classify = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), loaded


FORMATS = {"onnx": (to_onnx, "model.onnx"), "torch_export": (to_torch_export, "model.pt2")}


@torch.no_grad()
def exported(run: LoadedRun, kind: str, about: dict[str, Any]) -> bytes:
    """The contents of the file.

    kind: one of FORMATS.   about: its metadata.

    Raises UserError where the model cannot be exported, or the file computes other logits than the model.
    """
    data = run.experiment.data
    shape = data.channels, data.image_size, data.image_size
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(size, *shape, generator=generator) * 2 - 1 for size in (EXAMPLES, *CHECKED)]
    try:
        contents, classify = FORMATS[kind][0](run.model, batches[0], about)
        differences = []
        for images in batches[1:]:
            expected = run.model(images)
            differences.append(float((classify(images) - expected).abs().max() / expected.abs().max()))
    except UserError:
        raise
    except Exception as error:  # exporters and runtimes raise various exceptions
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"--format {kind}: this model cannot be exported ({reason}); nothing was written") from error
    if not max(differences) <= TOLERANCE:  # also where a logit is not a number
        raise UserError(
            f"--format {kind}: the exported model's logits differ from PyTorch's by {max(differences):.1e} of the largest one, "
            f"more than {TOLERANCE:g}; nothing was written"
        )
    return contents


def main() -> None:
    """The command."""
    protect_output()
    description = "Export a run's trained model, with class names and preprocessing as metadata."
    parser = argparse.ArgumentParser(prog="python -m vix export", description=description)
    parser.add_argument("directory", metavar="RUN", type=user_path, help="directory of a run, such as outputs/vin/seed=0")
    parser.add_argument("--format", choices=tuple(FORMATS), default="onnx", help="default: onnx")
    parser.add_argument("--weights", choices=("last", "best"), default="last", help="of which epoch (default: last)")
    parser.add_argument("--out", type=out_file, metavar="FILE", help="default: model.onnx or model.pt2 in the run's directory")
    options = parser.parse_args()
    for exporter in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir"):
        logging.getLogger(exporter).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    use_given_cpus()
    try:
        run = load_run(options.directory, options.weights)
        if run.experiment.trainer.mirror_eval:  # the accuracy of the run is that of this
            run = run._replace(model=Mirrored(run.model).eval())
        path: Path = options.out or options.directory / FORMATS[options.format][1]
        if not path.parent.is_dir():
            raise UserError(f"--out {path}: {path.parent} is not a directory")
        atomic_write(path, exported(run, options.format, metadata(run, options.directory, options.weights)))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"Written to {path}: images of any number to logits of {len(run.class_names)} classes, as checked against PyTorch")
