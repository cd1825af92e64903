"""What mixers attend to and how far they are from softmax attention, against formulas written out here."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from vix import build_model
from vix.attention.cvt import CvTAttention
from vix.attention.inspection import attention_weights, class_token_maps, class_token_weights, softmax_error
from vix.attention.levit import LeViTAttention
from vix.attention.linear import LinearAttention
from vix.attention.linformer import Linformer
from vix.attention.nystrom import Nystrom
from vix.attention.performer import Performer
from vix.attention.softmax import Softmax
from vix.layers.posenc import Rotary
from vix.layers.tokens import TokenGrid

Compose = Callable[..., DictConfig]
GRID = TokenGrid(6, 7, prefix=1)
APPROXIMATE: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "performer": (Performer, {}),
    "performer-local": (Performer, {"local_heads": 2, "window": 9}),
    "linformer": (Linformer, {"projected_length": 12}),
    "linformer-apart": (Linformer, {"projected_length": 12, "kv_heads": 2, "share_kv": False}),
    "nystrom": (Nystrom, {"landmarks": 8}),
    "linear": (LinearAttention, {}),
}
EXACT: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "softmax": (Softmax, {}),
    "softmax-explicit": (Softmax, {"implementation": "explicit"}),
    "levit": (LeViTAttention, {}),
    "cvt": (CvTAttention, {"dim_head": 8}),
}
MIXERS = APPROXIMATE | EXACT


def make(name: str, rotary: bool = False) -> tuple[Any, Tensor]:
    """A mixer of 43 tokens of width 32, and such tokens, sharp enough for weights that differ."""
    torch.manual_seed(0)
    kind, options = MIXERS[name]
    positions = {"rotary": Rotary(32, GRID).attention_kwargs(GRID)["rotary"]} if rotary else {}
    return kind(32, GRID, **positions, heads=4, **options), 2 * torch.randn(3, GRID.count, 32)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_the_weights_are_what_the_mixer_computes_with(name: str, rotary: bool) -> None:
    """Times any values they are the mixer's output, though they come from the identity alone."""
    mixer, x_BND = make(name, rotary)
    weights_BHNM = attention_weights(mixer, x_BND)
    assert weights_BHNM.shape == (3, 4, GRID.count, GRID.count)
    mixer.eval()
    q, k, v = mixer.qkv(x_BND)
    other = torch.randn_like(v)
    expected = weights_BHNM @ other.repeat_interleave(4 // v.shape[1], dim=1)
    torch.testing.assert_close(mixer.attend(q, k, other), expected, atol=2e-5, rtol=1e-4)
    if not name.startswith(("nystrom", "linformer")):  # these are averages
        assert weights_BHNM.min() >= 0
        torch.testing.assert_close(weights_BHNM.sum(dim=-1), torch.ones(3, 4, GRID.count))


@pytest.mark.parametrize("name", EXACT)
def test_softmax_weights_are_the_formula(name: str) -> None:
    mixer, x_BND = make(name)
    weights = attention_weights(mixer, x_BND).numpy()
    q, k, _ = (t.detach().double().numpy() for t in mixer.eval().qkv(x_BND))
    exponents = np.einsum("bhne,bhme->bhnm", q, k) / 8**0.5
    powers = np.exp(exponents)
    np.testing.assert_allclose(weights, powers / powers.sum(axis=-1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("name", MIXERS)
def test_the_class_tokens_row_by_gradient_is_that_of_the_matrix(name: str) -> None:
    mixer, x_BND = make(name)
    expected = attention_weights(mixer, x_BND)[:, :, 0].mean(dim=1)
    assert expected.std() > 1e-4
    torch.testing.assert_close(class_token_weights(mixer, x_BND), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", APPROXIMATE)
def test_softmax_error_is_the_formula(name: str) -> None:
    """Of two layers, the second of which gets what the first makes."""
    (first, x_BND), (second, _) = make(name), make(name)
    errors = softmax_error(nn.Sequential(first, second), x_BND)
    assert len(errors) == 2
    for mixer, tokens, error in zip((first, second), (x_BND, first.eval()(x_BND)), errors, strict=True):
        q, k, v = (t.detach().double() for t in mixer.qkv(tokens))
        k, v = (t.repeat(1, 4, 1, 1) if t.shape[1] == 1 else t[:, [i * t.shape[1] // 4 for i in range(4)]] for t in (k, v))
        powers = (torch.einsum("bhne,bhme->bhnm", q, k) / 8**0.5).exp()
        exact = (powers / powers.sum(dim=-1, keepdim=True)) @ v
        weights = attention_weights(mixer, tokens).double()
        assert error == pytest.approx((torch.linalg.vector_norm(weights @ v - exact) / exact.norm()).item(), rel=1e-3)
        assert error > 1e-4


def test_softmax_error_falls_with_landmarks_and_features() -> None:
    def error(kind: type[nn.Module], **options: Any) -> float:
        torch.manual_seed(0)
        mixer, x_BND = kind(32, GRID, **options), torch.randn(3, GRID.count, 32)
        return softmax_error(mixer, x_BND)[0]

    # A landmark a token: measured 4e-4, and 0.7 with 20 of them.
    assert error(Nystrom, landmarks=43, pinv_iterations=30) < 2e-3 < 0.1 < error(Nystrom, landmarks=20, pinv_iterations=30)
    performer = [error(Performer, features=m) for m in (5, 40, 400, 4000)]
    assert performer == sorted(performer, reverse=True)
    assert performer[-1] < 0.2 * performer[0]


@pytest.mark.parametrize("name", [*EXACT, "identity"])
def test_softmax_itself_has_no_error_to_tell(name: str) -> None:
    mixer, x_BND = (nn.Identity(), torch.randn(3, GRID.count, 32)) if name == "identity" else make(name)
    assert softmax_error(mixer, x_BND) == []


@pytest.mark.parametrize(
    ("overrides", "sides"),
    [
        (("experiment=quickstart",), [8, 8, 8, 8]),
        (("data=digits", "attention=softmax", "embedding=linear", "model.depth=2", "embedding.patch_size=2"), [4, 4]),
        (("experiment=quickstart", "model=pit", "model.dim=[32,64]", "attention.landmarks=16"), [8, 8, 4, 4]),
        (("experiment=quickstart", "model.pool=mean"), []),
        (("experiment=quickstart", "model=cct"), []),
        (("experiment=fnet",), []),
    ],
)
def test_maps_are_of_each_layers_grid(compose_config: Compose, overrides: tuple[str, ...], sides: list[int]) -> None:
    cfg = compose_config(*overrides)
    size, channels = (32, 3) if "fnet" in overrides[0] else (8, 1)
    maps = class_token_maps(build_model(cfg), torch.rand(2, channels, size, size))
    assert [m.shape for m in maps] == [(2, side, side) for side in sides]


def test_a_map_follows_its_pixel(compose_config: Compose) -> None:
    """A class token that looks for one bright token finds it where it is: rows are rows, and the class token is left out."""
    torch.manual_seed(0)
    model = build_model(compose_config("data=digits", "attention=softmax", "embedding=linear", "posenc=none", "model.depth=1"))
    dark = torch.full((1, 1, 8, 8), -1.0)
    (even,) = class_token_maps(model, dark)
    assert even.std() < 1e-6
    bright = dark.clone()
    bright[0, 0, 2, 5] = 1.0
    (seen,) = class_token_maps(model, bright)
    differs = (seen - seen[0, 0, 0]).abs() > 1e-5
    assert differs.nonzero().tolist() == [[0, 2, 5]]


@pytest.mark.parametrize("experiment", ["quickstart", "levit"])
def test_looking_leaves_no_trace(compose_config: Compose, experiment: str) -> None:
    """Modes, buffers, gradients, hooks and every random generator are as before; autocast changes nothing."""
    torch.manual_seed(0)
    cfg = compose_config(
        f"experiment={experiment}", "model.dropout=0.5", *(["attention=performer"] if experiment == "levit" else [])
    )
    model = build_model(cfg).train()
    model.head.eval()
    size, channels = (8, 1) if experiment == "quickstart" else (32, 3)
    images = torch.rand(2, channels, size, size)
    modes = [m.training for m in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    errors = softmax_error(model, images)
    maps = class_token_maps(model, images)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert softmax_error(model, images) == errors
        assert all(map(torch.equal, class_token_maps(model, images), maps))
    assert errors
