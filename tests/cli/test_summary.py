"""The summary of a model: its totals, the paper's size figure of every published row, and FLOPs counted by hand."""

import csv
import io
import math
import resource
import subprocess
import sys

import pytest
import torch
from conftest import EXPERIMENTS, HANGS, ROOT, run_train
from torch import nn

import vix
from vix.analysis.model_summary import recorded, summarize
from vix.analysis.paper_size import paper_megabytes
from vix.build import build_model, parse
from vix.cli.plan import plan
from vix.composition.command import Flags
from vix.composition.compose import compose
from vix.layers.attend import softmax_attention
from vix.models.counts import flop_counter, parameter_counts, training_flops

PUBLISHED = {row["experiment"]: row for row in csv.DictReader((ROOT / "vix" / "runs" / "published.csv").open())}
ATTENTIONS = sorted(path.stem for path in (ROOT / "conf" / "attention").glob("*.yaml"))


@pytest.fixture(scope="module")
def forward_and_training_flops():
    """``(make, *shape)``: FLOPs of a forward pass of a module on the meta device, and of forward and backward."""

    def count(make, *shape):
        with torch.device("meta"):
            module, x = make(), torch.empty(*shape, requires_grad=True)
        with flop_counter() as forward:
            module(x)
        with flop_counter() as both:
            module(x).sum().backward()
        return forward.get_total_flops(), both.get_total_flops()

    return count


@pytest.mark.parametrize("row", [case for case in EXPERIMENTS if case.values[0] in PUBLISHED])
def test_size_is_the_published_one(compose_config, row):
    """The paper prints two decimals; the furthest off, hybrid_vin_rope, is at 0.0067 MB."""
    summary = summarize(parse(compose_config(f"experiment={row}")))
    assert summary.paper_mb == pytest.approx(float(PUBLISHED[row]["published_size_mb"]), abs=0.007)
    assert summary.weight_bias_params == int(PUBLISHED[row]["weight_bias_params"])
    assert summary.trainable_params == int(PUBLISHED[row]["trainable_params"])


def test_size_of_plain_layers_is_what_torchsummary_says():
    """Worked out by hand: 3·8·8 pixels; outputs 4·8·8 twice, and 5; the container itself has no parameters."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5))
    with recorded(model) as calls:
        model(torch.zeros(1, 3, 8, 8))
    counted = 4 * 27 + 4 + 5 * 256 + 5
    expected = 4 * (192 + 2 * (256 + 256 + 256 + 5) + counted) / 2**20
    assert paper_megabytes(model, calls, counted) == expected


@pytest.mark.parametrize("row", ["vil", "mixer", "cct", "cvt", "hybrid_pin"])
def test_totals(compose_config, row):
    cfg = compose_config(f"experiment={row}")
    summary, model = summarize(parse(cfg)), vix.build_model(cfg)
    counts = parameter_counts(model)
    assert {name: getattr(summary, name) for name in counts} == counts
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert round(summary.checkpoint_mb * 1e6) == buffer.tell()
    whole = summary.layers[0]
    assert (whole.name, whole.kind, whole.output) == ("", type(model).__name__, (1, 10))
    assert whole.parameters == counts["trainable_params"]
    assert whole.multiply_adds * 2 == summary.forward_flops


def test_rows_hold_what_is_in_them(compose_config):
    """In every module, the children's parameters and multiply-adds do not exceed its own."""
    layers = {layer.name: layer for layer in summarize(parse(compose_config("experiment=hybrid_vin"))).layers}
    assert layers["blocks.2.mixer.to_qkv"] == ("blocks.2.mixer.to_qkv", "Linear", (1, 1025, 384), 49_152, 1025 * 128 * 384)
    for name, layer in layers.items():
        children = [child for path, child in layers.items() if path and path != name and path.rpartition(".")[0] == name]
        assert sum(child.parameters for child in children) <= layer.parameters
        assert sum(child.multiply_adds for child in children) <= layer.multiply_adds


@pytest.mark.parametrize("implementation", ["fused", "explicit"])
def test_flops_of_vit_by_hand(compose_config, implementation):
    """Both products of N×N attention count, fused or not, and a backward pass has two products for each one forward."""
    summary = summarize(parse(compose_config("experiment=vit", f"attention.implementation={implementation}")))
    tokens, dim = 1025, 128
    block = tokens * dim * 3 * dim + 2 * tokens**2 * dim + tokens * dim * dim + 2 * tokens * dim * 2 * dim
    embedding = 1024 * 3 * dim
    assert summary.forward_flops == 2 * (embedding + 4 * block + dim * 10)
    # The image needs no gradient.
    assert summary.training_flops == 3 * summary.forward_flops - 2 * embedding


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("biased", [False, True])
def test_flops_of_fused_attention_by_hand(device, biased):
    """Two products, and four in the backward pass, also by the CPU's fused kernels."""
    q_BHNE, k_BHME, v_BHME = (torch.rand(2, 3, n, 8, device=device, requires_grad=True) for n in (130, 140, 140))
    bias_1HNM = torch.rand(1, 3, 130, 140, device=device) if biased else None
    product = 2 * (2 * 3 * 130 * 140 * 8)
    with flop_counter() as forward:
        out_BHNE = softmax_attention(q_BHNE, k_BHME, v_BHME, bias_1HNM)
    with flop_counter() as backward:
        out_BHNE.sum().backward()
    assert (forward.get_total_flops(), backward.get_total_flops()) == (2 * product, 4 * product)


@pytest.mark.parametrize(
    ("make", "shape", "multiply_adds"),
    [
        pytest.param(lambda: nn.Linear(7, 11), (5, 7), 5 * 7 * 11, id="linear"),
        pytest.param(lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 5), 2 * 25 * 6 * 8 * 9, id="conv"),
        pytest.param(lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6), (2, 6, 5, 5), 2 * 25 * 12 * 9, id="depthwise"),
        pytest.param(lambda: nn.Conv2d(6, 8, 3, 2, padding=1, groups=2), (2, 6, 8, 8), 2 * 16 * 8 * 3 * 9, id="strided"),
        pytest.param(lambda: nn.ConvTranspose2d(6, 8, 2, 2, groups=2), (3, 6, 4, 4), 3 * 16 * 6 * 4 * 4, id="transposed"),
    ],
)
def test_flops_of_layers_by_hand(forward_and_training_flops, make, shape, multiply_adds):
    """Two a multiply-add; each of the two gradients costs as much again."""
    assert forward_and_training_flops(make, *shape) == (2 * multiply_adds, 6 * multiply_adds)


@pytest.mark.parametrize(("transform", "factor"), [(torch.fft.fft2, 5), (torch.fft.rfft2, 2.5)])
def test_flops_of_a_fourier_transform(transform, factor):
    x = torch.empty(3, 8, 16, device="meta")
    with flop_counter() as counter:
        spectrum = transform(x)
    assert counter.get_total_flops() == factor * 3 * 8 * 16 * math.log2(8 * 16)
    if factor == 2.5:
        with flop_counter() as counter:
            torch.fft.irfft2(spectrum)
        assert counter.get_total_flops() == factor * 3 * 8 * 16 * math.log2(8 * 16)


SMALLER = {"nystrom": ("attention.landmarks=4",), "neighbourhood": ("attention.kernel=3",)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("levit", "cct", "cvt", "pit"))]
)
def test_every_mixer_in_every_family(compose_config, model):
    """Of those that the paper has no size for too."""
    for attention in ATTENTIONS:
        if model == "levit" and attention in ("fourier", "random"):
            continue  # is refused
        small = ("data=digits", f"model={model}", f"attention={attention}", "embedding=linear", "posenc=none")
        fewer = SMALLER.get(attention, ()) if attention != "window" or model != "pit" else ("attention.window=4",)
        pool = ("model.pool=mean",) if model in ("vit", "pit") else ()
        summary = summarize(parse(compose_config(*small, *fewer, *pool)))
        assert summary.paper_mb > 4 * summary.weight_bias_params / 2**20
        assert summary.training_flops > 2 * summary.forward_flops > 0


@pytest.mark.parametrize(
    "overrides", ["experiment=levit_pyramid", "experiment=cvt_pyramid", "attention=levit posenc=relative2d"]
)
def test_what_the_paper_does_not_have(compose_config, overrides):
    summary = summarize(parse(compose_config(*overrides.split())))
    assert summary.training_flops > 2 * summary.forward_flops > 0


def summary_command(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vix", "summary", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS, check=False, **options)


@pytest.mark.slow
def test_the_command():
    """In little more of the processor's time than importing PyTorch takes; without data and from the checkout alone."""
    used = [resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime]
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    used.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime)
    done = summary_command("experiment=vin", "data.root=/nonexistent")
    used.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime)
    assert done.returncode == 0, done.stderr
    assert used[2] - used[1] < 8 * (used[1] - used[0])  # measured: 1.9 times
    table, _, totals = done.stdout.partition("\n\n")[2].partition("Each row includes")
    rows = [line.split() for line in table.splitlines()]
    assert ["to_qkv:", "Linear", "1×1025×384", "49,152", "50,380,800"] in rows
    for total in ("662,298", "530,970", "86.62 MB", "2,668,", "1.589 GFLOPs", "4.765 GFLOPs"):
        assert total in totals
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment=vni", "error: experiment=vni: conf/experiment/ has no such file; nearest: vit, vip, vin"),
        ("attention.heads=3", "error: attention.heads=3 does not divide the width 128; nearest that do: 2, 4"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, override, message):
    done = run_train(tmp_path, "summary", override, program=ROOT / "vix" / "__main__.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


class Wrapped(nn.Module):
    """A mixer of a user's own: PyTorch's attention, which returns a tuple."""

    def __init__(self, dim, tokens):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, x_BND):
        return self.attention(x_BND, x_BND, x_BND)[0]


class Scaled(nn.Module):
    """Another, which computes with a number of Python's, so that shapes alone do not suffice."""

    def __init__(self, dim, tokens):
        super().__init__()
        self.project = nn.Linear(dim, dim)

    def forward(self, x_BND):
        return self.project(x_BND) / max(1.0, float(x_BND.detach().abs().max()))


@pytest.mark.parametrize("mixer", [Wrapped, Scaled])
def test_mixers_of_a_users_own(compose_config, monkeypatch, tmp_path, mixer):
    """They are summarized, planned next to others, and counted before training, without drawing random numbers."""
    monkeypatch.setenv("VIX_PACKAGES", __name__)
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "conf" / "attention"
    directory.mkdir(parents=True)
    (directory / "own.yaml").write_text(f"_target_: {__name__}.{mixer.__name__}\n")
    flags = Flags(config_dir=str(tmp_path / "conf"))
    small = ("experiment=quickstart", "model.depth=1", "model.dropout=0.1")
    jobs = plan([*small, "attention=own,softmax"], flags=flags, memory_gb=1.0)
    assert [job.state for job in jobs] == ["new", "new"]
    assert (jobs[0].estimated_gb is None) == (jobs[0].fit is None) == (mixer is Scaled)
    summary = jobs[0].summary
    kinds = {layer.name: layer for layer in summary.layers}
    assert kinds["blocks.0.mixer"].kind == mixer.__name__
    assert kinds["blocks.0.mixer"].output == (1, 65, 64)
    inner = "attention" if mixer is Wrapped else "project"
    assert kinds[f"blocks.0.mixer.{inner}"].output == (1, 65, 64)
    model = build_model(compose([*small, "attention=own"], flags)).train()
    before = torch.get_rng_state()
    assert training_flops(model, (1, 8, 8)) == summary.training_flops > 2 * summary.forward_flops > 0
    assert torch.equal(torch.get_rng_state(), before)
