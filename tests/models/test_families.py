"""LeViT, CCT, CvT and PiT: published parameter counts, parity with vit_pytorch, and each detail of the published models."""

import csv

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn
from vit_pytorch import cct as reference_cct
from vit_pytorch import cvt as reference_cvt
from vit_pytorch import levit as reference_levit
from vit_pytorch import pit as reference_pit

from vix.attention.cvt import CvTAttention
from vix.attention.softmax import Softmax
from vix.build import build_model
from vix.data.digits import Digits
from vix.errors import ConfigError
from vix.layers.blocks import ChannelNorm, StochasticDepth
from vix.layers.embedding import CCTTokenizer
from vix.layers.posenc import PositionEncoding, Relative2d, Rotary2d, SinCos
from vix.layers.tokens import TokenGrid, join
from vix.models.cct import CCTBlock
from vix.models.counts import parameter_counts
from vix.models.levit import Downsample

PUBLISHED = {row["experiment"]: row for row in csv.DictReader((ROOT / "vix" / "runs" / "published.csv").open())}
ROWS = [name for name, row in PUBLISHED.items() if row["table"] in "34"]
FAMILIES = ("levit", "cct", "cvt", "pit")
ATTENTIONS = sorted(path.stem for path in (ROOT / "conf" / "attention").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)


@pytest.fixture
def model_of(compose_config):
    """``model_of(*overrides)``: the model that ``python train.py OVERRIDES`` would train."""
    return lambda *overrides: build_model(compose_config(*overrides))


# Parameters


@pytest.mark.parametrize("row", ROWS)
def test_both_published_parameter_counts(model_of, row):
    with torch.device("meta"):
        counts = parameter_counts(model_of(f"experiment={row}"))
    assert counts == {column: int(PUBLISHED[row][column]) for column in counts}


def test_there_are_18_rows():
    assert len(ROWS) == 18  # 12 in table 3, 6 in table 4
    assert int(PUBLISHED["levip"]["published_params"]) != int(PUBLISHED["levip"]["weight_bias_params"])  # the misprint


@pytest.mark.parametrize(("row", "counted"), [("pil", 725_002), ("hybrid_pil", 817_738)])
def test_pit_with_linformer_which_the_paper_could_not_run(model_of, row, counted):
    with torch.device("meta"):
        model = model_of(f"experiment={row}")
    assert parameter_counts(model)["weight_bias_params"] == counted


# Parity with vit_pytorch on equal weights: a reference's parts that compute something else are replaced, and only those.


def randomise(model: nn.Module) -> nn.Module:
    """Parameters and running statistics away from the zeros and ones at which an error would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.3 * noise if "norm" in name else parameter + 0.02 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) + ("var" in name))
    return model


def copy_weights(pairs: list[tuple[nn.Module | nn.Parameter, nn.Module | Tensor]], reference: nn.Module, ours: nn.Module):
    """Copy ours into theirs, module by module; 1×1 convolutions there are linear layers here."""
    with torch.no_grad():
        for theirs, value in pairs:
            if isinstance(value, nn.Module):
                for a, b in zip(theirs.state_dict().values(), value.state_dict().values(), strict=True):
                    a.copy_(b.reshape(a.shape))
            else:
                theirs.copy_(value.reshape(theirs.shape))
    # Nothing keeps a start of its own on either side.
    assert sum(p.numel() for p in reference.parameters()) == sum(p.numel() for p in ours.parameters())


def assert_same(ours: nn.Module, reference: nn.Module, modes: tuple[bool, ...] = (False,)):
    """Logits agree to 1e-5 in float32; in float64 they and their gradient in the images to 1e-9 in each of ``modes``.

    True in ``modes`` is training mode, whose batch norms magnify rounding too much for float32.
    """
    channels = next(m for m in ours.modules() if isinstance(m, nn.Conv2d)).in_channels
    images = torch.rand(1, 3, 32, 32) if channels == 3 else torch.rand(2, 1, 8, 8)
    images = images * 2 - 1
    torch.testing.assert_close(ours.eval()(images), reference.eval()(images), atol=1e-5, rtol=0)
    ours.double(), reference.double()
    for mode in modes:
        results = []
        for model in (ours.train(mode), reference.train(mode)):
            image = images.double().requires_grad_()
            logits = model(image)
            results.append((logits, *torch.autograd.grad(logits[:, 3].sum(), image)))
        for ours_is, theirs_is in zip(*results, strict=True):
            torch.testing.assert_close(ours_is, theirs_is, atol=1e-9, rtol=1e-9)


SMALL = "data=digits"


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("experiment=levit",), id="paper"),
        pytest.param(("experiment=levit", "posenc=relative2d", "posenc.std=1", SMALL, "model.dim=64"), id="relative-bias"),
        pytest.param(("experiment=levit", SMALL, "model.dim=48", "model.depth=[2]", "model.heads=3"), id="three-heads"),
        pytest.param(("experiment=levit", SMALL, "attention.implementation=explicit"), id="explicit"),
    ],
)
def test_levit_is_vit_pytorchs(model_of, overrides):
    ours = randomise(model_of(*overrides))
    block, tokens = ours.blocks[0], ours.embedding.grid
    width = ours.head.in_features
    reference = reference_levit.LeViT(
        image_size=tokens[0] * 16,  # its stem has four convolutions of stride 2
        num_classes=10,
        dim=width,
        depth=len(ours.blocks),
        heads=block.mixer.heads,
        mlp_mult=2,
        stages=1,
        dim_key=width // block.mixer.heads,
        dim_value=width // block.mixer.heads,
    )
    reference.conv_embedding = ours.embedding  # the published stem keeps the 32×32 pixels, as in the Hybrid models
    pairs = [(reference.mlp_head, ours.head)]
    for (attention, feed_forward), block in zip(reference.backbone[0].layers, ours.blocks, strict=True):
        feed_forward.net[1] = nn.GELU()  # there: Hardswish
        mixer = block.mixer
        for i, unit in enumerate((attention.to_q, attention.to_k, attention.to_v)):
            pairs += [(unit[0].weight, mixer.to_qkv.weight.chunk(3)[i])]
            names = ("weight", "bias", "running_mean", "running_var")
            pairs += [(getattr(unit[1], name), getattr(mixer.norm_qkv, name).chunk(3)[i]) for name in names]
        pairs += [(attention.to_out[1], mixer.to_out), (attention.to_out[2], mixer.norm_out)]
        pairs += [(feed_forward.net[0], block.mlp[0]), (feed_forward.net[3], block.mlp[3])]
        bias = mixer.attend.position_bias
        if bias is None:
            attention.pos_bias = nn.Embedding.from_pretrained(torch.zeros_like(attention.pos_bias.weight))
            del attention.pos_bias.weight
            attention.pos_bias.weight = torch.zeros(tokens[0] * tokens[1], mixer.heads)
        else:  # there it is divided by the scale of the logits, (head width)^(−1/2)
            pairs += [(attention.pos_bias.weight, bias.table_HYX.flatten(1).T * attention.scale)]
    copy_weights(pairs, reference, ours)
    assert_same(ours, reference, modes=(False, True))


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("experiment=cct",), id="paper"),
        pytest.param(("experiment=cct", SMALL, "model.dim=32", "model.depth=2", "model.mlp_ratio=2"), id="small"),
        pytest.param(("experiment=cct", SMALL, "attention.heads=2", "embedding.patch_size=1"), id="two-heads"),
    ],
)
def test_cct_is_vit_pytorchs(model_of, overrides):
    ours = randomise(model_of(*overrides))
    block, width = ours.blocks[0], ours.head.in_features
    reference = reference_cct.CCT(
        img_size=ours.embedding.grid[0],
        embedding_dim=width,
        n_input_channels=ours.embedding.layers[0].in_channels,
        n_conv_layers=3,
        kernel_size=3,
        stride=1,
        padding=1,
        pooling_stride=1,
        num_layers=len(ours.blocks),
        num_heads=block.mixer.heads,
        mlp_ratio=block.mlp[0].out_features / width,
        num_classes=10,
        positional_embedding="learnable",
    )
    theirs = reference.classifier
    pairs = [
        (reference.tokenizer, ours.embedding),
        (theirs.positional_emb, ours.posenc.table_ND),
        (theirs.norm, ours.norm),
        (theirs.attention_pool, ours.attention_pool),
        (theirs.fc, ours.head),
    ]
    for layer, block in zip(theirs.blocks, ours.blocks, strict=True):
        pairs += [(layer.pre_norm, block.norm1), (layer.norm1, block.norm2)]
        pairs += [(layer.self_attn.qkv, block.mixer.to_qkv), (layer.self_attn.proj, block.mixer.to_out)]
        pairs += [(layer.linear1, block.mlp[0]), (layer.linear2, block.mlp[3])]
    copy_weights(pairs, reference, ours)
    assert_same(ours, reference)
    rates = [layer.drop_path.drop_prob for layer in theirs.blocks]
    assert [block.drop[1].probability for block in ours.blocks] == pytest.approx(rates)


class StdPlusEps(reference_cvt.LayerNorm):
    """The published models' norm: the package has since moved its 1e-5 under the root."""

    def forward(self, x):
        std = torch.var(x, dim=1, unbiased=False, keepdim=True).sqrt()
        return (x - x.mean(dim=1, keepdim=True)) / (std + self.eps) * self.g + self.b


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "stride", "kv_stride"),
    [
        pytest.param(("experiment=cvt",), 1, 1, id="paper"),
        pytest.param(("experiment=cvt_pyramid", SMALL, "embedding.patch_size=1", "model.depth=[1,2,2]"), 2, 2, id="pyramid"),
        pytest.param(("experiment=cvt", SMALL, "model.stride=2", "model.dim=[24,32,40]"), 2, 1, id="strides"),
    ],
)
def test_cvt_is_vit_pytorchs(model_of, monkeypatch, overrides, stride, kv_stride):
    monkeypatch.setattr(reference_cvt, "LayerNorm", StdPlusEps)
    ours = randomise(model_of(*overrides))
    stages = [[ours.embedding.layers[0], ours.norm]]
    for block in ours.blocks:
        if hasattr(block, "out_tokens"):
            stages.append([block.conv, block.norm])
        else:
            stages[-1].append(block)
    options = {}
    for i, (conv, _, *blocks) in enumerate(stages, start=1):
        options |= {
            f"s{i}_emb_dim": conv.out_channels,
            f"s{i}_emb_kernel": 3,
            f"s{i}_emb_stride": stride if i > 1 else 1,
            f"s{i}_kv_proj_stride": kv_stride,
            f"s{i}_heads": blocks[0].mixer.heads,
            f"s{i}_depth": len(blocks),
            f"s{i}_mlp_mult": blocks[0].mlp[0].out_features // conv.out_channels,
        }
    reference = reference_cvt.CvT(num_classes=10, channels=stages[0][0].in_channels, **options)
    pairs = [(reference.to_logits[-1], ours.head)]
    for theirs, (conv, norm, *blocks) in zip(reference.layers, stages, strict=True):
        pairs += [(theirs[0], conv), (theirs[1], norm)]
        for (attention, feed_forward), block in zip(theirs[2].layers, blocks, strict=True):
            pairs += [(attention.norm, block.norm1), (feed_forward.net[0], block.norm2)]
            pairs += [(attention.to_q, block.mixer.to_q), (attention.to_kv, block.mixer.to_kv)]
            pairs += [(attention.to_out[0], block.mixer.to_out)]
            pairs += [(feed_forward.net[1], block.mlp[0]), (feed_forward.net[4], block.mlp[3])]
    copy_weights(pairs, reference, ours)
    assert_same(ours, reference, modes=(False, True))


FOUR_TWO_ONE = ("model.mlp_ratio=[4,2,1]",)  # one hidden width in all stages, which is all that the package has


@pytest.mark.parametrize(
    ("overrides", "heads"),
    [
        pytest.param(("experiment=pit",), 4, id="paper"),
        pytest.param(("experiment=hybrid_pit", SMALL, "model.depth=[1,1]"), 4, id="hybrid"),
        pytest.param(
            ("experiment=pit", SMALL, "model.dim=[32,64,128]", "model.heads=[2,4,8]", "model.depth=[1,2,1]", *FOUR_TWO_ONE),
            (2, 4, 8),
            id="pyramid",
        ),
    ],
)
def test_pit_is_vit_pytorchs(model_of, overrides, heads):
    ours = randomise(model_of(*overrides))
    mixers = [block.mixer for block in ours.blocks if hasattr(block, "mixer")]
    first_mlp = ours.blocks[0].mlp[0]
    stages = [[]]
    for block in ours.blocks:
        stages.append([]) if hasattr(block, "out_tokens") else stages[-1].append(block)
    reference = reference_pit.PiT(
        image_size=4,
        patch_size=2,
        num_classes=10,
        dim=first_mlp.in_features,
        depth=tuple(map(len, stages)),
        heads=heads,
        mlp_dim=first_mlp.out_features,
        dim_head=first_mlp.in_features // mixers[0].heads,
    )
    # Its patches overlap; the published models embed each pixel by itself.
    reference.pos_embedding = nn.Parameter(torch.empty(1, *ours.posenc.table_ND.shape))
    reference.to_patch_embedding = nn.Sequential(ours.embedding, nn.Flatten(2), Transpose())
    pairs = [
        (reference.pos_embedding, ours.posenc.table_ND),
        (reference.cls_token, ours.class_token),
        (reference.mlp_head[0], ours.norm),
        (reference.mlp_head[1], ours.head),
    ]
    pools = [block for block in ours.blocks if hasattr(block, "out_tokens")]
    for theirs, pool in zip(reference.layers[1::2], pools, strict=True):
        pairs += [(theirs.downsample.net, pool.pool), (theirs.cls_ff, pool.proj)]
    for transformer, blocks in zip(reference.layers[::2], stages, strict=True):
        for (attention, feed_forward), block in zip(transformer.layers, blocks, strict=True):
            pairs += [(attention.norm, block.norm1), (feed_forward.net[0], block.norm2)]
            pairs += [(attention.to_qkv, block.mixer.to_qkv), (attention.to_out[0], block.mixer.to_out)]
            pairs += [(feed_forward.net[1], block.mlp[0]), (feed_forward.net[4], block.mlp[3])]
    copy_weights(pairs, reference, ours)
    assert_same(ours, reference)


class Transpose(nn.Module):
    def forward(self, x):
        return x.mT


# What is documented about each


@pytest.mark.parametrize("row", ["levip", "levil", "levin"])
def test_levix_has_no_normalisation_anywhere(model_of, row):
    model = model_of(f"experiment={row}")
    norms = (nn.LayerNorm, ChannelNorm, nn.modules.batchnorm._BatchNorm)
    assert not [name for name, module in model.named_modules() if isinstance(module, norms)]


def test_levits_last_norm_starts_at_zero_so_a_block_starts_as_its_mlp(model_of):
    model = model_of("experiment=levit", SMALL)
    block, x_BND = model.blocks[0], torch.randn(2, 64, 128)
    assert not block.mixer.norm_out.weight.any()
    torch.testing.assert_close(block(x_BND), x_BND + block.mlp(x_BND))
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    assert block.mixer.norm_out.weight.grad.any()  # and it does not stay there


def test_levits_step_to_the_next_stage_is_attention_asked_by_the_remaining_tokens(model_of):
    """To mix all and keep every second row and column computes what LeViT's shrinking attention does."""
    tokens = TokenGrid(6, 5)
    mixer = Softmax(16, tokens)
    shrink = Downsample(16, 24, tokens, 2, mixer, 2.0)
    assert shrink.out_tokens == TokenGrid(3, 3)
    x_BND = torch.randn(2, 30, 16)
    kept = [6 * 0 + 5 * y + x for y in (0, 2, 4) for x in (0, 2, 4)]
    q_BHNE, k_BHNE, v_BHNE = mixer.to_qkv(x_BND).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    weights = (q_BHNE[:, :, kept] @ k_BHNE.mT / 2).softmax(dim=-1)
    mixed = mixer.to_out((weights @ v_BHNE).transpose(1, 2).flatten(2))
    expected = shrink.proj(x_BND[:, kept] + mixed)
    torch.testing.assert_close(shrink(x_BND), expected + shrink.mlp(expected))


def test_levits_steps_between_stages_have_the_options_of_blocks(model_of):
    model = model_of("experiment=levit_pyramid", "model.layer_scale=0.1", "model.stochastic_depth=0.6")
    rates = [block.drop_path.probability for block in model.blocks]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0, 0.6)
    for block in model.blocks:
        for scale in (block.scale1, block.scale2):
            torch.testing.assert_close(scale.gain_D, torch.full_like(scale.gain_D, 0.1))


def test_ccts_second_norm_replaces_the_residual_stream():
    """With branches that add nothing a pre-norm block would be the identity; this one is its second norm."""
    block = CCTBlock(16, Nothing(), Nothing(), 0.0, 0.0)
    x_BND = 5 * torch.randn(2, 9, 16) + 3
    torch.testing.assert_close(block(x_BND), nn.functional.layer_norm(x_BND, (16,)))


class Nothing(nn.Module):
    def forward(self, x_BND):
        return torch.zeros_like(x_BND)


def test_ccts_stochastic_depth_drops_a_branch_for_whole_images(model_of):
    model = model_of("experiment=ccn")
    assert [block.drop[1].probability for block in model.blocks] == pytest.approx([0, 1 / 30, 2 / 30, 0.1])
    drop, x_BND = StochasticDepth(0.25), torch.ones(8000, 3, 2)
    dropped = drop(x_BND).flatten(1)
    assert (dropped == dropped[:, :1]).all()
    torch.testing.assert_close(dropped.unique(), torch.tensor([0, 4 / 3]))
    assert (dropped[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert drop.eval()(x_BND) is x_BND


def test_ccts_sequence_pooling(model_of):
    model = model_of("experiment=cct", SMALL).eval()
    seen = {}
    model.norm.register_forward_hook(lambda module, inputs, output: seen.update(x_BND=output))
    logits = model(torch.randn(2, 1, 8, 8))
    for x_ND, logits_K in zip(seen["x_BND"], logits, strict=True):
        score_N = x_ND @ model.attention_pool.weight[0] + model.attention_pool.bias
        share_N = score_N.exp() / score_N.exp().sum()
        pooled_D = sum(share * token for share, token in zip(share_N, x_ND, strict=True))
        torch.testing.assert_close(logits_K, model.head(pooled_D))


@pytest.mark.parametrize("patch_size", [3, 4, 8])
def test_ccts_last_pooling_reads_every_pixel_of_its_map(patch_size):
    """Of the map before it, each patch's pixels; the tokens of a mirrored image then are the mirrored tokens."""
    tokenizer = CCTTokenizer(24, 3, 5, patch_size=patch_size, hidden=(4,))
    maps = torch.eye(24).view(24, 1, 24, 1).expand(24, 5, 24, 24)  # map i is 1 in row i only
    pooled = tokenizer.layers[-1](maps)[:, 0, :, 0]
    assert torch.equal(pooled.argmax(dim=1), torch.arange(24) // patch_size)
    assert torch.equal(pooled.sum(dim=1), torch.ones(24))


def test_cct_starts_as_published(model_of):
    model = model_of("experiment=ccp")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx((2 / (9 * module.in_channels)) ** 0.5, rel=0.1)
    assert model.posenc.table_ND.std().item() == pytest.approx(0.2, rel=0.02)


def test_a_gate_starts_as_an_mlp_of_each_token(model_of):
    """Also in CCT, which initializes the linear layers of all mixers."""
    for family in ("model=vit", "model=cct"):
        mix = model_of(family, "attention=gating").blocks[0].mixer.mix
        assert mix.weight.abs().max().item() < 1e-5
        assert (mix.bias == 1).all()


def test_cvts_norm_divides_by_the_std_plus_epsilon():
    norm, x_BND = randomise(ChannelNorm(8)), 1e-5 * torch.randn(2, 5, 8)
    std = x_BND.std(dim=-1, unbiased=False, keepdim=True)
    expected = (x_BND - x_BND.mean(dim=-1, keepdim=True)) / (std + 1e-5) * norm.gain_D + norm.offset_D
    torch.testing.assert_close(norm(x_BND), expected)
    constant = torch.ones(1, 2, 8, requires_grad=True)  # where the root of the variance has no gradient
    norm(constant).sum().backward()
    assert constant.grad.isfinite().all()


def test_cvts_own_attention_has_heads_of_64_and_the_others_of_32(model_of):
    own, other = (model_of(f"experiment={row}", SMALL).blocks[0].mixer for row in ("cvt", "cvp"))
    assert own.to_q.project.out_features == 256
    assert own.to_kv.project.out_features == 512
    assert other.to_qkv.out_features == 3 * 128
    assert not [m for m in other.modules() if isinstance(m, nn.Conv2d)]


def test_cvts_convolution_leaves_the_class_token_alone():
    """The class token is in no place of the map: it reaches no other token's projections, and none reaches its own."""
    mixer = CvTAttention(16, TokenGrid(3, 4, prefix=1), dim_head=4).eval()
    x_BND = torch.randn(2, 13, 16)
    other = x_BND.clone()
    other[:, 0] += 1
    torch.testing.assert_close(mixer.to_q(x_BND)[:, 0], mixer.to_q.project(x_BND[:, 0]))
    torch.testing.assert_close(mixer.to_q(x_BND)[:, 1:], mixer.to_q(other)[:, 1:])
    map_BDYX = x_BND[:, 1:].mT.unflatten(2, (3, 4))
    expected = mixer.to_q.norm(mixer.to_q.conv(map_BDYX)).permute(0, 2, 3, 1)[:, 1, 2]
    torch.testing.assert_close(mixer.to_q(x_BND)[:, 1 + 4 + 2], mixer.to_q.project(expected))


@pytest.mark.parametrize("row", ["pit", "pip", "pin", "pil"])
def test_pix_has_1025_then_257_tokens_and_the_same_head_width(model_of, row):
    model = model_of(f"experiment={row}").eval()
    counts = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: counts.append((*inputs[0].shape[1:], *output.shape[1:])))
    model(torch.randn(1, 3, 32, 32))
    assert counts == [(1025, 128) * 2, (1025, 128) * 2, (1025, 128, 257, 256), (257, 256) * 2, (257, 256) * 2]
    assert [block.mixer.to_out.in_features for block in model.blocks if hasattr(block, "mixer")] == [128] * 4
    assert [block.mlp[0].out_features for block in model.blocks if hasattr(block, "mixer")] == [256] * 4


def test_pits_heads_grow_in_number_not_in_width(model_of):
    model = model_of("experiment=pit", SMALL, "model.heads=[4,8]")
    assert model.blocks[-1].mixer.to_out.in_features == 8 * 32
    model = model_of("experiment=pit", SMALL, "attention.dim_head=16")
    assert model.blocks[-1].mixer.to_out.in_features == 4 * 16


# Positions


def test_sincos_is_ccts():
    table = SinCos(12, TokenGrid(4, 5)).table_ND
    torch.testing.assert_close(table, reference_cct.sinusoidal_embedding(20, 12)[0], atol=1e-5, rtol=0)


def test_relative_bias_is_looked_up_by_distance_in_rows_and_columns():
    tokens = TokenGrid(3, 4, prefix=1)
    offers = Relative2d(16, tokens, std=1.0).attention_kwargs(tokens)
    bias = offers["position_bias"](2)
    bias_HNN = bias()
    places = [(y, x) for y in range(3) for x in range(4)]
    for i, (y1, x1) in enumerate(places, start=1):
        for j, (y2, x2) in enumerate(places, start=1):
            assert (bias_HNN[:, i, j] == bias.table_HYX[:, abs(y1 - y2), abs(x1 - x2)]).all()
    to_it, from_it, itself = bias.prefix_table_H3.T
    assert (bias_HNN[:, 1:, 0] == to_it[:, None]).all()
    assert (bias_HNN[:, 0, 1:] == from_it[:, None]).all()
    assert (bias_HNN[:, 0, 0] == itself).all()
    assert offers["position_bias"](2).table_HYX is not bias.table_HYX  # each layer has its own


@pytest.mark.parametrize("attention", ["softmax", "levit", "cvt"])
def test_the_relative_bias_moves_attention_the_same_in_both_implementations(model_of, attention):
    common = (f"attention={attention}", "posenc=relative2d", "model=pit", "embedding=linear", SMALL)
    fused, explicit = (
        randomise(model_of(*common, f"attention.implementation={kind}")).eval() for kind in ("fused", "explicit")
    )
    explicit.load_state_dict(fused.state_dict())
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(fused(images), explicit(images), atol=1e-5, rtol=1e-5)
    before = fused(images)
    with torch.no_grad():
        fused.blocks[0].mixer.attend.position_bias.table_HYX[:, 0, 0] += 30
    assert (fused(images) - before).abs().max() > 1e-4


def test_axial_rotation_tells_rows_and_columns_apart():
    """A query and a key meet at an angle that depends on Δrow (in the first half of the head) and Δcolumn alone."""
    tokens = TokenGrid(5, 6, prefix=1)
    rotate = Rotary2d(16, tokens).attention_kwargs(tokens)["rotary"](8)
    q_E, k_E = torch.randn(2, 8)
    everywhere = torch.ones(1, 1, 31, 1)
    logits_NN = (rotate(everywhere * q_E) @ rotate(everywhere * k_E).mT)[0, 0]

    def between(a: tuple[int, int], b: tuple[int, int]) -> float:
        return logits_NN[1 + 6 * a[0] + a[1], 1 + 6 * b[0] + b[1]].item()

    assert between((0, 1), (2, 4)) == pytest.approx(between((2, 2), (4, 5)), abs=1e-5)
    assert between((0, 0), (2, 1)) != pytest.approx(between((0, 0), (1, 2)), abs=1e-3)
    turned = rotate(everywhere * q_E)[0, 0, 1:].unflatten(0, (5, 6))
    torch.testing.assert_close(turned[:, :1, :4].expand(-1, 6, -1), turned[:, :, :4])  # rows alone
    torch.testing.assert_close(turned[:1, :, 4:].expand(5, -1, -1), turned[:, :, 4:])  # columns alone
    torch.testing.assert_close(rotate(everywhere * q_E)[0, 0, 0], q_E)  # the class token is not turned


# Stages and sizes


@pytest.mark.parametrize("experiment", ["cvt_pyramid", "levit_pyramid"])
def test_pyramids_have_256_then_64_then_16_tokens(model_of, experiment):
    model = model_of(f"experiment={experiment}")
    grids = [(b.tokens.count, b.out_tokens.count) for b in model.blocks if hasattr(b, "out_tokens")]
    assert grids == [(256, 64), (64, 16)]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


# The last of three stages has 2×2 tokens.
FOR_A_SMALL_MAP = {
    "nystrom": ["attention.landmarks=4"],
    "cvt": ["attention.dim_head=8"],
    "window": ["attention.window=2"],
    "neighbourhood": ["attention.kernel=1"],
    "spatial_reduction": ["attention.stride=2"],
}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("posenc", ["learned", "rotary2d", "relative2d"])
@pytest.mark.parametrize("model", ["levit", "cvt", "pit"])
def test_every_mixer_in_three_stages_of_other_grids(compose_config, model, posenc, attention):
    overrides = [f"model={model}", "embedding=linear", "model.stride=2", SMALL]
    overrides += ["model.dim=[16,32,64]", "model.depth=[1,1,1]", "model.mlp_ratio=1"]
    if model == "pit":
        overrides += ["model.pool=mean"]  # mixers of the map alone are refused with a class token
    cfg = compose_config(*overrides)
    cfg.attention = compose_config(f"attention={attention}", *FOR_A_SMALL_MAP.get(attention, [])).attention
    cfg.posenc = compose_config(f"posenc={posenc}").posenc
    with_queries = {"softmax", "performer", "linformer", "nystrom", "linear", "levit", "cvt", "agent"}
    without = {"rotary2d": {*ATTENTIONS} - with_queries, "relative2d": {*ATTENTIONS} - {"softmax", "levit", "cvt"}}
    if attention in without.get(posenc, ()) or (model == "levit" and attention in ("fourier", "random")):
        with pytest.raises(ConfigError, match=r"^posenc: " if posenc != "learned" else r"^model: LeViT's blocks have no norms"):
            build_model(cfg)
        return
    built = build_model(cfg)
    built(torch.randn(2, 1, 8, 8)).logsumexp(dim=1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in built.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("embedding", ["linear", "conv", "cct"])
def test_any_size_channels_and_classes(compose_config, monkeypatch, family, embedding):
    cfg = compose_config(f"model={family}", f"embedding={embedding}", "attention=linformer", SMALL)
    cfg.model.dim = 32
    if family == "pit":
        cfg.model.dim = [32, 64]
    for size, patch_size, channels, classes in [(8, 1, 1, 10), (12, 3, 4, 7), (20, 5, 3, 100), (9, 1, 2, 2), (224, 16, 3, 5)]:
        monkeypatch.setattr(Digits, "image_size", size)
        monkeypatch.setattr(Digits, "channels", channels)
        monkeypatch.setattr(Digits, "class_names", tuple(map(str, range(classes))))
        cfg.embedding.patch_size = patch_size
        model = build_model(cfg).eval()
        assert model.embedding.grid == (size // patch_size, size // patch_size)
        assert model(torch.randn(1, channels, size, size)).shape == (1, classes)


def test_every_embedding_sees_every_pixel_at_any_patch_size(model_of):
    for embedding, patch_size in [("linear", 4), ("conv", 4), ("cct", 4), ("cct", 2)]:
        model = model_of(
            "model=cct", f"embedding={embedding}", f"embedding.patch_size={patch_size}", "attention=fourier", SMALL
        )
        image = torch.rand(1, 1, 8, 8).requires_grad_()
        assert model.embedding(image).shape == (1, 128, 8 // patch_size, 8 // patch_size)
        model.embedding(image).square().sum().backward()
        assert image.grad.count_nonzero() == 64


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=pit", "embedding=linear", "embedding.patch_size=3"], r"embedding\.patch_size=3 .* nearest that do: 2, 4"),
        (["model=cct", "embedding=cct", "embedding.patch_size=5"], r"embedding\.patch_size=5 .* nearest that do: 2, 4"),
        (["model=pit", "model.stride=9", "attention=softmax"], r"model\.stride=9 exceeds the 8×8 tokens; at most 8"),
        (["model=cvt", "model.stride=[8,2]", "attention=softmax"], r"model\.stride=2 exceeds the 1×1 tokens; at most 1"),
        (["model=pit"], r"attention\.landmarks=64 is more than the 17 tokens; at most 17"),
        (["model=pit", "model.dim=[32,48]"], r"model\.dim=\[32,48\]: 48 is not a multiple of .* 32; nearest: 64"),
        (["model=levit", "model.dim=[32,48]"], r"model\.dim=\[32,48\] has 2 values, but 1 are needed"),
        (["model=cvt", "model.heads=[1,2]"], r"model\.heads=\[1,2\] has 2 values, but 3 are needed"),
        (["model=cvt", "model.depth=[]"], r"model\.depth=\[\]: .*at least 1 item"),
        (["model=cvt", "model.dim=0"], r"model\.dim=0: .*greater than 0"),
        (["model=cvt", "model.heads=2", "attention=fourier"], r"model\.heads=2: Fourier has no heads; use model\.heads=null"),
        (["model=pit", "model.heads=[3,6]"], r"model\.heads=3 does not divide the width 128; nearest that do: 2, 4"),
        (["model=levit", "model.heads=5"], r"model\.heads=5 does not divide the width 128; nearest that do: 2, 4"),
        (["model=cct", "attention=levit", "attention.heads=5"], r"attention\.heads=5 does not divide the width 128"),
        (["model=vit", "attention=cvt", "attention.conv_kernel=4"], r"attention\.conv_kernel=4 is even; nearest odd: 3, 5"),
        (["attention=cvt", "attention.kv_stride=9"], r"attention\.kv_stride=9 is more than the 8×8 tokens; at most 8"),
        (["attention=cvt", "attention.kv_stride=2", "posenc=rotary"], r"attention\.kv_stride=2 subsamples the keys.* use 1"),
        (["attention=cvt", "attention.dim_head=6", "posenc=rotary2d"], r"attention\.dim_head=6 .* nearest: 4, 8"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_that_does(model_of, overrides, message):
    with pytest.raises(ConfigError, match=rf"^{message}") as refusal:
        model_of(SMALL, *overrides)
    assert "\n" not in str(refusal.value)


def test_a_grid_splits_into_class_token_and_map_and_joins_again():
    tokens, x_BND = TokenGrid(3, 4, prefix=1), torch.randn(2, 13, 5)
    prefix_BPD, map_BDYX = tokens.split(x_BND)
    assert (map_BDYX[0, :, 2, 1] == x_BND[0, 1 + 4 * 2 + 1]).all()
    assert (join(prefix_BPD, map_BDYX) == x_BND).all()
    assert tokens.strided(2) == TokenGrid(2, 2, prefix=1)
    assert PositionEncoding(5, tokens).attention_kwargs(tokens) == {}
