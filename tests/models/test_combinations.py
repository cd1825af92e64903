"""Every model × attention × embedding × posenc of conf/ trains a step, or is refused with its reason."""

import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from vix.attention import softmax
from vix.build import build_model
from vix.errors import ConfigError
from vix.layers.tokens import TokenGrid

GROUPS = ("model", "attention", "embedding", "posenc")
OPTIONS = {g: sorted(p.stem for p in (Path(__file__).parents[2] / "conf" / g).glob("*.yaml")) for g in GROUPS}
# With a linear embedding `pytest` tries all of them, with the others `pytest -m slow` does.
EMBEDDINGS = [pytest.param(name, marks=[] if name == "linear" else pytest.mark.slow) for name in OPTIONS["embedding"]]

# What makes no sense, and nothing else may be refused: an option that is not named here must go with all others.
WITH_QUERIES_AND_KEYS = ("softmax", "performer", "linformer", "nystrom", "linear", "levit", "cvt", "agent")
WITH_LOGITS_OF_PAIRS = ("softmax", "levit", "cvt")
ROTARY = ("rotary", "rotary2d")
MAP_ONLY = ("convolution", "pooling", "window", "global_filter", "neighbourhood", "focal", "identity")
WITH_CLASS_TOKEN = ("vit", "pit")
NEED_NORMS = ("fourier", "random")

# Small enough for hundreds of cases; a key is set where the option has it.
SMALL = {
    "landmarks": 8,
    "projected_length": 8,
    "window": 4,
    "dim_head": 4,
    "latents": 8,
    "memory_size": 8,
    "state": 4,
    "agents": 9,
}


def reason_to_refuse(model: str, attention: str, posenc: str) -> str | None:
    if model in WITH_CLASS_TOKEN and attention in MAP_ONLY:
        return r"^attention: .*class token.*; use model\.pool=mean$"
    if posenc in ROTARY and attention not in WITH_QUERIES_AND_KEYS:
        return r"^posenc: .*rotate queries and keys.*; use posenc=\w+"
    if posenc == "relative2d" and attention not in WITH_LOGITS_OF_PAIRS:
        return r"^posenc: .*attention logits of pairs.*; use posenc=\w+"
    if model == "levit" and attention in NEED_NORMS:
        return r"^model: LeViT's blocks have no norms.*; use another model"
    return None


@pytest.fixture
def small_config(compose_config):
    """The config of a small model from the four options, on 8×8 images; each option is composed by Hydra once."""

    def node(group: str, option: str) -> DictConfig:
        if (group, option) not in NODES:
            NODES[group, option] = small(compose_config(f"{group}={option}")[group])
        return NODES[group, option]

    def small_config(**options: str) -> DictConfig:
        return OmegaConf.create({group: node(group, option) for group, option in {**options, "data": "digits"}.items()})

    return small_config


NODES: dict[tuple[str, str], DictConfig] = {}


def small(node: DictConfig) -> DictConfig:
    for key, value in node.items():
        listed = OmegaConf.is_list(value)
        if key == "dim":
            node[key] = [d // 8 for d in value] if listed else value // 8
        elif key == "depth":
            node[key] = [1] * len(value) if listed else 2
        elif key == "hidden" and listed:
            node[key] = [8] * len(value)
        elif key in SMALL:
            node[key] = SMALL[key]
    return node


def train_step(model: nn.Module) -> None:
    """One step's loss and gradients on two images; all must be finite, and every parameter must receive its own."""
    loss = F.cross_entropy(model(torch.randn(2, 1, 8, 8)), torch.tensor([3, 7]))
    loss.backward()
    assert loss.isfinite()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_there_are_all_options():
    """What the rules above name exists, so that a renamed option cannot leave them empty."""
    assert {*WITH_QUERIES_AND_KEYS, *WITH_LOGITS_OF_PAIRS, *MAP_ONLY} <= {*OPTIONS["attention"]}
    assert {*ROTARY, "relative2d"} <= {*OPTIONS["posenc"]}
    assert {"vit", "levit", "cct", "cvt", "pit"} <= {*OPTIONS["model"]}


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("attention", OPTIONS["attention"])
@pytest.mark.parametrize("model", OPTIONS["model"])
def test_every_combination_trains_or_is_refused(small_config, model, attention, embedding):
    for posenc in OPTIONS["posenc"]:
        torch.manual_seed(0)
        cfg = small_config(model=model, attention=attention, embedding=embedding, posenc=posenc)
        reason = reason_to_refuse(model, attention, posenc)
        try:
            if reason is None:
                train_step(build_model(cfg))
            else:
                with pytest.raises(ConfigError, match=reason) as refusal:
                    build_model(cfg)
                assert "\n" not in str(refusal.value)
        except BaseException as error:
            error.add_note(f"with posenc={posenc}")
            raise


@pytest.mark.parametrize("attention", OPTIONS["attention"])
@pytest.mark.parametrize("model", OPTIONS["model"])
def test_every_mixer_trains_in_every_model_under_autocast(small_config, model, attention):
    torch.manual_seed(0)
    cfg = small_config(model=model, attention=attention, embedding="conv", posenc="learned")
    if model in WITH_CLASS_TOKEN and attention in MAP_ONLY:
        cfg.model.pool = "mean"
        if attention == "neighbourhood":
            cfg.attention.kernel = 3  # of the 4×4 tokens of PiT's second stage
    if model == "levit" and attention in NEED_NORMS:
        return  # is refused, above
    built = build_model(cfg)
    with torch.autocast("cpu", torch.bfloat16):
        train_step(built)


class Average(nn.Module):
    """A mixer as a user may write it: it takes the two arguments that all must."""

    def __init__(self, dim: int, tokens: TokenGrid) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.project(x_BND.mean(dim=1, keepdim=True)).expand_as(x_BND)


@pytest.mark.parametrize("model", OPTIONS["model"])
def test_a_mixer_needs_only_width_and_tokens(small_config, model, monkeypatch):
    monkeypatch.setenv("VIX_PACKAGES", __name__)
    cfg = small_config(model=model, attention="softmax", embedding="linear", posenc="learned")
    cfg.attention = {"_target_": f"{__name__}.Average"}
    train_step(build_model(cfg))


class Turned(softmax.Softmax):
    """Another: it takes the rotation alone, and has no option for its heads."""

    def __init__(self, dim: int, tokens: TokenGrid, rotary=None) -> None:
        super().__init__(dim, tokens, rotary)


def test_a_users_mixer_is_offered_what_it_takes(small_config, monkeypatch):
    monkeypatch.setenv("VIX_PACKAGES", __name__)
    cfg = small_config(model="pit", attention="softmax", embedding="linear", posenc="rotary")
    cfg.attention = {"_target_": f"{__name__}.Turned"}
    train_step(build_model(cfg))
    cfg.model.heads = 4
    with pytest.raises(ConfigError, match=r"^model\.heads=4: Turned has no heads; use model\.heads=null$"):
        build_model(cfg)


def test_the_map_mixer_of_the_docs(small_config, monkeypatch):
    """docs/extending.md's example trains in a family without a class token, and is refused with one."""
    blocks = [block.split("```")[0] for block in (ROOT / "docs/extending.md").read_text().split("```python\n")[1:]]
    (code,) = (block for block in blocks if "MapMixer" in block)
    module = types.ModuleType("row_mixer")
    exec(code, module.__dict__)
    monkeypatch.setitem(sys.modules, "row_mixer", module)
    monkeypatch.setenv("VIX_PACKAGES", "row_mixer")
    for model in ("cvt", "vit"):
        cfg = small_config(model=model, attention="softmax", embedding="linear", posenc="learned")
        cfg.attention = {"_target_": "row_mixer.RowMixer"}
        if model == "cvt":
            train_step(build_model(cfg))
            continue
        with pytest.raises(ConfigError, match=r"^attention: RowMixer .*use model\.pool=mean$"):
            build_model(cfg)


@pytest.mark.parametrize("model", OPTIONS["model"])
def test_layer_scale_in_every_family(small_config, model):
    """Each branch is multiplied by its gains, which are trained; gains of one change nothing."""
    cfg = small_config(model=model, attention="softmax", embedding="linear", posenc="learned")
    images = torch.randn(8, 1, 8, 8)

    def build(initial):
        cfg.model.layer_scale = initial
        torch.manual_seed(0)
        return build_model(cfg)

    plain, ones, quarter = build(None), build(1.0), build(0.25)
    torch.testing.assert_close(ones.eval()(images), plain.eval()(images))
    gains = {name: p for name, p in quarter.named_parameters() if name not in dict(plain.named_parameters())}
    assert {name.split(".")[-2] for name in gains} == {"scale1", "scale2"}
    assert all((p == 0.25).all() for p in gains.values())
    quarter.train()(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in gains.values())
    # The same as a quarter of what each branch computes.
    for module in plain.modules():
        if hasattr(module, "scale1"):
            for branch in (module.mixer, module.mlp):
                branch.register_forward_hook(lambda module, inputs, output: output / 4)
    torch.testing.assert_close(quarter.eval()(images), plain(images))


@pytest.mark.parametrize("model", OPTIONS["model"])
def test_stochastic_depth_in_every_family(small_config, model):
    """In training images lose branches of all blocks but the first; in evaluation nothing changes."""
    cfg = small_config(model=model, attention="softmax", embedding="linear", posenc="learned")
    cfg.model.depth = [3] if OmegaConf.is_list(cfg.model.depth) and len(cfg.model.depth) == 1 else cfg.model.depth
    cfg.model.stochastic_depth = 0.0
    torch.manual_seed(0)
    without = build_model(cfg)
    cfg.model.stochastic_depth = 0.9
    torch.manual_seed(0)
    dropping = build_model(cfg)
    images = torch.randn(8, 1, 8, 8)
    assert torch.equal(dropping.eval()(images), without.eval()(images))
    assert not torch.equal(dropping.train()(images), without.train()(images))
