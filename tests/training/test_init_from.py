"""trainer.init_from: what is taken from other weights, what is refused, and whose run it is."""

import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import digit_folder
from conftest import TINY, run_train
from forked import Forked, signal_at_file
from omegaconf import DictConfig
from timm.layers.pos_embed import resample_abs_pos_embed

import vix
from vix.cli.plan import plan
from vix.errors import ConfigError
from vix.runs.results import find_runs, group_seeds
from vix.training.init_from import fit_weights, weights_digest

Compose = Callable[..., DictConfig]
SMALL = ("model=vit", "attention=softmax", "embedding=linear", "data=digits", "model.dim=16", "model.depth=1")
FOLDER = ("data=imagefolder", "data.channels=1", "data.image_size=12", "data.classes=3", "data.validation_size=3")


def save(cfg: DictConfig, path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    weights = vix.build_model(cfg).state_dict()
    torch.save(weights, path)
    return weights


def test_another_size_and_other_classes(compose_config: Compose, tmp_path: Path) -> None:
    """The position table is interpolated in two dimensions, the class token's row kept; the head is new; all else is equal."""
    weights = save(compose_config(*SMALL), tmp_path / "w.pt")
    model = vix.build_model(compose_config(*SMALL, *FOLDER))
    head = model.state_dict()["head.weight"].clone()
    taken, messages = fit_weights(model, str(tmp_path / "w.pt"))
    model.load_state_dict(taken, strict=False)
    own, table = model.state_dict(), weights["posenc.table_ND"]
    assert torch.equal(own["posenc.table_ND"][0], table[0])
    for channel in (0, 7):
        expected = F.interpolate(table[1:, channel].view(1, 1, 8, 8), size=(12, 12), mode="bicubic")
        torch.testing.assert_close(own["posenc.table_ND"][1:, channel].view(1, 1, 12, 12), expected)
    smaller = vix.build_model(compose_config(*SMALL, *FOLDER, "data.image_size=4"))  # every position counts
    taken, _ = fit_weights(smaller, str(tmp_path / "w.pt"))
    torch.testing.assert_close(taken["posenc.table_ND"], resample_abs_pos_embed(table[None], [4, 4], [8, 8])[0])
    assert torch.equal(own["head.weight"], head)
    same = own.keys() - {"posenc.table_ND", "head.weight", "head.bias"}
    assert len(same) > 10
    assert all(torch.equal(own[name], weights[name]) for name in same)
    assert messages == [
        f"Starting from the weights of {tmp_path / 'w.pt'}",
        "Interpolated: posenc.table_ND from 65×16 to 145×16",
        "Not taken: head.weight (10×16), head.bias (10)",
        "Newly initialized: head.weight, head.bias",
    ]


@pytest.mark.parametrize("kind", ["relative2d", "window"])
def test_tables_of_relative_positions(compose_config: Compose, tmp_path: Path, kind: str) -> None:
    """The biases of the smallest and of the largest distance are kept."""
    common = (*SMALL, "model.pool=mean")
    if kind == "window":
        before, after = ((*common, "attention=window", f"attention.window={w}") for w in (2, 4))
        ends = ((0, 0), (1, 3), (2, 6))
    else:
        before, after = (*common, "posenc=relative2d"), (*common, "posenc=relative2d", *FOLDER)
        ends = ((0, 0), (7, 11))
    weights = save(compose_config(*before), tmp_path / "w.pt")
    table = next(name for name in weights if name.endswith("table_HYX"))
    weights[table] = torch.randn_like(weights[table])
    torch.save(weights, tmp_path / "w.pt")
    taken, _ = fit_weights(vix.build_model(compose_config(*after)), str(tmp_path / "w.pt"))
    for old_row, row in ends:
        for old_column, column in ends:
            torch.testing.assert_close(taken[table][:, row, column], weights[table][:, old_row, old_column])


def test_another_position_encoding(compose_config: Compose, tmp_path: Path) -> None:
    save(compose_config(*SMALL), tmp_path / "w.pt")
    _, messages = fit_weights(vix.build_model(compose_config(*SMALL, "posenc=rotary")), str(tmp_path / "w.pt"))
    assert messages[1:] == ["Not taken: posenc.table_ND (65×16)"]


def test_what_does_not_fit(compose_config: Compose, tmp_path: Path) -> None:
    """One line that names the first difference and the number of the others."""
    save(compose_config(*SMALL), tmp_path / "w.pt")
    save(compose_config(*SMALL, "attention=linformer"), tmp_path / "linformer.pt")
    for name, overrides, message in (
        ("w", ("model.dim=32",), "class_token is 16 there and 32 here, and"),
        ("w", ("model.depth=2",), "it has no blocks.1."),
        ("w", ("model.pool=mean", "attention=performer"), "it has class_token, and 3 more differences"),
        ("w", ("embedding.patch_size=2",), "embedding.project.weight is 16×1×1×1 there and 16×1×2×2 here"),
        ("linformer", ("attention=linformer", *FOLDER), "blocks.0.mixer.length_k is 65×"),
    ):
        with torch.device("meta"):
            model = vix.build_model(compose_config(*SMALL, *overrides))
        with pytest.raises(ConfigError) as caught:
            fit_weights(model, str(tmp_path / f"{name}.pt"))
        start = f"trainer.init_from={tmp_path / name}.pt: its weights are not those of this model ({message}"
        assert str(caught.value).startswith(start)


def test_the_digest_is_that_of_the_weights(compose_config: Compose, tmp_path: Path) -> None:
    weights = save(compose_config(*SMALL), tmp_path / "w.pt")
    torch.save({"model": weights, "epoch": 3}, tmp_path / "checkpoint.pt")
    assert weights_digest(str(tmp_path)) == weights_digest(str(tmp_path / "w.pt"))
    weights["head.bias"][0] += 1e-6
    torch.save(weights, tmp_path / "other.pt")
    assert weights_digest(str(tmp_path / "other.pt")) != weights_digest(str(tmp_path))
    for content, message in ((b"", "damaged"), (None, "there is no"), ({"a": 1}, "contains no weights")):
        path = tmp_path / f"{message}.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content:
            torch.save(content, path)
        with pytest.raises(ConfigError, match=message):
            weights_digest(str(path))


@pytest.mark.slow
def test_whose_run_it_is(tmp_path: Path, forked: Forked, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is identified by the content of its first weights: a copy is the same run, other weights are another; once begun,
    a run goes on without them; a refused start leaves everything."""
    monkeypatch.chdir(tmp_path)
    for seed, epochs in ((0, 40), (1, 1)):
        done = run_train(tmp_path, *TINY, f"trainer.epochs={epochs}", "optimizer.lr=0.01", f"seed={seed}")
        assert done.returncode == 0, done.stderr
    (zero,) = Path("outputs").glob("quickstart*/seed=0")
    (one,) = Path("outputs").glob("quickstart*/seed=1")
    tuned = (*TINY, "trainer.epochs=3", "optimizer.lr=1e-4")
    stop = partial(signal_at_file, signal.SIGTERM, "checkpoint.pt", 2)
    status = forked.wait(forked.start(tmp_path, *tuned, f"trainer.init_from={zero}", before=stop))
    assert status == 128 + signal.SIGTERM
    shutil.copytree(zero, "kept")
    shutil.rmtree(zero)
    (run,) = Path("outputs").glob("*init_from=*/seed=0")
    status, output = forked.run(tmp_path, *tuned, f"trainer.init_from={zero}")  # the weights are gone
    assert status == 0, output
    assert "Continuing after 1 epochs" in output
    results = json.loads((run / "results.json").read_text())
    assert results["init_weights"] == weights_digest("kept")
    assert results["history"][0]["top1"] > 40  # not from random weights

    assert [job.state for job in plan([*tuned, "trainer.init_from=kept"])] == ["finished"]
    assert "Already finished" in run_train(tmp_path, *tuned, "trainer.init_from=kept/checkpoint.pt").stdout
    assert [job.state for job in plan([*tuned, f"trainer.init_from={one}"])] == ["new"]
    done = run_train(tmp_path, *tuned, f"trainer.init_from={one}")
    assert done.returncode == 0, done.stderr
    assert f"Starting from the weights of {one}" in done.stdout
    groups, others = group_seeds(find_runs([Path("outputs")]))
    assert sorted(len(group.runs) for group in groups) == [1, 1, 1]
    assert not others

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for extra, message in (
        ((f"trainer.init_from={one}",), "started from other weights"),
        ((f"trainer.init_from={one}", "trainer.resume=force"), "started from other weights"),
        ((), "started from other weights"),
        (("trainer.init_from=nowhere", "rerun=true"), "there is no nowhere"),
        (("trainer.init_from=kept", "model.dim=24", "rerun=true"), "its weights are not those of this model"),
    ):
        done = run_train(
            tmp_path, *tuned, *extra, f"hydra.run.dir={str(run).replace('=', chr(92) + '=').replace(',', chr(92) + ',')}"
        )
        assert done.returncode == 1
        assert message in done.stderr.splitlines()[-1]
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == {
            path: content for path, content in before.items() if path.name != ".lock"
        }
    # A sweep over two sources.
    shutil.copytree(one, "other")
    done = run_train(tmp_path, "-m", *tuned, "trainer.init_from=kept,other")
    assert done.stdout.count("Already finished") == 2


@pytest.mark.slow
def test_trained_weights_learn_in_fewer_epochs(tmp_path: Path) -> None:
    """From the digits at 8×8 pixels to six of their classes at 12×12 with few images: sooner as accurate as from scratch."""
    assert run_train(tmp_path, "experiment=quickstart", "trainer.epochs=5", "hydra.run.dir=digits").returncode == 0
    digit_folder(tmp_path / "folder", classes=6, side=12)
    few = ("data=imagefolder", "data.root=folder", "data.image_size=12", "data.channels=1", "trainer.epochs=12")
    histories = []
    for init in ("null", "digits"):
        done = run_train(
            tmp_path,
            "experiment=quickstart",
            *few,
            f"trainer.init_from={init}",
            f"hydra.run.dir=from_{init}",
            "trainer.batch_size=16",
        )
        assert done.returncode == 0, done.stderr
        histories.append(
            [row["top1"] for row in json.loads((tmp_path / f"from_{init}" / "results.json").read_text())["history"]]
        )
        assert ("Interpolated: posenc.table_ND from 65×64 to 145×64" in done.stdout) == (init == "digits")
    scratch, tuned = histories
    reached = max(scratch)
    assert next(i for i, top1 in enumerate(tuned) if top1 >= reached) < 0.5 * scratch.index(reached)
