"""The mixers of the zoo, each compared with an independent implementation on equal weights, values and gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from timm.models import efficientvit_mit, focalnet, metaformer, mlp_mixer, pvt_v2, swin_transformer, xcit
from torch import Tensor, nn

from vix.attention.agent import AgentAttention
from vix.attention.convolution import Convolution
from vix.attention.cross_covariance import CrossCovariance
from vix.attention.external import ExternalAttention
from vix.attention.focal import FocalModulation
from vix.attention.gating import SpatialGating
from vix.attention.global_filter import GlobalFilter
from vix.attention.identity import Identity
from vix.attention.latent import LatentAttention
from vix.attention.linear import LinearAttention, elu_plus_1
from vix.attention.mamba2 import Mamba2
from vix.attention.neighbourhood import NeighborhoodAttention
from vix.attention.pooling import Pooling
from vix.attention.random import Random
from vix.attention.spatial_reduction import SpatialReduction
from vix.attention.window import WindowAttention
from vix.build import build_model, parse
from vix.errors import ConfigError
from vix.layers.tokens import TokenGrid

D, GRID, PAPER = 32, TokenGrid(8, 8), TokenGrid(32, 32)
Function = Callable[[Tensor], Tensor]

PARAMETERS = [
    (Convolution, {}, 78_082),
    (Pooling, {}, 0),
    (Identity, {}, 0),
    (Random, {}, 0),
    (WindowAttention, {}, 66_948),
    (CrossCovariance, {}, 65_668),
    (CrossCovariance, {"local_interaction": True}, 65_668 + 22 * 128),
    *((LinearAttention, {"kernel": kernel}, 65_664) for kernel in ("elu", "relu", "softmax", "cosine")),
    (AgentAttention, {}, 71_808),
    (SpatialReduction, {}, 328_192),
    (SpatialReduction, {"reduction": "pool"}, 82_432),
    (GlobalFilter, {}, 139_264),
    (SpatialGating, {}, 1024**2 + 1024 + 3 * 128**2 + 5 * 128),
    (NeighborhoodAttention, {}, 66_048),
    (FocalModulation, {}, 70_787),
    (Mamba2, {"bidirectional": False}, 117_912),
    (LatentAttention, {}, 139_264),
    (ExternalAttention, {}, 16_384),
]


@pytest.mark.parametrize(("mixer", "options", "count"), PARAMETERS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_parameters(mixer: Callable[..., nn.Module], options: dict[str, Any], count: int) -> None:
    """For width 128 and the 32×32 tokens of the published models."""
    assert sum(p.numel() for p in mixer(128, PAPER, **options).parameters()) == count


def copy(ours: nn.Module, theirs: nn.Module, names: dict[str, str], join: dict[str, tuple[str, ...]] | None = None) -> None:
    """Give ours the weights of theirs: our name → their name, or the names of tensors that ours holds in one."""
    source, state = theirs.state_dict(), ours.state_dict()
    for own, other in names.items():
        state[own] = source[other].reshape(state[own].shape)
    for own, others in (join or {}).items():
        state[own] = torch.cat([source[name] for name in others]).reshape(state[own].shape)
    assert {*names, *(join or {})} == {name for name, _ in ours.named_parameters()}
    ours.load_state_dict(state)


def assert_same(ours: nn.Module, theirs: Function, x_BND: Tensor, atol: float = 1e-10) -> None:
    """Values, and gradients of the input, for a loss that weighs every element of the output differently."""
    weight = torch.linspace(-1, 1, x_BND.numel(), dtype=x_BND.dtype).view_as(x_BND)
    results = []
    for function in (ours, theirs):
        x = x_BND.clone().requires_grad_()
        out = function(x)
        (gradient,) = torch.autograd.grad((out * weight).sum(), x)
        results.append((out, gradient))
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, atol=atol, rtol=0)


def tokens(grid: TokenGrid = GRID, images: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(images, grid.count, D, dtype=torch.float64)


def on_map(module: Callable[[Tensor], Tensor], grid: TokenGrid = GRID) -> Function:
    """A module of maps (B, D, Y, X) as a function of tokens."""
    return lambda x: module(x.mT.unflatten(2, (grid.height, grid.width))).flatten(2).mT


def made(mixer: Callable[..., nn.Module], grid: TokenGrid = GRID, **options: Any) -> Any:
    """A mixer in float64, all of whose parameters are random."""
    torch.manual_seed(0)
    module = mixer(D, grid, **options).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def test_convolution() -> None:
    ours, theirs = made(Convolution), metaformer.SepConv(D).double()
    names = {"expand.weight": "pwconv1.weight", "conv.weight": "dwconv.weight", "proj.weight": "pwconv2.weight"}
    copy(ours, theirs, names | {"activation.scale": "act1.scale", "activation.bias": "act1.bias"})
    assert_same(ours, on_map(theirs), tokens())


@pytest.mark.parametrize("size", [3, 5])
def test_pooling(size: int) -> None:
    assert_same(Pooling(D, GRID, size=size), on_map(metaformer.Pooling(size)), tokens())


def test_floors() -> None:
    x_BND = tokens()
    assert not Identity(D, GRID)(x_BND).any()
    random = Random(D, GRID).double()
    assert (random.weights_NN > 0).all()
    torch.testing.assert_close(random.weights_NN.sum(dim=1), torch.ones(64, dtype=torch.float64))
    assert_same(random, lambda x: torch.einsum("nm,bmd->bnd", random.weights_NN, x), x_BND)
    assert "weights_NN" in random.state_dict()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("grid", [GRID, TokenGrid(8, 12)], ids=str)
def test_window(grid: TokenGrid, layer: int) -> None:
    ours = made(WindowAttention, grid, layer=layer, window=4)
    size, shift = (grid.height, grid.width), 2 if layer else 0
    theirs = swin_transformer.SwinTransformerBlock(D, size, 4, window_size=4, shift_size=shift).double()
    if layer:  # theirs lets a trace of attention through its mask of −100
        theirs.attn_mask.masked_fill_(theirs.attn_mask != 0, float("-inf"))
    names = {f"to_qkv.{k}": f"attn.qkv.{k}" for k in ("weight", "bias")}
    names |= {f"to_out.{k}": f"attn.proj.{k}" for k in ("weight", "bias")}
    with torch.no_grad():
        nn.init.normal_(theirs.attn.relative_position_bias_table)
        ours.table_HYX.copy_(theirs.attn.relative_position_bias_table.T.reshape(4, 7, 7))
    state, source = ours.state_dict(), theirs.state_dict()
    ours.load_state_dict({**state, **{own: source[other] for own, other in names.items()}})
    assert_same(ours, lambda x: theirs._attn(x.unflatten(1, size)).flatten(1, 2), tokens(grid))


def test_cross_covariance() -> None:
    ours, theirs = made(CrossCovariance), xcit.XCA(D, 4).double()
    names = {"to_qkv.weight": "qkv.weight", "to_out.weight": "proj.weight", "to_out.bias": "proj.bias"}
    nn.init.uniform_(theirs.temperature, 0.5, 2)
    copy(ours, theirs, names | {"temperature_H11": "temperature"})
    assert_same(ours, theirs, tokens())


def test_local_interaction() -> None:
    ours, theirs = made(CrossCovariance, local_interaction=True), xcit.LPI(D).double()
    source = {"0": "conv1", "2": "bn", "3": "conv2"}
    for own, other in source.items():
        ours.local[int(own)].load_state_dict(getattr(theirs, other).state_dict())
    assert_same(ours.local, lambda x: theirs.conv2(theirs.bn(theirs.act(theirs.conv1(x)))), torch.randn(2, D, 8, 8).double())
    x_BND = tokens()
    without = made(CrossCovariance)
    without.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("local")})
    assert_same(ours, lambda x: without(x) + theirs(x, 8, 8), x_BND)


def qkv_of(theirs: nn.Module) -> dict[str, tuple[str, ...]]:
    return {"to_qkv.weight": ("to_q.weight", "to_k.weight", "to_v.weight")}


def test_efficient_attention() -> None:
    from linear_attention_transformer.linear_attention_transformer import SelfAttention

    ours, theirs = made(LinearAttention, kernel="softmax"), SelfAttention(D, 4).double()
    copy(ours, theirs, {"to_out.weight": "to_out.weight", "to_out.bias": "to_out.bias"}, qkv_of(theirs))
    assert_same(ours, theirs, tokens())


def test_relu_kernel() -> None:
    """Theirs computes the attention in float32, so the bound is that type's; the formula written out has no such limit."""
    ours = made(LinearAttention, kernel="relu")
    theirs = efficientvit_mit.LiteMLA(D, D, heads=4, dim=8, use_bias=(False, True), norm_layer=(None, None), scales=()).double()
    with torch.no_grad():  # theirs has queries, keys and values of a head next to one another
        qkv = ours.to_qkv.weight.view(3, 4, 8, D).transpose(0, 1).reshape(3 * D, D, 1, 1)
        theirs.qkv.conv.weight.copy_(qkv)
        theirs.proj.conv.weight.copy_(ours.to_out.weight[..., None, None])
        theirs.proj.conv.bias.copy_(ours.to_out.bias)
    assert_same(ours, on_map(theirs), tokens(), atol=2e-5)

    def written_out(x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in ours.to_qkv(x).chunk(3, dim=-1))
        weights = q.relu() @ k.relu().mT
        out = weights @ v / (weights.sum(dim=-1, keepdim=True) + 1e-5)
        return ours.to_out(out.transpose(1, 2).flatten(2))

    assert_same(ours, written_out, tokens())


def test_elu_kernel() -> None:
    """elu + 1 and its gradient, which PyTorch's elu has as well, also where exp would overflow or elu + 1 is rounded to 0."""
    x = torch.tensor([-80.0, -20, -1, -0.0, 0, 1, 100, 1e30], requires_grad=True)
    features = elu_plus_1(x)
    (gradient,) = torch.autograd.grad(features.sum(), x)
    exact = x.detach().double().requires_grad_()
    expected = torch.where(exact > 0, exact + 1, exact.clamp(max=0).exp())
    torch.testing.assert_close(features.double(), expected, rtol=1e-6, atol=0)
    (of_elu,) = torch.autograd.grad(F.elu(exact).sum(), exact)
    torch.testing.assert_close(gradient.double(), of_elu, rtol=1e-6, atol=0)


def test_cosine_kernel() -> None:
    """Attention with as many heads as channels, written out with its N×N matrices."""
    ours = made(LinearAttention, kernel="cosine")

    def written_out(x: Tensor) -> Tensor:
        q, k, v = ours.to_qkv(x).chunk(3, dim=-1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return ours.to_out(torch.einsum("bnd,bmd,bmd->bnd", q, k, v))

    assert_same(ours, written_out, tokens())


def test_cosine_kernel_of_zeros() -> None:
    """Erased pixels can make a token all zero; its gradient is finite, and not larger by orders of magnitude."""
    ours = made(LinearAttention, kernel="cosine")
    x = tokens()
    x[:, 5] = 0
    (gradient,) = torch.autograd.grad(ours(x.requires_grad_()).square().sum(), x)
    assert gradient.isfinite().all()
    assert gradient[:, 5].norm() < 1e4 * gradient[:, 4].norm()


def test_agent() -> None:
    from agent_attention_pytorch import AgentSelfAttention

    ours = made(AgentAttention, agents=6)
    theirs = AgentSelfAttention(D, num_agent_tokens=6, dim_head=8, heads=4, talking_heads=False, gate=False).double()
    nn.init.normal_(theirs.agent_tokens)
    copy(ours, theirs, {"agents_HAE": "agent_tokens", "to_qkv.weight": "to_qkv.0.weight", "to_out.weight": "to_out.1.weight"})
    assert_same(ours, theirs, tokens())


def test_pooled_agents() -> None:
    """Agents from queries, and the convolution of the values, written out."""
    grid = TokenGrid(8, 8, prefix=1)
    ours = made(AgentAttention, grid, agents=16, source="pooled", conv=True)

    def written_out(x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in ours.to_qkv(x).chunk(3, dim=-1))
        agents = q[:, :, 1:].unflatten(2, (4, 2, 4, 2)).mean(dim=(3, 5)).flatten(2, 3)
        collected = (agents @ k.mT / 8**0.5).softmax(dim=-1) @ v
        out = ((q @ agents.mT / 8**0.5).softmax(dim=-1) @ collected).transpose(1, 2).flatten(2)
        map_BFYX = v.transpose(1, 2).flatten(2)[:, 1:].mT.unflatten(2, (8, 8))
        return ours.to_out(out + F.pad(ours.conv(map_BFYX).flatten(2).mT, (0, 0, 1, 0)))

    assert_same(ours, written_out, tokens(grid))


@pytest.mark.parametrize("linear", [False, True])
def test_spatial_reduction(linear: bool) -> None:
    ours = made(SpatialReduction, reduction="pool" if linear else "conv", stride=2)
    theirs = pvt_v2.Attention(D, 4, sr_ratio=2, linear_attn=linear, qkv_bias=False).double()
    names = {f"reduce.{k}": f"sr.{k}" for k in ("weight", "bias")} | {f"norm.{k}": f"norm.{k}" for k in ("weight", "bias")}
    names |= {f"to_out.{k}": f"proj.{k}" for k in ("weight", "bias")}
    copy(ours, theirs, names | {"to_q.weight": "q.weight", "to_kv.weight": "kv.weight"})
    assert_same(ours, lambda x: theirs(x, [8, 8]), tokens())


@pytest.mark.parametrize(
    ("grid", "stride"), [(TokenGrid(7, 7), 4), (TokenGrid(5, 9), 3), (TokenGrid(4, 6, prefix=1), 4)], ids=str
)
def test_spatial_reduction_of_every_token(grid: TokenGrid, stride: int) -> None:
    """Each token of the map is among the keys, also where the stride does not divide rows or columns."""
    ours = made(SpatialReduction, grid, stride=stride)
    x = tokens(grid).requires_grad_()
    other = 0 if grid.prefix else 1  # a token that receives the keys' values from all others
    (gradient,) = torch.autograd.grad(ours(x)[:, other].square().sum(), x)
    assert (gradient[:, grid.prefix :] != 0).any(dim=-1).all()


@pytest.mark.parametrize("grid", [GRID, TokenGrid(6, 9)], ids=str)
def test_global_filter(grid: TokenGrid) -> None:
    """A circular convolution with the filter's kernel; the package computes in float32, so its bound is that type's."""
    from fightingcv_attention.attention.gfnet import GlobalFilter as Theirs

    ours = made(GlobalFilter, grid)
    theirs = Theirs(D, grid.height, grid.width // 2 + 1).double()
    with torch.no_grad():
        theirs.complex_weight.copy_(ours.filter_YXD2)
    size = (grid.height, grid.width)
    assert_same(ours, lambda x: theirs(x, size).to(x.dtype), tokens(grid), atol=5e-6)

    def circular(x: Tensor) -> Tensor:
        kernel_YXD = torch.fft.irfft2(torch.view_as_complex(ours.filter_YXD2), s=size, dim=(0, 1))
        maps = x.unflatten(1, size)
        shifts = [(y, z) for y in range(size[0]) for z in range(size[1])]
        return sum(kernel_YXD[y, z] * maps.roll((y, z), (1, 2)) for y, z in shifts).flatten(1, 2)  # type: ignore[union-attr]

    assert_same(ours, circular, tokens(grid))


def test_gating() -> None:
    ours = made(SpatialGating)
    theirs = mlp_mixer.SpatialGatingBlock(D, 64, mlp_ratio=2, norm_layer=nn.LayerNorm).double()
    names = {f"expand.{k}": f"mlp_channels.fc1.{k}" for k in ("weight", "bias")}
    names |= {f"norm.{k}": f"mlp_channels.gate.norm.{k}" for k in ("weight", "bias")}
    names |= {f"mix.{k}": f"mlp_channels.gate.proj.{k}" for k in ("weight", "bias")}
    names |= {f"proj.{k}": f"mlp_channels.fc2.{k}" for k in ("weight", "bias")}
    copy(ours, theirs, names)
    assert_same(ours, theirs.mlp_channels, tokens())


@pytest.mark.parametrize(("grid", "kernel"), [(GRID, 3), (GRID, 7), (TokenGrid(6, 9), 5), (TokenGrid(5, 16), 5)], ids=str)
def test_neighborhood(grid: TokenGrid, kernel: int) -> None:
    """Softmax attention to all tokens, masked but for the kernel × kernel nearest whose window stays on the map."""
    ours = made(NeighborhoodAttention, grid, kernel=kernel)

    def seen(size: int) -> Tensor:
        start = (torch.arange(size) - kernel // 2).clamp(0, size - kernel)
        return (torch.arange(size) >= start[:, None]) & (torch.arange(size) < start[:, None] + kernel)

    mask = (seen(grid.height)[:, None, :, None] & seen(grid.width)[None, :, None, :]).flatten(2).flatten(0, 1)
    assert (mask.sum(dim=1) == kernel**2).all()

    def written_out(x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in ours.to_qkv(x).chunk(3, dim=-1))
        logits = (q @ k.mT / math.sqrt(8)).masked_fill(~mask, float("-inf"))
        return ours.to_out((logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))

    assert_same(ours, written_out, tokens(grid))


@pytest.mark.slow
def test_neighborhood_of_natten() -> None:
    """The package has heads of 32 and more, and no float64 on a CPU."""
    natten = pytest.importorskip("natten")
    torch.manual_seed(0)
    ours = NeighborhoodAttention(128, TokenGrid(12, 12))
    x_BND = torch.randn(2, 144, 128)

    def theirs(x: Tensor) -> Tensor:
        q, k, v = (t.view(2, 12, 12, 4, 32) for t in ours.to_qkv(x).chunk(3, dim=-1))
        return ours.to_out(natten.na2d(q, k, v, kernel_size=7, backend="flex-fna").flatten(3).flatten(1, 2))

    with torch.no_grad():  # which has no gradient on a CPU
        torch.testing.assert_close(ours(x_BND), theirs(x_BND), atol=2e-6, rtol=0)


def test_focal() -> None:
    ours, theirs = made(FocalModulation), focalnet.FocalModulation(D, focal_window=3, focal_level=2).double()
    names = {f"to_qcg.{k}": f"f.{k}" for k in ("weight", "bias")} | {f"modulator.{k}": f"h.{k}" for k in ("weight", "bias")}
    names |= {f"proj.{k}": f"proj.{k}" for k in ("weight", "bias")}
    copy(ours, theirs, names | {f"convs.{i}.weight": f"focal_layers.{i}.0.weight" for i in range(2)})
    assert_same(ours, on_map(theirs), tokens())


@pytest.mark.parametrize("count", [5, 64, 65, 200])
def test_state_space_is_its_recurrence(count: int) -> None:
    """State by state, for lengths below, at and above a chunk; the backward direction is the same on the reversed sequence."""
    grid = TokenGrid(1, count)
    ours = made(Mamba2, grid, heads=4, state=8)

    def recurrence(x: Tensor, part: Any) -> Tensor:
        z, xbc, step = part.in_proj(x).split([64, 64 + 16, 4], dim=-1)
        weight, padded = part.conv.weight, F.pad(xbc, (0, 0, 3, 0))
        xbc = F.silu(sum(weight[:, 0, i] * padded[:, i : i + count] for i in range(4)) + part.conv.bias)
        values, b, c = xbc.split([64, 8, 8], dim=-1)
        step = F.softplus(step + part.step_offset_H)
        state, rows = torch.zeros(2, 4, 8, 16, dtype=x.dtype), []
        for t in range(count):
            head = values[:, t].view(2, 4, 1, 16)
            decay = torch.exp(-part.log_decay_H.exp() * step[:, t])[..., None, None]
            state = decay * state + step[:, t, :, None, None] * b[:, t, None, :, None] * head
            rows.append(((c[:, t, None, None] @ state) + part.skip_H[:, None, None] * head).flatten(1))
        y = torch.stack(rows, dim=1) * F.silu(z)
        return part.out_proj(y / (y.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * part.norm.weight)

    def both(x: Tensor) -> Tensor:
        return recurrence(x, ours.forwards) + recurrence(x.flip(1), ours.backwards).flip(1)

    assert_same(ours, both, tokens(grid))


@pytest.mark.slow
def test_state_space_of_transformers() -> None:
    """The package computes the scan in float32."""
    configuration = pytest.importorskip("transformers").Mamba2Config(
        hidden_size=128, num_heads=8, head_dim=32, state_size=64, n_groups=1, expand=2, conv_kernel=4, num_hidden_layers=1
    )
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    ours, theirs = Mamba2(128, TokenGrid(10, 10), bidirectional=False), Mamba2Mixer(configuration, 0)
    names = {"in_proj.weight": "in_proj.weight", "conv.weight": "conv1d.weight", "conv.bias": "conv1d.bias", "skip_H": "D"}
    names |= {
        "step_offset_H": "dt_bias",
        "log_decay_H": "A_log",
        "norm.weight": "norm.weight",
        "out_proj.weight": "out_proj.weight",
    }
    copy(ours.forwards, theirs, names)
    x_BND = torch.randn(2, 100, 128)
    torch.testing.assert_close(ours(x_BND), theirs(x_BND), atol=1e-5, rtol=1e-4)


def test_latent() -> None:
    from isab_pytorch import ISAB

    ours, theirs = made(LatentAttention, dim_head=64, latents=6), ISAB(dim=D, heads=4, num_latents=6).double()
    names = {"read.latents_ND": "latents"}
    for own, other in (("read", "attn1"), ("write", "attn2")):
        names |= {f"{own}.{name}.weight": f"{other}.{name}.weight" for name in ("to_q", "to_kv", "to_out")}
    copy(ours, theirs, names)
    assert_same(ours, lambda x: theirs(x)[0], tokens())


def test_external() -> None:
    from fightingcv_attention.attention.ExternalAttention import ExternalAttention as Theirs

    ours, theirs = made(ExternalAttention, memory_size=6), Theirs(D, 6).double()
    copy(ours, theirs, {"keys.weight": "mk.weight", "values.weight": "mv.weight"})
    assert_same(ours, theirs, tokens())


def test_external_of_a_token_far_below_the_others() -> None:
    """Its softmax over the tokens is 0 in float32 for all entries; their ratios are not."""
    ours = made(ExternalAttention, memory_size=6)
    with torch.no_grad():
        ours.keys.weight[:, 0] = 500.0
    x_BND = tokens()
    x_BND[:, 0, 0] = -2.0
    torch.testing.assert_close(ours.float()(x_BND.float()), ours.double()(x_BND).float(), atol=1e-3, rtol=1e-3)


ALL = {
    "convolution": Convolution,
    "pooling": Pooling,
    "identity": Identity,
    "random": Random,
    "window": WindowAttention,
    "cross_covariance": CrossCovariance,
    "agent": AgentAttention,
    "spatial_reduction": SpatialReduction,
    "global_filter": GlobalFilter,
    "gating": SpatialGating,
    "neighbourhood": NeighborhoodAttention,
    "focal": FocalModulation,
    "mamba2": Mamba2,
    "latent": LatentAttention,
    "external": ExternalAttention,
}


@pytest.mark.parametrize("name", ALL)
def test_images_do_not_depend_on_one_another(name: str) -> None:
    """One image alone and in a batch agree, and a reloaded mixer computes the same, bit by bit."""
    mixer = made(ALL[name])
    x_BND = tokens(images=3)
    whole = mixer(x_BND)
    torch.testing.assert_close(mixer(x_BND[1:2]), whole[1:2], atol=1e-12, rtol=0)
    torch.manual_seed(5)
    again = ALL[name](D, GRID).double()
    again.load_state_dict(mixer.state_dict())
    assert torch.equal(again(x_BND), whole)


REFUSED = [
    (Pooling, {"size": 2}, "size=2 is even; nearest odd: 1, 3"),
    (Convolution, {"kernel": 4}, "kernel=4 is even; nearest odd: 3, 5"),
    (FocalModulation, {"kernels": (3, 4)}, "kernels=[3,4]: 4 is even; nearest odd: 3, 5"),
    (WindowAttention, {"window": 3}, "window=3 does not divide the map of 8×8 tokens; nearest: 2, 4"),
    (NeighborhoodAttention, {"kernel": 9}, "kernel=9 is more than the 8×8 tokens; at most 7"),
    (AgentAttention, {"agents": 10, "source": "pooled"}, "agents=10 form no square grid on the map; nearest: 9, 16"),
    (SpatialReduction, {"stride": 9}, "stride=9 is more than the 8×8 tokens; at most 8"),
    (SpatialReduction, {"size": 9, "reduction": "pool"}, "size=9 is more than the 8×8 tokens; at most 8"),
    (Mamba2, {"heads": 7}, "heads=7 does not divide the inner width 64; nearest that do: 4, 8"),
    (LatentAttention, {"heads": 5}, "heads=5 does not divide"),
]


@pytest.mark.parametrize(("mixer", "options", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_refused(mixer: Callable[..., nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("[", r"\[").replace("]", r"\]")):
        mixer(D, GRID, **options)


def test_a_class_token_that_would_see_nothing_is_refused(compose_config: Callable[..., Any]) -> None:
    """Its output would depend on no other token: there is no mixing, or the scan is causal and it is the first token."""
    for options in (["attention=mamba2", "attention.bidirectional=false"], ["attention=identity"]):
        with pytest.raises(ConfigError, match=r"would never see the image; use .*model\.pool=mean$"):
            build_model(compose_config("model=vit", "embedding=linear", "data=digits", *options))
        build_model(compose_config("model=vit", "model.pool=mean", "embedding=linear", "data=digits", *options))


def test_table_of_mixers(compose_config: Callable[..., Any]) -> None:
    """docs/mixers.md names every file of conf/attention with its parameters and whether it accepts a class token."""
    lines = [line for line in (ROOT / "docs/mixers.md").read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if "attention=" not in line]
    names = [name.strip("`") for row in rows for name in row[0].split(", ")]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "conf/attention").glob("*.yaml"))
    for row in rows:
        for name, count in zip(row[0].split(", "), row[4].split("; "), strict=True):
            make = parse(compose_config("data=digits", f"attention={name.strip('`')}")).part("attention")
            mixer = make(dim=128, tokens=PAPER)
            assert f"{sum(p.numel() for p in mixer.parameters()):,}" == count, name
            assert (row[5] == "no") == getattr(mixer, "map_only", False), name
