"""What an experiment or a recipe sets for a group belongs to the option that it chose there."""

import json
from pathlib import Path

import pytest
from common import ON_DIGITS, table_after, write_configs
from conftest import TINY
from forked import Forked
from torch import nn

import vix
from vix.build import parse
from vix.cli.plan import plan
from vix.composition.command import Flags
from vix.composition.compose import compose, compose_with_hydra, left_out_messages
from vix.errors import ConfigError

# The experiment's settings are Nyström's landmarks and a model's width.
TRAINING = ("data.train_size=100", "data.test_size=50", "trainer.batch_size=20", "trainer.epochs=1", "trainer.precision=fp32")
SMALLER = ("experiment=quickstart", "model.dim=16", "model.depth=1", *TRAINING)


def composed(*overrides: str, directory: Path | None = None) -> tuple[dict[str, dict[str, object]], list[str]]:
    cfg = compose_with_hydra(overrides, Flags(str(directory) if directory else None))
    notes = left_out_messages(cfg.hydra)
    return {key: dict(value) for key, value in cfg.items() if key not in ("hydra", "seed", "rerun", "fail_fast")}, notes


@pytest.mark.slow
def test_other_mixers_over_an_experiment(tmp_path: Path, forked: Forked) -> None:
    """A sweep over mixers runs them all: the log, the kept config, the checkpoint's and .hydra/ hold what was trained."""
    status, output = forked.run(
        tmp_path, "-m", *SMALLER, "attention=nystrom,performer,softmax,linformer,linear", "attention.heads=2"
    )
    assert status == 0, output
    assert [row[1] for row in table_after(output, "jobs of this sweep") if len(row) > 2 and row[1]] == ["finished"] * 5
    for option in ("performer", "softmax", "linformer", "linear"):
        note = f"attention={option}: ignoring the options of experiment/quickstart for attention=nystrom: landmarks=16"
        assert output.count(note) == 1
        (run,) = tmp_path.glob(f"outputs/quickstart,*attention={option},*/seed=0")
        own = composed("experiment=quickstart", f"attention={option}", "attention.heads=2")[0]["attention"]
        assert json.loads((run / "results.json").read_text())["config"]["attention"] == own
        assert "landmarks" not in own
        assert note in (run / "train.log").read_text()
        assert "landmarks" not in (run / ".hydra" / "config.yaml").read_text()
        vix.load_model(run)
    (run,) = tmp_path.glob("outputs/quickstart,*attention=nystrom,*/seed=0")
    assert json.loads((run / "results.json").read_text())["config"]["attention"]["landmarks"] == 16


def test_what_the_user_sets_is_refused(tmp_path: Path, forked: Forked) -> None:
    """However it is written, and also where the experiment has the same option."""
    for number, typed in enumerate(("attention.landmarks=16", "+attention.landmarks=16", "++attention.landmarks=16")):
        status, output = forked.run(tmp_path / str(number), *SMALLER, "attention=performer", typed)
        assert status == 1
        assert "error: attention.landmarks: " in output
        assert not list((tmp_path / str(number)).glob("outputs/*/*"))


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        (("model=pit",), {"model.dim": [128, 256]}),
        (("model=vit",), {"model.dim": 64}),
        (("embedding=conv",), {"embedding.patch_size": 1, "attention.landmarks": 16}),
        (("attention=performer", "posenc=none"), {"model.dim": 64}),
        (("data=cifar100",), {"model.dim": 64, "trainer.epochs": 10}),
        (("recipe=modern", "optimizer=sgd"), {"optimizer.lr": 0.1, "augment.flip": True, "trainer.clip_norm": 1.0}),
        (("recipe=modern",), {"optimizer.lr": 3.0e-3, "optimizer.no_decay_on_norm_and_bias": True, "augment.crop_padding": 4}),
        (("recipe=modern", "data=cifar10"), {"augment.flip": True}),
        (("recipe=modern", "augment=none"), {"augment.flip": False, "augment.crop_padding": 0}),
        (("experiment=cvn", "embedding=linear"), {"model.depth": [1, 1, 2]}),
        (("attention=nystrom", "attention.landmarks=4"), {"attention.landmarks": 4}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_each_group(overrides: tuple[str, ...], values: dict[str, object]) -> None:
    """The chosen file's own values come back; options for groups that were not swapped stay."""
    cfg, _ = composed("experiment=quickstart", *overrides)
    assert {key: cfg[key.split(".")[0]][key.split(".")[1]] for key in values} == values


def test_optimizers(tmp_path: Path) -> None:
    """An experiment's AdamW options do not follow to SGD, nor a file's options to a class that lacks them."""
    chosen = ON_DIGITS + "  - override /optimizer: adamw\noptimizer: {betas: [0.8, 0.9], lr: 0.5}"
    write_configs(
        tmp_path,
        {"experiment/chosen": chosen, "experiment/only_set": ON_DIGITS + "optimizer: {betas: [0.8, 0.9], lr: 0.5}"},
    )
    write_configs(tmp_path, {"experiment/typo": ON_DIGITS + "  - override /attention: nystrom\nattention: {landmark: 4}"})
    sgd, notes = composed("experiment=chosen", "optimizer=sgd", directory=tmp_path)
    assert (sgd["optimizer"]["lr"], "betas" in sgd["optimizer"]) == (0.1, False)
    assert notes == ["optimizer=sgd: ignoring the options of experiment/chosen for optimizer=adamw: betas=[0.8, 0.9], lr=0.5"]
    sgd, notes = composed("experiment=only_set", "optimizer=sgd", directory=tmp_path)  # lr is an option of both
    assert (sgd["optimizer"]["lr"], "betas" in sgd["optimizer"]) == (0.5, False)
    assert notes == ["optimizer: ignoring options of experiment/only_set that SGD does not accept: betas=[0.8, 0.9]"]
    nadam = ("optimizer._target_=torch.optim.NAdam",)
    cfg, notes = composed("experiment=chosen", *nadam, directory=tmp_path)
    assert (cfg["optimizer"]["betas"], "fused" in cfg["optimizer"]) == ([0.8, 0.9], False)
    assert notes == ["optimizer: ignoring options of optimizer/adamw that NAdam does not accept: fused=True"]
    model = vix.build_model(compose([*nadam, "experiment=quickstart"]))
    assert type(parse(compose([*nadam, "experiment=quickstart"])).build_optimizer(model)).__name__ == "NAdam"
    with pytest.raises(ConfigError, match=r"optimizer\.fused: NAdam has no such option"):
        parse(compose([*nadam, "optimizer.fused=true"])).build_optimizer(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"attention\.landmark: Nystrom has no such option"):
        vix.build_model(compose(["experiment=typo"], Flags(str(tmp_path))))


def test_a_file_that_names_a_class(tmp_path: Path) -> None:
    """A class in an experiment is an option, too: the group's own options that it lacks go, and its own typos do not."""
    files = {
        "nadam": ON_DIGITS + "optimizer: {_target_: torch.optim.NAdam, momentum_decay: 0.01}",
        "typo": ON_DIGITS + "optimizer: {_target_: torch.optim.NAdam, momentum: 0.01}",
    }
    write_configs(tmp_path / "experiment", files)
    cfg, _ = composed("experiment=nadam", directory=tmp_path)
    assert cfg["optimizer"]["momentum_decay"] == 0.01
    assert "fused" not in cfg["optimizer"]
    cfg, notes = composed("experiment=nadam", "optimizer=sgd", directory=tmp_path)
    assert cfg["optimizer"] == composed("optimizer=sgd")[0]["optimizer"]
    assert "momentum_decay=0.01" in notes[0]
    with pytest.raises(ConfigError, match=r"optimizer\.momentum: NAdam has no such option"):
        parse(compose(["experiment=typo"], Flags(str(tmp_path)))).build_optimizer(nn.Linear(2, 2))


def test_a_value_of_another_type_is_left_out(tmp_path: Path) -> None:
    """A number of blocks where the chosen family needs one per stage: the family's own; what is typed is kept."""
    write_configs(tmp_path / "experiment", {"deep": f"{ON_DIGITS}model: {{depth: 3, dim: 64}}"})
    cfg, notes = composed("experiment=deep", "model=pit", directory=tmp_path)
    assert cfg["model"]["depth"] == composed("model=pit")[0]["model"]["depth"]
    assert notes == ["model: ignoring options of experiment/deep that PiT does not accept: depth=3"]
    assert composed("experiment=deep", "model=vit", directory=tmp_path)[0]["model"]["depth"] == 3
    with pytest.raises(ConfigError, match=r"model\.depth=3: input should be a valid array"):
        vix.build_model(compose(["experiment=deep", "model=pit", "model.depth=3"], Flags(str(tmp_path))))


def test_later_overlays_and_included_ones(tmp_path: Path) -> None:
    """Of two experiments the later one chooses; an experiment that includes another one may choose otherwise."""
    header = "# @package _global_\ndefaults:\n"
    write_configs(
        tmp_path / "experiment",
        {
            "child": f"{header}  - base\n  - _self_\n  - override /attention: performer\nattention: {{features: 8}}",
            "base": f"{header}  - override /attention: nystrom\nattention: {{landmarks: 4}}",
            "late": f"{header}  - override /attention: linformer\nattention: {{heads: 2}}",
        },
    )
    cfg, notes = composed("experiment=child", directory=tmp_path)
    assert cfg["attention"]["features"] == 8
    assert "landmarks" not in cfg["attention"]
    assert notes == []  # the file itself replaces that choice; a message is logged only for a choice on the command line
    cfg, notes = composed("experiment=child", "attention=linear", directory=tmp_path)
    assert notes == ["attention=linear: ignoring the options of experiment/child for attention=performer: features=8"]
    cfg, notes = composed("experiment=[base,late]", directory=tmp_path)
    assert cfg["attention"]["heads"] == 2
    assert "landmarks" not in cfg["attention"]
    cfg, _ = composed("experiment=[late,base]", directory=tmp_path)
    assert cfg["attention"]["landmarks"] == 4


def test_the_plan_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = plan([*TINY, "attention=nystrom,performer"])
    assert [job.state for job in jobs] == ["new", "new"]
    assert [job.left_out for job in jobs] == [
        [],
        ["attention=performer: ignoring the options of experiment/quickstart for attention=nystrom: landmarks=16"],
    ]
