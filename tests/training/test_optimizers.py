"""Optimizers of this program next to independent ones: PyTorch's Muon and AdamW by hand, and timm's Lion."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import fit
from conftest import ROOT, TINY
from omegaconf import DictConfig
from torch import nn

from vix import build_model
from vix.build import parse
from vix.errors import ConfigError
from vix.training.optimizers import Lion, MuonAdamW
from vix.training.param_groups import param_groups_weight_decay
from vix.training.state import load_optimizer

Compose = Callable[..., DictConfig]
SMALL = ("data=digits", "embedding=linear", "model.dim=16", "model.depth=1", "attention.heads=2", "attention.landmarks=4")


def train(model: nn.Module, *optimizers: Any, steps: int = 5) -> list[torch.Tensor]:
    """Some steps on fixed images; returns the parameters."""
    torch.manual_seed(1)
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    for _ in range(steps):
        nn.functional.cross_entropy(model(images), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("no_decay", [True, False])
def test_muon_for_hidden_matrices_and_adamw_for_the_rest(compose_config: Compose, no_decay: bool) -> None:
    model = build_model(compose_config(*SMALL))
    reference = copy.deepcopy(model)
    ours = MuonAdamW(MuonAdamW.param_groups_of(model, no_decay), lr=1e-2, weight_decay=0.1)
    matrices = [m.weight for name, m in reference.blocks.named_modules() if isinstance(m, nn.Linear)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in reference.parameters() if id(p) not in chosen]
    others = param_groups_weight_decay(reference)[1]
    if no_decay:
        undecayed = {id(p) for p in others["params"]}
        groups: list[Any] = [
            {"params": [p for p in rest if id(p) not in undecayed]},
            {"params": [p for p in rest if id(p) in undecayed], "weight_decay": 0.0},
        ]
    else:
        groups = rest
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, eps=1e-8, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    assert len(matrices) >= 4
    for own, other in zip(train(model, ours), train(reference, muon, adamw), strict=True):
        assert torch.equal(own, other)


class Unfolded(nn.Module):
    """A 3×3 convolution as a linear layer of its input patches."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.linear = nn.Linear(conv.in_channels * 9, conv.out_channels)
        self.linear.weight.data, self.linear.bias.data = conv.weight.detach().flatten(1).clone(), conv.bias.detach().clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(nn.functional.unfold(x, 3, padding=1).mT).mT.unflatten(-1, x.shape[-2:])


def test_muon_for_the_filters_of_hidden_convolutions() -> None:
    """A convolution is trained like the linear layer that computes the same; the first and a grouped one with AdamW."""
    torch.manual_seed(0)
    first, hidden, grouped = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 3, groups=12)
    rest = nn.Sequential(nn.ReLU(), grouped, nn.Flatten())
    model = nn.Sequential(first, hidden, rest)
    reference = nn.Sequential(copy.deepcopy(first), Unfolded(hidden), copy.deepcopy(rest))
    start = hidden.weight.detach().flatten(1).clone()
    groups = MuonAdamW.param_groups_of(model, no_decay=True)
    assert {id(p) for p in groups[0]["params"]} == {id(hidden.weight)}
    muon = torch.optim.Muon([reference[1].linear.weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    others = [p for p in reference.parameters() if p is not reference[1].linear.weight]
    groups_of_others: list[Any] = [
        {"params": [p for p in others if p.ndim > 1]},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups_of_others, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    own = train(model, MuonAdamW(groups, lr=1e-2, weight_decay=0.1), steps=3)[2]
    other = train(reference, muon, adamw, steps=3)[2]
    assert own.shape == (12, 8, 3, 3)
    # Not equal: Muon rounds to bfloat16, which turns the last digit of a gradient into one of three digits.
    assert (own.flatten(1) - other).norm() < 0.02 * (other - start).norm()


def test_lion_of_timm(compose_config: Compose) -> None:
    from timm.optim import Lion as Theirs

    model = build_model(compose_config(*SMALL)).double()
    reference = copy.deepcopy(model)
    ours = Lion(param_groups_weight_decay(model), lr=1e-3, weight_decay=0.1)
    theirs = Theirs(param_groups_weight_decay(reference), lr=1e-3, weight_decay=0.1)
    torch.set_default_dtype(torch.float64)
    try:
        for own, other in zip(train(model, ours), train(reference, theirs), strict=True):
            torch.testing.assert_close(own, other, atol=1e-12, rtol=0)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "choices",
    [["optimizer=muon"], ["optimizer=muon", "model=cvt", "model.depth=[1,1]"], ["optimizer=lion"], ["optimizer=nadam"]],
)
def test_continues_from_its_state(compose_config: Compose, tmp_path: Any, choices: list[str]) -> None:
    """Bit-identical from a saved state, with the learning rate of the schedule; and a run trains with it."""
    cfg = compose_config(*SMALL, *choices, "trainer.epochs=1", "data.train_size=128", "data.test_size=64")
    model = build_model(cfg)
    optimizer = parse(cfg).build_optimizer(model)
    train(model, optimizer, steps=3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, steps=3)
    again = build_model(cfg)
    restored = parse(cfg).build_optimizer(again)
    again.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    for own, other in zip(train(again, restored, steps=3), expected, strict=True):
        assert torch.equal(own, other)
    assert fit(cfg, tmp_path / "run")[0]["status"] == "finished"


def test_only_linear_layers_and_convolutions_decay(compose_config: Compose) -> None:
    """Of every mixer: no norms, biases, temperatures, learned tokens and position tables."""
    for path in (ROOT / "conf" / "attention").glob("*.yaml"):
        small = (
            "data=digits",
            "embedding=linear",
            "model.dim=16",
            "model.depth=1",
            "model.pool=mean",
            f"attention={path.stem}",
        )
        model = build_model(compose_config(*small))
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
        bare = [p for name, p in model.named_parameters() if name.split(".")[-1] in ("length_k", "length_v", "filter_YXD2")]
        expected = {id(m.weight) for m in layers} | {id(p) for p in bare}
        decayed, others = (group["params"] for group in param_groups_weight_decay(model))
        assert {id(p) for p in decayed} == expected, path.stem
        assert len(decayed) + len(others) == len(list(model.parameters()))


def test_the_names_without_weight_decay_may_be_a_method() -> None:
    """As in timm's models, with names of parameters of submodules."""

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def no_weight_decay(self) -> set[str]:
            return {"inner.weight"}

    assert [len(group["params"]) for group in param_groups_weight_decay(Theirs())] == [0, 2]


def test_names_without_weight_decay_hold_for_muon() -> None:
    """A matrix among them is still Muon's, in the last group; without one, the groups are those of older checkpoints."""

    class Theirs(nn.Module):
        no_weight_decay: tuple[str, ...] = ()

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def kinds(model: nn.Module) -> list[tuple[bool, float | None, int]]:
        groups = MuonAdamW.param_groups_of(model, no_decay=True)
        return [(group.get("muon", False), group.get("weight_decay"), len(group["params"])) for group in groups]

    model = Theirs()
    assert kinds(model) == [(True, None, 2), (False, None, 0), (False, 0.0, 2)]
    model.no_weight_decay = ("second.weight",)
    assert kinds(model) == [(True, None, 1), (False, None, 0), (False, 0.0, 2), (True, 0.0, 1)]
    optimizer = MuonAdamW(MuonAdamW.param_groups_of(model, no_decay=True), lr=0.1, weight_decay=0.5)
    before = [layer.weight.norm().item() for layer in (model.first, model.second)]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = [layer.weight.norm().item() for layer in (model.first, model.second)]
    assert after == pytest.approx([0.95 * before[0], before[1]])


@pytest.mark.parametrize("capturable", [False, True])
def test_what_an_optimizer_keeps_on_the_host_stays_there(capturable: bool) -> None:
    """NAdam reads two numbers on the host in each step; after a resume on a GPU, too. Another device stands for the GPU.

    With ``capturable=True`` it keeps them on the device.
    """
    states = []
    for device in ("cpu", "meta"):
        layer = torch.nn.Linear(2, 2, device=device)
        optimizer = torch.optim.NAdam(layer.parameters())
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if device == "cpu":
            optimizer.step()
            saved = optimizer.state_dict()
        else:
            optimizer.param_groups[0]["capturable"] = capturable
            load_optimizer(optimizer, ["weight", "bias"], saved, ["weight", "bias"])
        states.append({name: t.device.type for name, t in optimizer.state[layer.weight].items()})
    assert states[0] == dict.fromkeys(states[0], "cpu")
    counts = "meta" if capturable else "cpu"
    assert states[1] == {"step": counts, "mu_product": counts, "exp_avg": "meta", "exp_avg_sq": "meta"}


class PassingOn(torch.optim.SGD):
    """An optimizer of a user's own, whose group holds options under the names of its base class."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.5, **options: Any) -> None:
        super().__init__(params, lr=lr, momentum=beta, **options)
        for group in self.param_groups:
            group["seen"] = 0  # state


def test_changed_options_of_an_optimizer_of_ones_own_are_used_after_a_resume() -> None:
    """State in a group is continued."""
    layer = torch.nn.Linear(2, 2)
    before, optimizer = PassingOn(layer.parameters()), PassingOn(layer.parameters(), beta=0.9, weight_decay=0.1)
    before.param_groups[0]["seen"] = 7
    load_optimizer(optimizer, ["weight", "bias"], before.state_dict(), ["weight", "bias"])
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["seen"]) == (0.9, 0.1, 7)


def test_the_learning_rate_of_every_part_follows_the_schedule(compose_config: Compose) -> None:
    model = build_model(compose_config(*SMALL))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MuonAdamW(MuonAdamW.param_groups_of(model, True), lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert all(torch.equal(a, b) for a, b in zip(train(model, optimizer, steps=1), before, strict=True))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["optimizer._target_=torch.optim.LBFGS"], "LBFGS cannot train here (LBFGS.step() missing 1 required"),
        (["+optimizer.differentiable=true", "optimizer.fused=null"], "AdamW cannot train here (a leaf Variable that requires"),
        (["+optimizer.capturable=true", "optimizer.fused=null"], "AdamW cannot train here (If capturable=True, params and"),
    ],
)
def test_what_fails_only_in_a_step_is_refused_before(compose_config: Compose, overrides: list[str], reason: str) -> None:
    cfg = compose_config(*TINY, *overrides)
    with pytest.raises(ConfigError, match="^optimizer: " + re.escape(reason)):
        parse(cfg).check_optimizer_step()


class OfTallMatrices(torch.optim.SGD):
    """An optimizer of a user's own that cannot update every matrix."""

    def step(self, closure: Any = None) -> Any:
        assert all(len(p) > 2 for group in self.param_groups for p in group["params"])
        return super().step(closure)


def test_an_optimizer_of_ones_own_is_not_tried(compose_config: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a matrix that may be none of the model's."""
    monkeypatch.setenv("VIX_PACKAGES", __name__)
    cfg = compose_config(*TINY, "optimizer=sgd")
    cfg.optimizer._target_ = f"{__name__}.OfTallMatrices"
    parse(cfg).check_optimizer_step()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.ns_steps=100", "optimizer.ns_steps=100"),
        ("optimizer.betas=[2.0,0.9]", "optimizer.betas"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas"),
    ],
)
def test_ranges_of_muon(compose_config: Compose, override: str, key: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(key)):
        parse(compose_config(*TINY, "optimizer=muon", override))


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "conf" / "optimizer").glob("*.yaml"))])
def test_every_optimizer_can_take_a_step(compose_config: Compose, name: str) -> None:
    parse(compose_config(*TINY, f"optimizer={name}")).check_optimizer_step()
