"""What a GPU computes: gradients of every published row and of every compiled mixer, next to float64 on the CPU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from omegaconf import DictConfig
from torch import Tensor, nn

from vix import build_model
from vix.build import parse
from vix.runs.results import published_rows
from vix.system.device import resolve_device
from vix.training.train_step import mean_loss

Compose = Callable[..., DictConfig]
MIXERS = sorted({path.stem for path in (ROOT / "conf/attention").glob("*.yaml")} - {"levit", "cvt"})
pytestmark = pytest.mark.gpu


def gradients(model: nn.Module, images: Tensor, loss: Callable[..., Tensor] = mean_loss) -> list[Tensor]:
    """Gradients of a batch in evaluation mode, without dropout, as float64 on the CPU."""
    model.eval().zero_grad(set_to_none=True)
    labels = torch.arange(len(images), device=images.device) % 10
    loss(model, images, labels, 0.0).backward()
    return [p.grad.to("cpu", torch.float64, copy=True) for p in model.parameters() if p.grad is not None]


def errors(cfg: DictConfig, compiled: bool) -> tuple[float, float]:
    """Relative errors of all gradients in float32: the GPU's and the CPU's."""
    device = resolve_device("cuda")
    torch.manual_seed(0)
    model = build_model(cfg)
    size = parse(cfg).data.image_size
    images = torch.rand(2, 3, size, size) * 2 - 1
    on_cpu = gradients(model, images)
    exact = gradients(model.double(), images.double())
    if compiled:
        torch.compiler.reset()
    loss = torch.compile(mean_loss, dynamic=False) if compiled else mean_loss
    on_gpu = gradients(model.float().to(device), images.to(device), loss)

    def error(found: list[Tensor]) -> float:
        squares = [((a - b).square().sum(), b.square().sum()) for a, b in zip(found, exact, strict=True)]
        wrong, whole = (torch.stack(terms).sum().sqrt() for terms in zip(*squares, strict=True))
        return float(wrong / whole)

    return error(on_gpu), error(on_cpu)


@pytest.mark.parametrize("row", published_rows())
def test_a_published_row(compose_config: Compose, row: str) -> None:
    """In float32 a GPU errs as little as a CPU."""
    found, expected = errors(compose_config(f"experiment={row}"), compiled=False)
    assert found < 10 * expected + 1e-6


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_compiled_mixer(compose_config: Compose, mixer: str) -> None:
    """So does what Triton compiles."""
    found, expected = errors(compose_config("experiment=compact", f"attention={mixer}"), compiled=True)
    assert found < 10 * expected + 1e-6


def test_attention_with_small_scores() -> None:
    """The queries' gradient is finite where all scores of a query are below −89 and there are 64 keys, as in ViL."""
    device = resolve_device("cuda")
    q_BHNE, k_BHME, v_BHME = (torch.randn(4, 1, n, 32, device=device, dtype=torch.bfloat16) for n in (1025, 64, 64))
    q_BHNE[..., 0], k_BHME[..., 0] = 24, -24  # −102 with the scale
    q_BHNE.requires_grad_()
    F.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME).sum().backward()
    assert q_BHNE.grad is not None
    assert q_BHNE.grad.isfinite().all()
