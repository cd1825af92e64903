"""The parts of training recipes, each alone and all together: what they compute, that they train, and that a run continues."""

import json
import math
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from common import assert_same, digit_folder, fit, outcome, run_directory
from conftest import TINY
from forked import Forked, signal_at_file
from hydra.errors import MissingConfigException
from omegaconf import DictConfig
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

import vix
from vix.build import parse
from vix.composition.compose import format_error
from vix.data import trivial_augment
from vix.data.augment import Augmentation, Mix, RandomErasing
from vix.data.digits import Digits
from vix.data.image_folder import ImageFolder
from vix.data.loader import Split, normalize
from vix.data.trivial_augment import TrivialAugment
from vix.errors import ConfigError
from vix.runs.checkpoint import read_checkpoint
from vix.runs.identity import run_name
from vix.runs.results import RunRecord
from vix.runs.run import RunDirectory
from vix.training.evaluate import accuracy
from vix.training.state import TrainState
from vix.training.train_step import TrainStep

Compose = Callable[..., DictConfig]
CPU = torch.device("cpu")
ALL_PARTS = (
    *(
        "augment.flip=true",
        "augment.crop_padding=1",
        "augment.trivial_augment=0.5",
        "augment.random_erasing=0.3",
        "augment.mixup=0.4",
        "augment.cutmix=1.0",
    ),
    *("data.validation_size=100", "trainer.ema_decay=0.8", "trainer.label_smoothing=0.1", "trainer.clip_norm=1.0"),
    *("trainer.schedule=cosine", "trainer.warmup_epochs=1.0", "optimizer.no_decay_on_norm_and_bias=true"),
)
OTHER = np.random.default_rng(0)


# Choosing it


def test_the_papers_recipe_is_the_default(compose_config: Compose) -> None:
    """It changes no key, and naming it changes neither a run's directory nor its group in the report."""
    assert compose_config("recipe=paper") == compose_config()
    choices = {"experiment": "vin", "recipe": "paper"}
    assert run_name(choices, ["experiment=vin", "recipe=paper"], 0) == "vin/seed=0"
    assert run_name(choices, ["experiment=vin", "recipe=modern"], 0) == "vin,recipe=modern/seed=0"
    results = {"experiment": "vin", "overrides": ["recipe=paper", "trainer.epochs=3"], "config": {"data": {"mixup": None}}}
    older = {"experiment": "vin", "overrides": ["trainer.epochs=3"], "config": {"data": {}}}  # from before there was mixup
    assert RunRecord(Path(), "", "", results).group_key() == RunRecord(Path(), "", "", older).group_key()


@pytest.mark.parametrize("experiment", ["hybrid_vin", "levin", "cvn", "quickstart"])
def test_it_goes_on_top_of_any_model(compose_config: Compose, experiment: str) -> None:
    """Model and counts of parameters stay, the training is another, and an experiment's own training settings go first."""
    paper, modern = (compose_config(f"experiment={experiment}", f"recipe={recipe}") for recipe in ("paper", "modern"))
    for group in ("model", "attention", "embedding", "posenc"):
        assert modern[group] == paper[group]
    assert (modern.trainer.schedule, modern.optimizer.no_decay_on_norm_and_bias) == ("cosine", True)
    assert modern.optimizer._target_.endswith("MuonAdamW")
    assert parse(modern).augmentation.crop_padding == 4
    assert modern.trainer.epochs == (10 if experiment == "quickstart" else modern.trainer.epochs)


def test_the_error_for_an_unknown_recipe_names_the_known_ones(compose_config: Compose) -> None:
    with pytest.raises(MissingConfigException) as error:
        compose_config("recipe=modrn")
    assert format_error(error.value, ["recipe=modrn"]) == ("recipe=modrn: conf/recipe/ has no such file; nearest: modern")


# Augmentation


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """Eleven pieces of a real photograph, (11, 3, 32, 32) as uint8."""
    pixels = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
    return torch.stack([pixels[:, 20 * i + 40 : 20 * i + 72, 30 * i + 100 : 30 * i + 132] for i in range(11)])


def pillow_affine(image: Image.Image, xx: float, xy: float, yx: float, yy: float) -> Image.Image:
    """About the middle of a picture of 32 pixels; Pillow, too, looks up where a pixel comes from."""
    data = (xx, xy, 16 - 16 * (xx + xy), yx, yy, 16 - 16 * (yx + yy))
    return image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, a: image,
    "shear_x": lambda image, a: pillow_affine(image, 1, 0.99 * a, 0, 1),
    "shear_y": lambda image, a: pillow_affine(image, 1, 0, 0.99 * a, 1),
    "rotate": lambda image, a: pillow_affine(
        image, *(f(math.radians(135 * a)) for f in (math.cos, lambda t: -math.sin(t), math.sin, math.cos))
    ),
    "brightness": lambda image, a: ImageEnhance.Brightness(image).enhance(1 + 0.99 * a),
    "color": lambda image, a: ImageEnhance.Color(image).enhance(1 + 0.99 * a),
    "contrast": lambda image, a: ImageEnhance.Contrast(image).enhance(1 + 0.99 * a),
    "sharpness": lambda image, a: ImageEnhance.Sharpness(image).enhance(1 + 0.99 * a),
    "posterize": lambda image, a: ImageOps.posterize(image, 8 - round(6 * abs(a))),
    "solarize": lambda image, a: ImageOps.solarize(image, 255 * (1 - abs(a))),
    "autocontrast": lambda image, a: ImageOps.autocontrast(image),
    "equalize": lambda image, a: ImageOps.equalize(image),
}


@pytest.mark.parametrize("name", PILLOW)
def test_operations_are_pillows(photographs: torch.Tensor, name: str) -> None:
    """With another strength for each image of a batch; within rounding, where the source lies within the picture."""
    amounts = torch.linspace(-0.97, 0.97, len(photographs))
    ours = trivial_augment.OPERATIONS[name](photographs, amounts)
    assert ours.dtype is torch.uint8
    inner = Image.fromarray(np.pad(np.full((30, 30), 255, np.uint8), 1))
    for image, amount, before in zip(ours, amounts.tolist(), photographs, strict=True):
        expected = np.asarray(PILLOW[name](Image.fromarray(before.permute(1, 2, 0).numpy()), amount)).astype(int)
        error = np.abs(image.permute(1, 2, 0).numpy() - expected)
        if name in ("shear_x", "shear_y", "rotate"):
            inside = np.asarray(PILLOW[name](inner, amount)) == 255
            assert inside.sum() > 400
            error = error[inside]
        assert error.max() <= 3
        assert error.mean() < 1


def test_translations_bring_in_grey(photographs: torch.Tensor) -> None:
    amounts = torch.full((11,), 0.25)
    for name, axis in (("translate_x", 3), ("translate_y", 2)):
        moved = trivial_augment.OPERATIONS[name](photographs, amounts)
        assert torch.equal(moved.narrow(axis, 0, 24), photographs.narrow(axis, 8, 24))
        assert (moved.narrow(axis, 24, 8) == 128).all()
    assert set(trivial_augment.OPERATIONS) == {*PILLOW, "translate_x", "translate_y"}


def test_each_image_undergoes_one_operation() -> None:
    """All 14 are as frequent, strengths stay below the most, and results come back in the images' order."""
    draws = TrivialAugment(0.3, 14_000, 64, torch.Generator().manual_seed(0), CPU)
    counts = torch.tensor(draws.sizes).sum(dim=0)
    assert counts.shape == (14,)
    assert (counts - 1000).abs().max() < 130  # four standard deviations
    assert 0.295 < draws.amount.abs().max() <= 0.3
    images = torch.from_numpy(OTHER.integers(0, 256, (64, 3, 8, 8), dtype=np.uint8))
    changed = draws(images, 3)
    operations = [name for name, size in zip(trivial_augment.OPERATIONS, draws.sizes[3], strict=True) for _ in range(size)]
    for name, amount, i in zip(operations, draws.amount[192:256], draws.order[192:256], strict=True):
        assert torch.equal(changed[i], trivial_augment.OPERATIONS[name](images[i : i + 1], amount[None])[0])


def test_erasing() -> None:
    """A grey rectangle of 2 to 33 % of the area, in as many images as asked for; all else stays."""
    erase = RandomErasing(0.4, 2000, 32, 32, torch.Generator().manual_seed(0), CPU)
    images = torch.rand(500, 3, 32, 32) + 0.1
    erased = torch.cat([erase(images, slice(start, start + 500)) for start in range(0, 2000, 500)])
    gone = (erased == 0).all(dim=1)
    assert torch.equal(erased, images.repeat(4, 1, 1, 1).masked_fill(gone[:, None], 0))
    area = gone.float().mean(dim=(1, 2))
    assert 0.36 < (area > 0).float().mean() < 0.44
    assert area[area > 0].min() > 0.015
    assert area.max() < 0.36
    for image in gone[area > 0]:
        rows, columns = image.any(dim=1), image.any(dim=0)
        assert torch.equal(image, rows[:, None] & columns)
        assert rows.diff().sum() <= 2
        assert columns.diff().sum() <= 2
    centre = gone.float().mean(dim=0)
    assert centre[16, 16] > 2 * centre[0, 0] > 0


def test_mixing() -> None:
    """Shares of pixels are those of labels, each kind is as frequent, and the run's own random numbers stay."""
    images, labels = torch.rand(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 4])
    before = torch.get_rng_state()
    mix, again = (Mix(0.5, 1.0, 5, 200, 16, 16, torch.Generator().manual_seed(0)) for _ in range(2))
    shares, cuts = [], [isinstance(transform, v2.CutMix) for transform, _ in mix.draws]
    for number, cut in enumerate(cuts):
        mixed, targets = mix(images, labels, number)
        share = targets[0, 0].item()
        shares.append(share)
        others = images.roll(1, 0)
        if cut:
            own = (mixed == images).all(dim=1)
            assert torch.equal(mixed, torch.where(own[:, None], images, others))
            assert own[0].float().mean() == pytest.approx(share, abs=1e-6)
        else:
            torch.testing.assert_close(mixed, share * images + (1 - share) * others, atol=1e-5, rtol=0)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
        if number % 50 == 0:
            assert torch.equal(again(images, labels, number)[0], mixed)
    assert torch.equal(torch.get_rng_state(), before)
    assert 70 < sum(cuts) < 130
    assert len(set(shares)) > 100
    drawn = [share for share, cut in zip(shares, cuts, strict=True) if not cut]
    assert 0.4 < np.mean(drawn) < 0.6
    assert 0.6 / 8 < np.var(drawn) < 1.4 / 8  # of Beta(1/2, 1/2)


@pytest.mark.parametrize("size", [50, 48])
def test_an_epoch_with_all_parts_continues_in_its_middle(size: int) -> None:
    """The order is that of an epoch without them; batches are a function of seed and epoch."""
    images = torch.from_numpy(OTHER.integers(0, 256, (size, 3, 8, 8), dtype=np.uint8))
    plain = Split(images, torch.arange(size))
    split = Split(images, torch.arange(size), classes=size)
    parts = Augmentation(flip=True, crop_padding=2, trivial_augment=1.0, random_erasing=0.5, mixup=0.2, cutmix=1.0)
    whole = list(split.train_batches(8, seed=3, epoch=5, augmentation=parts))
    for first in range(math.ceil(size / 8) + 1):
        rest = list(split.train_batches(8, seed=3, epoch=5, first_batch=first, augmentation=parts))
        assert len(rest) == len(whole) - first
        for ours, theirs in zip(rest, whole[first:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for (mixed, targets), (_, labels) in zip(whole, plain.train_batches(8, seed=3, epoch=5), strict=True):
        assert mixed.shape[1:] == (3, 8, 8)
        assert mixed.abs().max() <= 1
        assert (targets.gather(1, labels[:, None]) > 0).float().mean() > 0.9
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(labels)))
    assert not torch.equal(whole[0][0], next(split.train_batches(8, seed=3, epoch=6, augmentation=parts))[0])
    ours, labels = next(split.train_batches(8, 0, 0))
    assert torch.equal(ours, normalize(images[labels]))


# The average of the weights, and what decays


def test_the_average_is_the_one_written_out() -> None:
    """Weights: d·average + (1 − d)·weights, with a smaller d in the first steps; running statistics: the model's.

    Bit-identical to PyTorch's AveragedModel, also across a checkpoint.
    """

    def make() -> TrainStep:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return TrainStep(TrainState(model, optimizer, LambdaLR(optimizer, lambda step: 1.0), ema_decay=0.3))

    torch.manual_seed(1)
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(6)]
    ours, by_hand = make(), None
    theirs = AveragedModel(ours.state.model)
    for number, (images, labels) in enumerate(batches):
        if number == 4:  # as if stopped here
            state = ours.state.state_dict()
            ours = make()
            ours.state.load_state_dict(state, 1)
        ours.forward_backward(number, images, labels)
        ours.optimizer_step()
        weights = [p.detach().clone() for p in ours.state.model.parameters()]
        d = min(0.3, (1 + number) / (10 + number))
        theirs.multi_avg_fn = get_ema_multi_avg_fn(d)
        theirs.update_parameters(ours.state.model)
        by_hand = [d * a + (1 - d) * w for a, w in zip(by_hand, weights, strict=True)] if by_hand else weights
    assert by_hand
    for average, expected in zip(ours.state.eval_model.parameters(), by_hand, strict=True):
        torch.testing.assert_close(average, expected, atol=1e-6, rtol=1e-5)
    for average, other in zip(ours.state.eval_model.parameters(), theirs.module.parameters(), strict=True):
        assert torch.equal(average, other)
    for kept, own in zip(ours.state.eval_model.buffers(), ours.state.model.buffers(), strict=True):
        assert torch.equal(kept, own)
    assert not torch.equal(ours.state.eval_model[0].weight, ours.state.model[0].weight)  # type: ignore[index]


def test_the_average_is_tested_and_kept(compose_config: Compose, tmp_path: Path) -> None:
    cfg = compose_config(*TINY, "trainer.epochs=4", "optimizer.lr=0.01", "trainer.ema_decay=0.9")
    results, model = fit(cfg, tmp_path)
    _, test = parse(cfg).data.load(CPU)
    for weights, key in (("last", "top1"), ("best", "best_top1")):
        loaded = vix.load_model(tmp_path, weights=weights)  # type: ignore[arg-type]
        scores = accuracy(loaded, test.eval_batches(256), torch.autocast("cpu", enabled=False), 10)
        assert scores["top1"] == pytest.approx(results[key])
    saved = read_checkpoint(tmp_path / "checkpoint.pt")
    assert all(torch.equal(saved["trained_model"][name], t) for name, t in model.state_dict().items())
    assert not torch.equal(saved["model"]["head.weight"], saved["trained_model"]["head.weight"])


@pytest.mark.parametrize("model", ["vit", "levit", "cct", "cvt", "pit"])
def test_matrices_alone_decay(compose_config: Compose, model: str) -> None:
    """A step without gradients shrinks linear maps and convolutions; norms, biases, class tokens and positions stay."""
    posenc = "relative2d" if model == "levit" else "learned"
    attention = "levit" if model == "levit" else "softmax" if model == "vit" else "linformer"
    small = (f"model={model}", f"attention={attention}", f"posenc={posenc}", "embedding=conv", "embedding.patch_size=4")
    cfg = compose_config(
        *small, "optimizer=sgd", "optimizer.lr=1.0", "optimizer.weight_decay=0.5", "optimizer.no_decay_on_norm_and_bias=true"
    )
    built = vix.build_model(cfg)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    cfg.optimizer.nesterov, cfg.optimizer.momentum = False, 0.0
    parse(cfg).build_optimizer(built).step()
    after = {name: p.unique().tolist() for name, p in built.named_parameters()}
    assert all(values in ([0.5], [1.0]) for values in after.values())
    stay = {name.split(".")[-1] for name, values in after.items() if values == [1.0]}
    shrink = {name.split(".")[-1] for name, values in after.items() if values == [0.5]}
    assert shrink <= {"weight", "length_k", "length_v"}
    assert {"weight"} <= shrink
    assert "bias" in stay
    assert ("table_HYX" if posenc == "relative2d" else "table_ND") in stay or model == "cvt"
    assert ("class_token" in stay) == (model in ("vit", "pit"))
    for name, parameter in built.named_parameters():
        if name.endswith(("weight", "bias")):
            assert (after[name] == [0.5]) == (parameter.ndim > 1), name


def test_decay_options_are_checked(compose_config: Compose) -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\.no_decay_on_norm_and_bias=vectors: "):
        parse(compose_config("optimizer.no_decay_on_norm_and_bias=vectors"))
    cfg = compose_config(
        "~optimizer.weight_decay",
        "~optimizer.betas",
        "~optimizer.eps",
        "~optimizer.fused",
        "optimizer._target_=torch.optim.Rprop",
    )
    parse(cfg).build_optimizer(nn.Linear(2, 2))
    cfg.optimizer.no_decay_on_norm_and_bias = True
    with pytest.raises(ConfigError, match=r"^optimizer\.no_decay_on_norm_and_bias=true: Rprop has no weight decay; use false$"):
        parse(cfg).build_optimizer(nn.Linear(2, 2))


# Validation images


def test_validation_images_are_kept_from_training() -> None:
    """Balanced, the same for every training size, and together with the others all training images."""
    everything, test = Digits().load(CPU)
    train, validation = Digits(validation_size=200).load(CPU)
    fewer, same = Digits(validation_size=200, train_size=500).load(CPU)

    def pictures(*splits: Split) -> list[list[int]]:
        return sorted(image for split in splits for image in split.images.flatten(1).tolist())

    assert torch.bincount(validation.labels).tolist() == [20] * 10
    assert torch.equal(validation.images, same.images)
    assert pictures(train, validation) == pictures(everything)
    assert len(fewer) == 500
    rest = set(map(tuple, pictures(train)))
    assert all(tuple(image) in rest for image in pictures(fewer))
    assert len(Digits(validation_size=200, test_size=50).load(CPU)[1]) == 50
    assert Digits(validation_size=200).eval_split == "validation"
    assert Digits().eval_split == "test"
    assert not torch.equal(validation.images[:50], test.images[:50])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_size": 5}, r"^data\.validation_size=5: must be from 10 .* to 1427$"),
        ({"validation_size": 1430}, r"^data\.validation_size=1430: must be from 10 .* to 1427$"),
        ({"validation_size": 100, "train_size": 1400}, r"^data\.train_size=1400: must be from 10 .* to 1337$"),
        ({"validation_size": 100, "test_size": 101}, r"^data\.test_size=101: must be from 10 .* to 100$"),
    ],
)
def test_sizes_that_cannot_be(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Digits(**options)  # type: ignore[arg-type]


def test_validation_images_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only files that train or are tested are read, and none of the test folder."""
    root = digit_folder(tmp_path, classes=3, side=8)
    opened = []
    read_image = vix.data.image_folder.read_image
    monkeypatch.setattr("vix.data.image_folder.read_image", lambda path, *a: (opened.append(path), read_image(path, *a))[1])
    train, validation = ImageFolder(root=str(root), image_size=8, validation_size=6, train_size=12).load(CPU)
    assert (len(train), len(validation)) == (12, 6)
    assert len(set(opened)) == len(opened) == 18
    assert all("/train/" in path for path in opened)


# Training with it


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        *("augment.trivial_augment=0.3", "augment.random_erasing=0.3", "augment.cutmix=1.0", "trainer.ema_decay=0.9"),
        *("optimizer.no_decay_on_norm_and_bias=true", "data.validation_size=100", "augment.mixup=0.2 trainer.precision=bf16"),
        " ".join((*ALL_PARTS, "augment.flip=false", "augment.trivial_augment=0.2", "augment.mixup=0.2", "augment.cutmix=0.2")),
    ],
)
def test_each_part_trains(compose_config: Compose, tmp_path: Path, part: str) -> None:
    """The loss falls and what is kept has learned, and results say on which images."""
    more = ("data.train_size=500", "data.test_size=100", "trainer.batch_size=50", "trainer.epochs=6", "optimizer.lr=0.01")
    results, _ = fit(compose_config(*TINY, *more, *part.split(" ")), tmp_path)
    losses = [row["train_loss"] for row in results["history"]]
    assert losses[-1] < 0.95 * losses[0]
    assert results["top1"] > (18 if "cutmix=0.2" in part else 35)  # by chance: 10; all at once learn slowly
    assert results["tested_on"] == ("validation" if "validation" in part else "test")
    saved = read_checkpoint(tmp_path / "checkpoint.pt")
    assert ("trained_model" in saved) == ("ema_decay" in part)


def test_micro_batches_of_mixed_images(compose_config: Compose, tmp_path: Path) -> None:
    common = (*TINY, *ALL_PARTS, "data.test_size=50", "trainer.clip_norm=null")
    whole, _ = fit(compose_config(*common), tmp_path / "whole")
    parts, _ = fit(compose_config(*common, "trainer.micro_batch=7"), tmp_path / "parts")
    for ours, theirs in zip(parts["history"], whole["history"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_run_with_all_parts_continues_to_the_bit(tmp_path: Path, forked: Forked) -> None:
    """Killed in the middle of an epoch, and stopped in the next: results, average and weights are the undisturbed run's."""
    arguments = (*TINY, *ALL_PARTS, "trainer.epochs=3", "model.dropout=0.1", "trainer.checkpoint_every=2")
    status, output = forked.run(tmp_path / "whole", *arguments)
    assert status == 0, output
    expected = outcome(tmp_path / "whole")
    directory = tmp_path / "parts"
    # Checkpoints are of the start, and of two steps and the end of each epoch.
    for how, times, status in ((signal.SIGKILL, 3, -signal.SIGKILL), (signal.SIGTERM, 3, 128 + signal.SIGTERM)):
        stop = partial(signal_at_file, how, "checkpoint.pt", times)
        assert forked.wait(forked.start(directory, *arguments, before=stop)) == status
        position = read_checkpoint(run_directory(directory) / "checkpoint.pt")["progress"]
        assert position["batch"] > 0
    status, output = forked.run(directory, *arguments)
    assert status == 0, output
    assert "Continuing after" in output
    assert_same(directory, expected)
    checkpoint = read_checkpoint(run_directory(directory) / "checkpoint.pt")
    assert checkpoint["ema_updates"] == expected[1]["ema_updates"] == 15
    for name, tensor in expected[1]["trained_model"].items():
        assert torch.equal(checkpoint["trained_model"][name], tensor), name


def test_the_command(tmp_path: Path, forked: Forked) -> None:
    """``python train.py recipe=modern``, as a user types it."""
    status, output = forked.run(tmp_path, *TINY, "recipe=modern", "trainer.warmup_epochs=0.5")
    assert status == 0, output
    (path,) = tmp_path.glob("outputs/quickstart,*recipe=modern*/seed=0/results.json")
    results = json.loads(path.read_text())
    assert (results["recipe"], results["status"], results["tested_on"]) == ("modern", "finished", "test")
    assert results["config"]["augment"]["crop_padding"] == 4


def test_runs_from_before_these_options_are_continued(compose_config: Compose, tmp_path: Path) -> None:
    """Their configs do not hold the keys, all of which are null by default."""
    cfg = compose_config(*TINY)
    fit(cfg, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    today = json.loads(json.dumps(results["config"]))
    for key in ("data.validation_size", "trainer.ema_decay"):
        group, _, name = key.partition(".")
        assert results["config"][group].pop(name) is None
    (tmp_path / "results.json").write_text(json.dumps({**results, "status": "finished"}))
    assert RunDirectory(tmp_path, {}, today).finished_results("auto")
    today["data"]["validation_size"] = 20
    with pytest.raises(ConfigError, match=r"data\.validation_size was None and is 20"):
        RunDirectory(tmp_path, {}, today).finished_results("auto")
