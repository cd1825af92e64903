"""What a run is, and what happens to it when its command comes again: other images, other options, reruns, lost files."""

import errno
import fcntl
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from forked import Forked, kill_at_change, signal_at_file
from PIL import Image

import vix
from vix.checks import UserError
from vix.data.imagefolder import ImageFolder
from vix.plan import plan
from vix.results import find_runs, group_seeds
from vix.run import read_checkpoint

QUICK = (*(o for o in TINY if not o.startswith("trainer.epochs")), "trainer.compile=false")
FOLDER = (
    *("model=vit", "attention=nystrom", "embedding=linear", "data=imagefolder", "data.image_size=16", "embedding.patch_size=4"),
    *("model.dim=32", "model.depth=1", "attention.landmarks=8", "trainer.compile=false", "trainer.batch_size=16"),
)


def make_images(root: Path, seed: int, count: int = 8) -> Path:
    """Noise in two classes, ``count`` images each to train on and a half as many to evaluate."""
    random = np.random.default_rng(seed)
    for split, images in (("train", count), ("val", count // 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / split / name / f"{i}.png")
    return root


def only_run(directory: Path) -> Path:
    (path,) = directory.rglob("outputs/*/*/results.json")
    return path.parent


def results_in(run: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((run / "results.json").read_text())
    return results


# Which images


def test_other_images_are_another_run(tmp_path: Path, forked: Forked) -> None:
    """Two folders in a sweep: two directories, two lines of the report; a folder that moved finds its run again."""
    for name, seed in (("a", 0), ("b", 1)):
        make_images(tmp_path / name, seed)
    status, output = forked.run(tmp_path, "-m", *FOLDER, "trainer.epochs=1", "data.root=a,b")
    assert status == 0, output
    runs = {run.results["config"]["data"]["root"]: run for run in find_runs([tmp_path / "outputs"])}
    assert set(runs) == {"a", "b"}
    assert len({run.results["image_set"] for run in runs.values()}) == 2
    assert "2 classes, 16 training and 8 test images" in runs["a"].results["image_set"]
    groups, _ = group_seeds(runs.values())
    assert len({group.name for group in groups}) == 2
    before = {root: run.path.read_bytes() for root, run in runs.items()}

    (tmp_path / "a").rename(tmp_path / "moved")
    status, output = forked.run(tmp_path, *FOLDER, "trainer.epochs=1", "data.root=moved")
    assert status == 0, output
    assert "not run again" in output
    assert runs["a"].path.read_bytes() == before["a"]
    (job,) = plan([*FOLDER, "trainer.epochs=1", f"data.root={tmp_path}/b", f"hydra.sweep.dir={tmp_path}/outputs"])
    assert job.state == "finished"

    # The same names, but one image is another one.
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(tmp_path / "b/train/cat/0.png")
    (job,) = plan([*FOLDER, "trainer.epochs=1", f"data.root={tmp_path}/b", f"hydra.sweep.dir={tmp_path}/outputs"])
    assert job.state == "new"


def test_a_directory_of_ones_own_refuses_other_images(tmp_path: Path, forked: Forked) -> None:
    """Interrupted on one folder: refused on another in one line, and continued on the first one after it moved."""
    make_images(tmp_path / "a", 0, 32)
    make_images(tmp_path / "b", 1, 32)
    command = (*FOLDER, "trainer.epochs=2", "hydra.run.dir=outputs/r")
    stop = partial(signal_at_file, signal.SIGTERM, "results.json", 3)
    assert forked.wait(forked.start(tmp_path, *command, "data.root=a", before=stop)) == 128 + signal.SIGTERM
    checkpoint = (tmp_path / "outputs/r/checkpoint.pt").read_bytes()
    status, output = forked.run(tmp_path, *command, "data.root=b")
    assert status == 1
    last = output.splitlines()[-1]
    assert last.startswith("error: data.root: ")
    assert last.count("2 classes, 64 training and 32 test images") == 2
    assert "rerun=true" in last
    assert (tmp_path / "outputs/r/checkpoint.pt").read_bytes() == checkpoint
    (tmp_path / "a").rename(tmp_path / "c")
    status, output = forked.run(tmp_path, *command, "data.root=c")
    assert status == 0, output
    assert "Continuing after" in output
    assert results_in(tmp_path / "outputs/r")["epochs"] == 2


def test_the_digest_is_of_contents_not_of_places(tmp_path: Path) -> None:
    one = make_images(tmp_path / "one", 0)
    shutil.copytree(one, tmp_path / "copy")
    other = make_images(tmp_path / "other", 1)
    digests = [ImageFolder(root=str(root), image_size=16).digest for root in (one, tmp_path / "copy", other)]
    assert digests[0] == digests[1] != digests[2]
    (tmp_path / "copy/train/cat/0.png").rename(tmp_path / "copy/train/dog/new.png")
    assert ImageFolder(root=str(tmp_path / "copy"), image_size=16).digest != digests[0]


# Other options


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, forked: Forked) -> Path:
    """The directory of a finished run of one epoch in a folder ``r``."""
    directory = tmp_path_factory.mktemp("finished")
    status, output = forked.run(directory, *QUICK, "trainer.epochs=1", "hydra.run.dir=r")
    assert status == 0, output
    return directory


def copy_of(finished: Path, directory: Path) -> Path:
    shutil.copytree(finished / "r", directory / "r")
    return directory / "r"


USED = [
    ("optimizer.lr=1e-5", "lr", 1e-5),
    ("optimizer.weight_decay=0.3", "weight_decay", 0.3),
    ("optimizer.betas=[0.5,0.7]", "betas", (0.5, 0.7)),
    ("optimizer.eps=1e-4", "eps", 1e-4),
]
FORCE = ("trainer.epochs=2", "trainer.resume=force", "hydra.run.dir=r")


@pytest.mark.parametrize(("override", "option", "value"), USED, ids=[used[0] for used in USED])
def test_force_uses_the_optimizers_new_options(
    finished: Path, tmp_path: Path, forked: Forked, override: str, option: str, value: Any
) -> None:
    run = copy_of(finished, tmp_path)
    status, output = forked.run(tmp_path, *QUICK, *FORCE, override)
    assert status == 0, output
    groups = torch.load(run / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group[option] for group in groups] == [value]
    results = results_in(run)
    key = override.partition("=")[0]
    assert results["config_changes"][0]["changed"].keys() == {key, "trainer.epochs"}
    assert [row["epoch"] for row in results["history"]] == [1, 2]
    assert results["history"][1]["lr"] == (value if option == "lr" else 1e-3)


def test_force_uses_the_trainers_new_options(finished: Path, tmp_path: Path, forked: Forked) -> None:
    """Schedule, batch size at an epoch's start, EMA, clipping and smoothing at once."""
    run = copy_of(finished, tmp_path)
    options = ("trainer.schedule=linear", "trainer.batch_size=10", "trainer.ema_decay=0.9", "trainer.clip_norm=0.1")
    status, output = forked.run(tmp_path, *QUICK, *FORCE, *options, "trainer.label_smoothing=0.1")
    assert status == 0, output
    results, state = results_in(run), torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["averaged_steps"] == 10
    # The last of 20 steps of 10 images, on a line from 1e-3 to 0.
    assert results["history"][1]["lr"] == pytest.approx(1e-3 / 20)


REFUSED = [
    ("optimizer=sgd", "optimizer._target_"),
    ("model.dim=32", "model.dim"),
    ("seed=1", "seed"),
    ("data.test_size=60", "data.test_size"),
    ("optimizer.amsgrad=true", "optimizer.amsgrad"),
    ("attention=softmax", "attention._target_"),
]


@pytest.mark.parametrize(("override", "key"), REFUSED, ids=[refused[0] for refused in REFUSED])
def test_force_refuses_what_cannot_change(finished: Path, tmp_path: Path, forked: Forked, override: str, key: str) -> None:
    run = copy_of(finished, tmp_path)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix in (".pt", ".json")}
    override = f"+{override}" if "amsgrad" in override else override
    status, output = forked.run(tmp_path, *QUICK, *FORCE, override)
    assert status == 1
    last = output.splitlines()[-1]
    assert last.startswith("error: trainer.resume=force cannot continue ")
    assert f"{key} was " in last
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.suffix in (".pt", ".json")} == before


def test_within_an_epoch_the_batch_size_is_fixed(tmp_path: Path, forked: Forked) -> None:
    command = (*QUICK, "trainer.epochs=1", "trainer.checkpoint_every=2")
    stop = partial(signal_at_file, signal.SIGTERM, "checkpoint.pt", 2)
    assert forked.wait(forked.start(tmp_path, *command, before=stop)) == 128 + signal.SIGTERM
    (run,) = tmp_path.glob("outputs/*/*")
    assert read_checkpoint(run / "checkpoint.pt")["position"]["batch"] > 0
    status, output = forked.run(
        tmp_path, *command, "trainer.batch_size=10", "trainer.resume=force", f"hydra.run.dir='{run.relative_to(tmp_path)}'"
    )
    assert status == 1
    assert "trainer.batch_size was 20 and is 10" in output.splitlines()[-1]


# Reruns


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_an_interrupted_rerun_is_continued(tmp_path: Path, forked: Forked, how: str) -> None:
    """A scheduler repeats the command until it succeeds, and it comes to an end; then it starts over once more."""
    command = (*QUICK, "trainer.epochs=2", "trainer.checkpoint_every=2", "rerun=true")
    assert forked.run(tmp_path, *command)[0] == 0
    run = only_run(tmp_path)
    (tmp_path / "out").unlink()
    stop = partial(signal_at_file, signal.SIGTERM if how == "stopped" else signal.SIGKILL, "checkpoint.pt", 4)
    status = forked.wait(forked.start(tmp_path, *command, before=stop))
    assert status == (128 + signal.SIGTERM if how == "stopped" else -signal.SIGKILL)
    status, output = forked.run(tmp_path, *command)
    assert status == 0, output
    assert "Continuing after" in output
    assert [p.name for p in run.glob("previous-*")] == ["previous-1"]
    first, second = results_in(run / "previous-1"), results_in(run)
    assert [row["train_loss"] for row in first["history"]] == [row["train_loss"] for row in second["history"]]
    assert forked.run(tmp_path, *command)[0] == 0
    assert sorted(p.name for p in run.glob("previous-*")) == ["previous-1", "previous-2"]


def test_a_rerun_of_an_interrupted_run_starts_over_once(tmp_path: Path, forked: Forked) -> None:
    command = (*QUICK, "trainer.epochs=2", "trainer.checkpoint_every=2")
    stop = partial(signal_at_file, signal.SIGTERM, "checkpoint.pt", 3)
    assert forked.wait(forked.start(tmp_path, *command, before=stop)) == 128 + signal.SIGTERM
    (tmp_path / "out").unlink()
    status, output = forked.run(tmp_path, *command, "rerun=true")
    assert status == 0, output
    assert "Continuing after" not in output
    (archive,) = tmp_path.glob("outputs/*/*/previous-*")
    assert results_in(archive)["status"] == "interrupted"


def test_archives_are_never_overwritten(finished: Path, tmp_path: Path, forked: Forked) -> None:
    """The next number is one more than the highest, whichever of them somebody removed."""
    run = copy_of(finished, tmp_path)
    for name in ("previous-2", "previous-10", "previous-notes"):
        (run / name).mkdir()
        (run / name / "file").write_text(name)
    before = results_in(run)
    status, output = forked.run(tmp_path, *QUICK, "trainer.epochs=1", "hydra.run.dir=r", "rerun=true")
    assert status == 0, output
    assert results_in(run / "previous-11") == before
    assert results_in(run)["status"] == "finished"
    for name in ("previous-2", "previous-10", "previous-notes"):
        assert [path.read_text() for path in (run / name).iterdir()] == [name]


def files_of(run: Path) -> dict[str, bytes]:
    """Contents of a run's files, but for those that every start writes."""
    return {p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name not in (".lock", "train.log")}


def refuse_renaming(name: str) -> None:
    """Let this process be refused to move a file of that name."""
    rename = Path.rename

    def refused(self: Path, target: Any) -> Path:
        if self.name == name and Path(target).parent.name == ".previous.tmp":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return rename(self, target)

    Path.rename = refused  # type: ignore[method-assign]


def test_a_rerun_that_cannot_move_the_earlier_run_leaves_it(finished: Path, tmp_path: Path, forked: Forked) -> None:
    run = copy_of(finished, tmp_path)
    before = files_of(run)
    command = (*QUICK, "trainer.epochs=1", "hydra.run.dir=r", "rerun=true")
    status, output = forked.run(tmp_path, *command, before=partial(refuse_renaming, "checkpoint.pt"))
    assert status == 1
    assert output.splitlines()[-1].startswith("error: cannot move the earlier run in ")
    after = files_of(run)
    assert after == before
    assert not list(run.glob("previous-*")) + list(run.glob(".previous*"))


# Refused starts


@pytest.mark.parametrize("place", [".", "link", "new/deep"])
def test_a_refused_command_removes_only_what_it_made(tmp_path: Path, forked: Forked, place: str) -> None:
    work = tmp_path / "work"
    (work / ".hydra").mkdir(parents=True)
    (work / "train.log").write_text("mine\n")
    (work / ".hydra" / "config.yaml").write_text("mine\n")
    (work / ".hydra" / "notes").write_text("mine\n")
    (work / "target").mkdir()
    (work / "target" / "train.log").symlink_to(work / "elsewhere.log")
    (work / "elsewhere.log").write_text("elsewhere\n")
    (work / "link").symlink_to("target")
    files = (tmp_path / "out", tmp_path / "err")

    def listing() -> dict[str, str]:
        return {
            str(path.relative_to(work)): os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else "/"
            for path in sorted(work.rglob("*"))
        }

    before = listing()
    process = forked.start(work, *QUICK, "attention.heads=3", f"hydra.run.dir={place}", stdout=files[0], stderr=files[1])
    assert forked.wait(process) == 1
    assert "attention.heads=3 does not divide" in files[1].read_text()
    assert listing() == before


# Lost files


@pytest.mark.parametrize("damage", ["removed", "half", "empty", "list", "no history"])
def test_lost_results_are_rebuilt(finished: Path, tmp_path: Path, forked: Forked, damage: str) -> None:
    run = copy_of(finished, tmp_path)
    before, path = results_in(run), run / "results.json"
    text = path.read_text()
    damaged = {"half": text[: len(text) // 2], "empty": "", "list": "[]"}
    damaged["no history"] = json.dumps({key: value for key, value in before.items() if key != "history"})
    if damage == "removed":
        path.unlink()
    else:
        path.write_text(damaged[damage])
    status, output = forked.run(tmp_path, *QUICK, "trainer.epochs=1", "hydra.run.dir=r")
    assert status == 0, output
    assert "rebuilt from the checkpoint" in output
    assert "Traceback" not in output
    after = results_in(run)
    assert after["status"] == "finished"
    same = ("top1", "best_top1", "history", "train_loss", "trainable_params", "config", "image_set", "checkpoint_mb", "seconds")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


def test_a_finished_run_without_its_checkpoint_is_finished(finished: Path, tmp_path: Path, forked: Forked) -> None:
    run = copy_of(finished, tmp_path)
    before = results_in(run)
    for path in run.glob("checkpoint*.pt"):
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged"):
        vix.load_model(run)
    for _ in range(2):
        status, output = forked.run(tmp_path, *QUICK, "trainer.epochs=1", "hydra.run.dir=r")
        assert status == 0, output
        assert results_in(run) == before
        for path in run.glob("checkpoint*.pt"):
            path.unlink()
    with pytest.raises(UserError, match=r"there is no .*checkpoint\.pt"):
        vix.load_model(run)
    status, output = forked.run(tmp_path, *QUICK, "trainer.epochs=2", "trainer.resume=force", "hydra.run.dir=r")
    assert status == 1
    assert "rerun=true" in output.splitlines()[-1]
    assert results_in(run) == before


# File systems


def without_locks_and_links(locks: int, links: int) -> None:
    """Let this process find a file system that lacks both, as network file systems do, with these error numbers."""

    def flock(*_: Any) -> None:
        raise OSError(locks, os.strerror(locks))

    def link(source: Any, target: Any, **_: Any) -> None:
        raise OSError(links, os.strerror(links), source, None, target)

    fcntl.flock, os.link = flock, link  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("locks", "links"), [(errno.ENOSYS, errno.EPERM), (errno.EOPNOTSUPP, errno.EOPNOTSUPP), (errno.ENOLCK, errno.ENOSYS)]
)
def test_a_file_system_without_locks_and_links(finished: Path, tmp_path: Path, forked: Forked, locks: int, links: int) -> None:
    """The run says so once and trains the same; checkpoints are copied."""
    command = (*QUICK, "trainer.epochs=1", "hydra.run.dir=r")
    status, output = forked.run(tmp_path, *command, before=partial(without_locks_and_links, locks, links))
    assert status == 0, output
    assert output.count(os.strerror(locks)) == (2 if locks == links else 1)
    assert output.count("cannot be hard-linked") == 1
    assert (tmp_path / "r/checkpoint.previous.pt").is_file()
    assert not list((tmp_path / "r").glob(".*.tmp"))
    losses = [[row["train_loss"] for row in results_in(run)["history"]] for run in (finished / "r", tmp_path / "r")]
    assert losses[0] == losses[1]


def test_a_sweep_killed_while_archiving_gets_its_run_back(tmp_path: Path, forked: Forked) -> None:
    """kill -9 at each of the first changes of a rerun: the earlier run is whole, in its place or in an archive."""
    command = (*QUICK, "trainer.epochs=1")
    assert forked.run(tmp_path, *command)[0] == 0
    run = only_run(tmp_path)
    before = results_in(run)
    for change in (4, 8):
        kill = partial(kill_at_change, change)
        forked.wait(forked.start(tmp_path, *command, "rerun=true", before=kill))
        status, output = forked.run(tmp_path, *command)
        assert status == 0, output
        kept = [run, *run.glob("previous-*")]
        assert before["history"] in [results_in(place)["history"] for place in kept]
