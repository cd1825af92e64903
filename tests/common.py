"""Parts that several tests share: a run in this process, what a run left, an image folder, config files,
and the graphs of a compiled module."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import vix
from vix.build import parse
from vix.runs.run import RunDirectory

IDENTITY = dict.fromkeys(("name", "experiment", "model", "attention", "embedding", "posenc"), "x")
# An experiment on data that needs no download.
ON_DIGITS = "# @package _global_\ndefaults:\n  - override /data: digits\n  - override /embedding: linear\n"


def fit(cfg: DictConfig, directory: Path) -> tuple[dict[str, Any], torch.nn.Module]:
    """What train.py does with a config, in this process."""
    directory.mkdir(exist_ok=True)
    torch.manual_seed(cfg.seed)
    model = vix.build_model(cfg)
    run = RunDirectory(directory, IDENTITY, OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    experiment = parse(cfg)
    arguments = experiment.build_optimizer, experiment.data, experiment.augmentation, run, cfg.seed
    return experiment.trainer.fit(model, *arguments), model


def run_directory(directory: Path) -> Path:
    (found,) = (path.parent for path in directory.glob("outputs/*/*/.hydra"))
    return found


def outcome(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results without timings, and the checkpoint."""
    run = run_directory(directory)
    results = json.loads((run / "results.json").read_text())
    for row in (results, *results["history"]):
        row.pop("images_per_second")
    results.pop("seconds")
    results.pop("git_commit")  # somebody may be at work in the checkout
    return results, torch.load(run / "checkpoint.pt", weights_only=True)


def assert_same(directory: Path, expected: tuple[dict[str, Any], dict[str, Any]]) -> None:
    results, checkpoint = outcome(directory)
    assert results == expected[0]
    for kind in ("model", "best_model"):
        for name, tensor in expected[1][kind].items():
            assert torch.equal(checkpoint[kind][name], tensor), name


def table_after(output: str, title: str) -> list[list[str]]:
    """The rows of the table of that title, each a list of its cells."""
    lines = output[output.index(title) :].splitlines()
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines if line.startswith("│")]


def digit_folder(root: Path, classes: int, side: int) -> Path:
    """Real handwritten digits as PNG files of side × side pixels: 20 training and 4 test images of each class."""
    digits = load_digits()
    for digit in range(classes):
        for i, item in enumerate(np.flatnonzero(digits.target == digit)[:24]):
            path = root / ("train" if i < 20 else "test") / f"digit {digit}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[item] * 15).astype(np.uint8)).resize((side, side)).save(path)
    return root


def write_configs(directory: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = directory / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def traced(module: nn.Module) -> tuple[Callable[..., Tensor], list[str]]:
    """The module as ``torch.compile`` traces it, without generated code, and the code of its graphs, filled when it runs."""
    from functorch.compile import make_boxed_func  # here, because these take seconds
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    return torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=keep)), graphs


class FastBfloat16(TorchDispatchMode):
    """bfloat16 products and convolutions in float32, rounded once, as processors with instructions for them compute.

    PyTorch's own kernels for the other processors take 10 to 100 times as long.
    """

    products: ClassVar[frozenset[Any]] = frozenset(
        getattr(torch.ops.aten, name).default
        for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if func not in self.products or not all(tensor.dtype is torch.bfloat16 for tensor in tensors):
            return func(*args, **(kwargs or {}))
        wide = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        return tree_map_only(Tensor, Tensor.bfloat16, func(*wide, **(kwargs or {})))


def fast_bfloat16() -> AbstractContextManager[object]:
    """:class:`FastBfloat16` on a processor without instructions for bfloat16."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return nullcontext() if native else FastBfloat16()
