"""Every key is read, and what cannot work is refused in one line before any data is read."""

import csv
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, run_train
from omegaconf import DictConfig, OmegaConf

import vix
from vix.build import GROUPS, parse, parse_group
from vix.errors import ConfigError
from vix.models.counts import parameter_counts
from vix.runs.identity import run_name

Compose = Callable[..., DictConfig]
ROWS = {row["experiment"]: row for row in csv.DictReader((ROOT / "vix" / "runs" / "published.csv").open())}
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
OPTIONS = sorted(f"{p.parent.name}={p.stem}" for p in (ROOT / "conf").glob("*/*.yaml") if p.parent.name in GROUPS)


@pytest.mark.parametrize("row", [name for name, row in ROWS.items() if row["table"] in "125"])
def test_parameters_are_the_published_ones(compose_config: Compose, row: str) -> None:
    """Both counts of every ViX row, exactly, built without memory on the meta device."""
    with torch.device("meta"):
        model = vix.build_model(compose_config(f"experiment={row}"))
    assert parameter_counts(model) == {
        "trainable_params": int(ROWS[row]["trainable_params"]),
        "weight_bias_params": int(ROWS[row]["weight_bias_params"]),
    }
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("row", [name for name, row in ROWS.items() if name in EXPERIMENTS])
def test_experiments_tell_what_was_published(row: str) -> None:
    """The header of an experiment's file holds its command and its row's figures."""
    header = (ROOT / "conf" / "experiment" / f"{row}.yaml").read_text().split("defaults:")[0]
    assert f"python train.py experiment={row}\n" in header
    for column in ("published_top1", "published_top5", "published_gpu_gb"):
        assert ROWS[row][column] in header
    assert f"{int(ROWS[row]['weight_bias_params']):,}" in header


def test_the_default_is_hybrid_vin(compose_config: Compose) -> None:
    assert compose_config() == compose_config("experiment=hybrid_vin")


@pytest.mark.parametrize("option", OPTIONS)
def test_every_key_reaches_a_constructor(compose_config: Compose, option: str) -> None:
    """Each file's keys are parameters of its class, have the types it declares, and are all of them."""
    group = option.split("=")[0]
    make = parse_group(compose_config(option), group)
    accepted = set(inspect.signature(make.func).parameters) - GROUPS[group][1]
    if group == "optimizer":  # PyTorch's have many more
        assert set(make.keywords) <= accepted
    else:
        assert set(make.keywords) == accepted


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(compose_config: Compose, experiment: str) -> None:
    parse(compose_config(f"experiment={experiment}"))


# Refused: what the line must name.
REFUSED = {
    "trainer.epochs=fast": ["trainer.epochs=fast", "integer"],
    "trainer.epochs=2.5": ["trainer.epochs=2.5", "integer"],
    "trainer.epochs='3'": ["trainer.epochs=3", "integer"],
    "trainer.epochs=true": ["trainer.epochs=true", "integer"],
    "trainer.epochs=0": ["trainer.epochs=0", "greater than 0"],
    "trainer.warmup_epochs=41": ["trainer.warmup_epochs=41", "at most"],
    "trainer.micro_batch=few": ["trainer.micro_batch=few", "integer", "'auto'"],
    "trainer.memory_limit_gb=0": ["trainer.memory_limit_gb=0", "greater than 0"],
    "trainer.precision=fp8": ["trainer.precision=fp8", "'bf16'"],
    "trainer.device=gpu": ["trainer.device=gpu", "cuda"],
    "trainer.label_smoothing=1": ["trainer.label_smoothing=1", "less than 1"],
    "attention.heads=3": ["attention.heads=3", "2, 4"],
    "attention.landmarks=1026": ["attention.landmarks=1026", "1025"],
    "attention.conv_kernel=32": ["attention.conv_kernel=32", "31, 33"],
    "attention=linformer attention.kv_heads=3": ["attention.kv_heads=3", "heads=4"],
    "attention=performer attention.local_heads=5": ["attention.local_heads=5", "at most 4"],
    "augment.mixup=0.001": ["augment.mixup=0.001", "0.01"],
    "posenc=rotary model.dim=4": ["dim_head=1 is odd", "nearest even: 2"],
    "attention=softmax attention.dim_head=33 posenc=rotary": ["dim_head=33", "32, 34"],
    "embedding.patch_size=5": ["embedding.patch_size=5", "2, 4"],
    "embedding.hidden=[32,fast]": ["embedding.hidden", "item 2"],
    "model.dim=-1": ["model.dim=-1", "greater than 0"],
    "optimizer.lr=-1": ["optimizer.lr=-1"],
    "optimizer.lr=fast": ["optimizer.lr=fast", "number"],
    "optimizer.betas=[0.9]": ["optimizer.betas"],
    "optimizer.betas=[0.9,2.0]": ["optimizer", "beta"],
    "data.train_size=5": ["data.train_size=5", "10"],
    "data.test_size=10001": ["data.test_size=10001", "10000"],
    "seed=-1": ["seed=-1"],
    "seed=abc": ["seed=abc", "integer"],
    "trainer.activation_checkpointing=selectiv": ["trainer.activation_checkpointing=selectiv", "'selective'", "'full'", "null"],
    "+foo=1": ["foo", "unknown key"],
    "+trainer.epoch=1": ["trainer.epoch", "trainer.epochs"],
    "+attention.dim=64": ["attention.dim", "no such option"],
    "+optimizer.learning_rate=1": ["optimizer.learning_rate", "no such option"],
    "attention=fourier posenc=rotary": ["rotary", "Fourier", "posenc=learned"],
    "attention=token_mlp posenc=rotary": ["rotary", "TokenMLP", "posenc=learned"],
    "~attention": ["attention", "attention=NAME"],
    "attention._target_=os.system": ["attention._target_=os.system", "VIX_PACKAGES"],
    "attention._target_=torch.load": ["attention._target_", "VIX_PACKAGES"],
    "attention._target_=vix.build.parse": ["attention._target_", "Module"],
    "attention._target_=vix.system.files.os.system": ["attention._target_"],
    "attention._target_=vix.attention.nowhere.Mixer": ["cannot be imported"],
    "attention._target_=torch.optim.AdamW": ["attention._target_", "Module"],
}


@pytest.mark.parametrize(("overrides", "named"), REFUSED.items(), ids=REFUSED)
def test_refused(compose_config: Compose, overrides: str, named: list[str]) -> None:
    """One line that names the key and the way out."""

    def prepare() -> None:  # what train.py does before it reads data
        cfg = compose_config(*overrides.split(" "))
        parse(cfg)
        model = vix.build_model(cfg)
        parse(cfg).build_optimizer(model)
        assert parse(cfg).trainer

    with pytest.raises(ConfigError) as refused:
        prepare()
    message = str(refused.value)
    assert "\n" not in message
    for words in named:
        assert words in message


# Refused by Hydra itself, whose messages the program turns into one line; one more through the whole program.
COMMANDS = {
    "trainer.epoch=3": "trainer.epochs",
    "attention=performr": "performer",
    "attentoin=performer": "attention",
    "experiment=quickstrt": "quickstart",
    "attention=performer attention.featurs=3": "attention.features",
    "attention=null": "conf/attention/",
    "seed=[1": "[1",
    "foo": "foo",
    "'fo\no\x1b'": r"fo\no\x1b",  # as in Python's literals
    "~nothing": "nothing",
    "data.root=/nonexistent trainer.epochs=fast": "trainer.epochs=fast",  # before any data is read
    "-m experiment=quickstrt seed=0,1": "quickstart",
}


@pytest.mark.parametrize(("command", "named"), COMMANDS.items(), ids=COMMANDS)
def test_wrong_commands_print_one_line(tmp_path: Path, command: str, named: str) -> None:
    """Exit status 1, one line on standard error with the nearest valid name, and nothing left in outputs/."""
    done = run_train(tmp_path, *command.split(" "))
    assert done.returncode == 1
    line = [line for line in done.stderr.splitlines() if "No CUDA GPU" not in line]
    assert len(line) == 1, done.stderr
    assert line[0].startswith("error: ")
    assert named in line[0]
    assert not list(tmp_path.glob("outputs/*/*"))


def test_packages_named_in_the_environment_may_be_used(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_mixers.py").write_text(
        "from torch import nn\nclass Nothing(nn.Module):\n"
        "    def __init__(self, dim, tokens, *, unused: int = 1):\n        super().__init__()\n"
        "    def forward(self, x):\n        return x\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = compose_config("experiment=fnet", "attention._target_=my_mixers.Nothing", "+attention.unused=2")
    with pytest.raises(ConfigError, match="VIX_PACKAGES"):
        vix.build_model(cfg)
    monkeypatch.setenv("VIX_PACKAGES", "my_mixers")
    vix.build_model(cfg)
    with pytest.raises(ConfigError, match=r"attention\.unused=two: .*integer"):
        vix.build_model(OmegaConf.merge(cfg, {"attention": {"unused": "two"}}))  # type: ignore[arg-type]


OWN_MIXER = '''
from torch import Tensor, nn

from vix.layers.tokens import TokenGrid


class MeanMixer(nn.Module):
    """Every token receives a linear map of the mean token."""

    def __init__(self, dim: int, tokens: TokenGrid, *, bias: bool = True) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim, bias=bias)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.project(x_BND.mean(dim=1, keepdim=True)).expand_as(x_BND)
'''


def test_own_attention_is_one_class_and_one_file(tmp_path: Path) -> None:
    """As docs/extending.md shows: two new files, no edit elsewhere, and the option trains, is checked and is suggested."""
    for name in ("conf", "vix"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path)
    (tmp_path / "vix" / "attention" / "mean.py").write_text(OWN_MIXER)
    (tmp_path / "conf" / "attention" / "mean.yaml").write_text("_target_: vix.attention.mean.MeanMixer\nbias: false\n")
    without_heads = [override for override in TINY if "heads" not in override]
    overrides = (*without_heads, "attention=mean", "trainer.epochs=1")
    program = tmp_path / "train.py"
    done = run_train(tmp_path, *overrides, program=program)
    assert done.returncode == 0, done.stderr
    assert "top-1, last epoch" in done.stdout
    assert "attention.bias=2" in run_train(tmp_path, *overrides, "attention.bias=2", program=program).stderr
    assert "posenc=learned" in run_train(tmp_path, *overrides, "posenc=rotary", program=program).stderr
    assert "mean" in run_train(tmp_path, "attention=meen", program=program).stderr


def test_a_runs_name_follows_from_what_it_is() -> None:
    """Not from how its command was written, nor from where it runs."""
    choices = {"experiment": "vin", "model": "vit", "attention": "nystrom", "embedding": "linear", "posenc": "learned"}
    assert run_name(choices, ["experiment=vin", "seed=1"], 1) == "vin/seed=1"
    one = run_name(choices, ["experiment=vin", "trainer.epochs=3", "optimizer.lr=0.1", "data.root=/x"], 0)
    other = run_name(choices, ["optimizer.lr=0.1", "trainer.device=cpu", "trainer.epochs=3", "experiment=vin"], 0)
    assert one == other == "vin,optimizer.lr=0.1,trainer.epochs=3/seed=0"
    assert run_name(choices, ["experiment=vin", "trainer.epochs=2", "trainer.epochs=3"], 0) == "vin,trainer.epochs=3/seed=0"
    costs = {
        run_name(choices, [f"trainer.{cost}"], 0)
        for cost in ("compile=true", "activation_checkpointing=selective", "activation_checkpointing=full")
    }
    assert len(costs) == 3  # or a sweep over them would find the second run finished
    parts = {**choices, "experiment": None}
    assert run_name(parts, ["attention=nystrom", "data=digits"], 0) == "vit-nystrom-linear-learned,data=digits/seed=0"
    long = run_name(choices, [f"+data.name{i}=a/b c" for i in range(40)], 0)
    assert len(long) < 200
    assert long.count("/") == 1
    assert long != run_name(choices, [f"+data.name{i}=a/b d" for i in range(40)], 0)
