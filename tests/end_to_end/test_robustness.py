"""What happens to runs: killed, out of disk, fed damaged files, numbers that go wrong. Done to real train.py processes."""

import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from common import assert_same, outcome, run_directory
from conftest import HANGS, ROOT, TINY, run_train
from forked import Forked, before_each_change, kill_at_change, log_changes, signal_at_file

import vix
from vix.__main__ import main as run_command
from vix.build import load_run
from vix.cli import diff
from vix.cli.plan import plan
from vix.cli.replay import repeat_step
from vix.composition.command import Flags
from vix.composition.compose import compose
from vix.errors import UserError
from vix.runs.checkpoint import read_checkpoint
from vix.runs.results import find_runs
from vix.runs.run import RunDirectory
from vix.runs.sweep import Sweep, record_end
from vix.training.init_from import weights_digest

SMALL = (*TINY, "trainer.epochs=3", "augment.flip=true", "model.dropout=0.1", "trainer.checkpoint_every=2")


def assert_files_are_whole(run: Path) -> None:
    if (run / "results.json").exists():
        json.loads((run / "results.json").read_text())
    for checkpoint in run.glob("checkpoint*.pt"):
        read_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, forked: Forked) -> Path:
    """Where an undisturbed run of SMALL is, with a list of its changes to its files."""
    directory = tmp_path_factory.mktemp("whole")
    status, output = forked.run(directory, *SMALL, before=partial(log_changes, str(directory / "changes")))
    assert status == 0, output
    return directory


@pytest.mark.parametrize("kills", [3, pytest.param(15, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path: Path, forked: Forked, whole: Path, kills: int) -> None:
    """kill -9 at random moments: every file is whole or absent, and the same command then ends as if undisturbed.

    A moment is one between two changes of the run's files, or in the middle of writing one: what it leaves depends on nothing
    else, and the machine's speed does not matter.
    """
    expected = outcome(whole)
    changes = len((whole / "changes").read_text().splitlines())
    draw = random.Random(0)
    continued = 0
    for i in range(kills):
        directory = tmp_path / f"killed-{i}"
        kill = partial(kill_at_change, int((i + draw.random()) * changes / kills), half_written=i % 2 == 1)
        assert forked.wait(forked.start(directory, *SMALL, before=kill)) == -signal.SIGKILL
        for run in directory.glob("outputs/*/*"):
            assert_files_are_whole(run)
        saved = bool(list(directory.glob("outputs/*/*/checkpoint.pt")))
        finished = any('"status": "finished"' in p.read_text() for p in directory.glob("outputs/*/*/results.json"))
        status, output = forked.run(directory, *SMALL)
        assert status == 0, output
        assert ("Continuing after" in output) == (saved and not finished)
        assert ("Already finished" in output) == finished
        continued += saved
        assert_same(directory, expected)
        assert not list(run_directory(directory).glob(".*.tmp"))
        shutil.rmtree(directory)
    assert continued > kills // 2  # most moments are after the first checkpoint


@pytest.mark.slow
def test_stopped_at_an_epochs_end_and_continued(tmp_path: Path, forked: Forked, whole: Path) -> None:
    """Two of three epochs done, and the third from their checkpoint alone: bit-identical to one run of three."""
    # The 7th checkpoint (of the start, of two steps and the end of each epoch) is that of the second epoch's end.
    kill = partial(signal_at_file, signal.SIGKILL, "checkpoint.pt", 8)
    assert forked.wait(forked.start(tmp_path, *SMALL, before=kill)) == -signal.SIGKILL
    position = read_checkpoint(run_directory(tmp_path) / "checkpoint.pt")["progress"]
    assert (position["epoch"], position["batch"]) == (2, 0)
    status, output = forked.run(tmp_path, *SMALL)
    assert status == 0, output
    assert "Continuing after" in output
    assert_same(tmp_path, outcome(whole))


DROPPED = """
import os, signal, time
from vix.system.signals import SignalHandler

class Freed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

with SignalHandler() as stop, stop.interruptible(lambda: print("left once")):
    Freed()
    print("goes on")
    time.sleep(600)  # is broken off
"""


def test_a_stop_that_python_drops_comes_again() -> None:
    """What a signal raises while an object is freed is lost, as happens in a compiler: a second later it is raised again."""
    command = [sys.executable, "-c", DROPPED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stdout.split("\n") == ["goes on", "left once", ""]
    assert "Exception ignored in" in done.stderr


def stop_in_evaluation(batches: int) -> None:
    """Let this process receive SIGTERM when its first evaluation asks for the batch of that number (from 0)."""
    from vix.training import trainer

    evaluate = trainer.accuracy

    def stopped(model: Any, test_batches: Iterable[Any], *rest: Any) -> Any:
        def counted() -> Iterator[Any]:
            for i, batch in enumerate(test_batches):
                if i == batches:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        return evaluate(model, counted(), *rest)

    trainer.accuracy = stopped


@pytest.mark.slow
def test_stopped_while_testing(tmp_path: Path, forked: Forked) -> None:
    """The evaluation at an epoch's end is not waited for: the run leaves at once, and continues with that evaluation."""
    small = (*SMALL, "trainer.eval_batch_size=1", "trainer.epochs=1")
    assert forked.run(tmp_path / "whole", *small)[0] == 0
    directory = tmp_path / "stopped"
    status = forked.wait(forked.start(directory, *small, before=partial(stop_in_evaluation, 20)))
    assert status == 128 + signal.SIGTERM
    position = read_checkpoint(run_directory(directory) / "checkpoint.pt")["progress"]
    assert (position["epoch"], position["batch"]) == (0, 5)
    status, output = forked.run(directory, *small)
    assert status == 0, output
    assert_same(directory, outcome(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        *("truncated", "noise", "empty", "foreign", "code"),
        *(pytest.param(damage, marks=pytest.mark.slow) for damage in ("pickle", "lacks", "type")),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, forked: Forked, whole: Path, damage: str) -> None:
    """Never executed; the previous one is used where it is sound, and without one the run says how to start over."""
    shutil.copytree(whole / "outputs", tmp_path / "outputs")
    expected = outcome(tmp_path)
    run = run_directory(tmp_path)
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**results, "status": "interrupted"}))
    path = run / "checkpoint.pt"
    sound = path.read_bytes()

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    if damage == "truncated":
        path.write_bytes(sound[: len(sound) // 2])
    elif damage == "noise":
        path.write_bytes(random.Random(0).randbytes(5000))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif damage == "pickle":
        path.write_bytes(pickle.dumps({"model": {}, "epoch": 3}))
    elif damage == "lacks":
        torch.save({key: value for key, value in read_checkpoint(path).items() if key != "optimizer"}, path)
    elif damage == "type":
        torch.save({**read_checkpoint(path), "progress": {"epoch": "1"}}, path)
    else:
        torch.save({"model": Code()}, path, pickle_module=pickle)

    with pytest.raises(UserError, match=r"checkpoint\.pt is damaged"):
        read_checkpoint(path)
    spoiled = path.read_bytes()
    status, output = forked.run(tmp_path, *SMALL)
    assert status == 0, output
    assert "checkpoint.pt is damaged" in output
    assert "continuing from checkpoint.previous.pt" in output
    assert_same(tmp_path, expected)

    for file in ("checkpoint.pt", "checkpoint.previous.pt"):
        (run / file).write_bytes(spoiled)
    (run / "results.json").write_text(json.dumps({**results, "status": "interrupted"}))
    status, output = forked.run(tmp_path, *SMALL)
    assert status == 1
    assert output.splitlines()[-1].startswith("error: ")
    assert "rerun=true" in output.splitlines()[-1]
    assert not (tmp_path / "executed").exists()
    assert path.read_bytes() == spoiled


@pytest.mark.slow
def test_a_checkpoint_of_another_version(tmp_path: Path, forked: Forked, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is not as expected, or another model's weights, is one line, and changes no checkpoint."""
    shutil.copytree(whole / "outputs", tmp_path / "outputs")
    run = run_directory(tmp_path)
    path = run / "checkpoint.pt"
    sound, results = read_checkpoint(path), json.loads((run / "results.json").read_text())
    weights = {f"old.{name}": tensor for name, tensor in sound["model"].items()}
    for change, message in (
        ({"rng": {}}, "is damaged or of another version of this program (KeyError: "),
        ({"optimizer_params": ["x"]}, "is damaged or of another version of this program ("),
        ({"model": weights}, "has the weights of another model, although its config is the same"),
    ):
        torch.save({**sound, **change, "progress": {**sound["progress"], "epoch": 1}}, path)
        (run / "results.json").write_text(json.dumps({**results, "status": "interrupted"}))
        spoiled = path.read_bytes()
        status, output = forked.run(tmp_path, *SMALL)
        assert status == 1
        last = output.splitlines()[-1]
        assert last.startswith("error: the checkpoint in ")
        assert message in last
        assert last.endswith("start over with rerun=true")
        assert path.read_bytes() == spoiled
    with pytest.raises(UserError, match=r"checkpoint\.pt has the weights of another model"):
        vix.load_model(run)
    (run / "nonfinite.pt").write_bytes(spoiled)
    monkeypatch.setattr(sys, "argv", ["vix", "replay", str(run)])
    with pytest.raises(SystemExit, match=r"^error: .*nonfinite\.pt is damaged or not a checkpoint \(images is missing"):
        run_command()


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path, forked: Forked) -> None:
    """One clear error; the checkpoint and results from before are whole; with room again, the same command finishes."""
    arguments = (*SMALL, "model.dim=64")
    assert forked.run(tmp_path / "whole", *arguments)[0] == 0
    size = (run_directory(tmp_path / "whole") / "checkpoint.pt").stat().st_size
    directory = tmp_path / "full"
    directory.mkdir()
    # Room for one and a half checkpoints and the small files, so a second whole one fails.
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={3 * size // 2 + 100_000}", "tmpfs", str(directory)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("only root can mount the small disk that this test fills")
    try:
        status, output = forked.run(directory, *arguments)
        assert status == 1
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "No space left on device" in errors[0]
        assert "Traceback" not in output
        run = run_directory(directory)
        assert_files_are_whole(run)
        assert (run / "checkpoint.pt").exists()
        assert not list(run.glob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=100m", str(directory)], check=True)
        status, output = forked.run(directory, *arguments)
        assert status == 0, output
        assert "Continuing after" in output
        assert_same(directory, outcome(tmp_path / "whole"))
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize(
    "extra",
    [
        ("optimizer.lr=1e30", "trainer.micro_batch=7"),
        pytest.param(("optimizer.lr=1e30", "trainer.precision=bf16"), marks=pytest.mark.slow),
    ],
)
def test_numbers_that_are_not_finite(tmp_path: Path, forked: Forked, extra: tuple[str, ...]) -> None:
    """The run stops with step, layer, rate and scale, and saves the batch; one command repeats it."""
    status, output = forked.run(tmp_path, *TINY, *extra)
    assert status == 1
    line = output.splitlines()[-1]
    assert line.startswith("error: not finite at step ")
    assert "learning rate 1e+30" in line
    assert "scale 1" in line
    run = run_directory(tmp_path)
    assert json.loads((run / "results.json").read_text())["status"] == "failed"
    saved = torch.load(run / "nonfinite.pt", weights_only=True)
    assert "the output of blocks.0" in line
    assert saved["micro_batch"] == (7 if "trainer.micro_batch=7" in extra else 20)
    assert all(t.isfinite().all() for t in saved["model"].values())  # the weights from before the step broke them
    command = line.split("`")[1].split(" ")
    assert command[:4] == ["python", "-m", "vix", "replay"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    again = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, env=environment, check=True)
    assert again.stdout.strip() == line.removeprefix("error: ").split(";")[0]


def test_float16_skips_steps_and_counts_them(tmp_path: Path, forked: Forked) -> None:
    """Gradients that overflow are float16's everyday business: the scale falls until they do not, and the run goes on."""
    status, output = forked.run(tmp_path, *TINY, "trainer.precision=fp16", "trainer.batch_size=1")
    assert status == 0, output
    results, checkpoint = outcome(tmp_path)
    assert results["skipped_steps"] == checkpoint["skipped_steps"]
    halved = 65536.0 / checkpoint["scaler"]["scale"]
    assert results["skipped_steps"] > 0
    assert 2 ** results["skipped_steps"] == halved


def log_what_is_held(file: str) -> None:
    """Write a line to ``file`` before each job of this process begins: memory in kB, threads and open files."""

    def log(event: str, path: str) -> None:
        if event == "open" and path.endswith("/.hydra/config.yaml"):
            status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
            files = len(os.listdir("/proc/self/fd"))
            with open(file, "a") as lines:
                lines.write(f"{status['VmRSS'].split()[0]} {status['Threads']} {files}\n")

    before_each_change(log)


@pytest.mark.slow
def test_fifty_jobs_do_not_leak(tmp_path: Path, forked: Forked) -> None:
    """Memory after the fiftieth job of a sweep is within 5 % of that after the tenth; no file or thread is left open."""
    look = partial(log_what_is_held, str(tmp_path / "held"))
    status, output = forked.run(tmp_path, "-m", *TINY, "trainer.epochs=1", "seed=range(51)", before=look)
    assert status == 0, output
    held = [[int(number) for number in line.split()] for line in (tmp_path / "held").read_text().splitlines()]
    assert len(held) == 51
    memory, threads, files = zip(held[10], held[50], strict=True)
    assert memory[1] <= 1.05 * memory[0]
    assert threads[1] <= threads[0]
    assert files[1] <= files[0]


def test_a_run_moved_aside_keeps_everything(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, {}, {})
    names = {"results.json", "checkpoint.pt", "checkpoint.previous.pt", "nonfinite.pt", "events.out.tfevents.1"}
    for name in names:
        (tmp_path / name).write_text(name)
    run.archive_previous()
    assert {p.name for p in tmp_path.iterdir()} == {"previous-1"}
    assert {p.name: p.read_text() for p in (tmp_path / "previous-1").iterdir()} == {name: name for name in names}
    (tmp_path / "results.json").write_text("second")
    run.archive_previous()
    assert (tmp_path / "previous-2" / "results.json").read_text() == "second"


def test_two_processes_download_once(tmp_path: Path) -> None:
    """The second waits for the first, and uses what it brought; see test_data.py for the download itself."""
    script = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from vix.data.cifar import Cifar10
folder = Path({str(tmp_path)!r})
class Reader:
    def __init__(self, root, download=False):
        with open(folder / "downloads", "a") as file:
            file.write("x")
        while len(list(folder.glob("ready-*"))) < 2:  # until the other is about to download, too
            time.sleep(0.01)
        (Path(root) / "cifar-10-batches-py").mkdir()
(folder / f"ready-{{os.getpid()}}").touch()
Cifar10(root=str(folder / "data")).download(Reader, folder / "no-archive")
assert (folder / "data" / "cifar-10-batches-py").is_dir()
"""
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [process.wait(HANGS) for process in processes] == [0, 0]
    assert (tmp_path / "downloads").read_text() == "x"
    assert not list((tmp_path / "data").glob(".download-*"))


@pytest.mark.slow
def test_wrong_module_commands_print_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "vix", "replay", str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert run_train(tmp_path, "--no-such-flag").returncode != 0


@pytest.mark.slow
@pytest.mark.xdist_group("cifar10")
@pytest.mark.parametrize("closed", ["data/cifar-10-batches-py/data_batch_3", "data/cifar-10-batches-py", "outputs"])
def test_no_permission(tmp_path: Path, cifar10_root: Path, closed: str) -> None:
    """One line that names what may not be read or written, and says what to do."""
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    for file in (cifar10_root / "cifar-10-batches-py").iterdir():
        if file.name == Path(closed).name:
            shutil.copy(file, tmp_path / closed)
        else:
            (tmp_path / "data" / "cifar-10-batches-py" / file.name).symlink_to(file.resolve())
    (tmp_path / "outputs").mkdir()
    # Root may do everything, unless it gives that up for the program that it starts.
    asked = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if asked and not shutil.which("setpriv"):
        pytest.skip("this is root, and setpriv (util-linux) is absent")
    mode = (tmp_path / closed).stat().st_mode
    (tmp_path / closed).chmod(0o500 if closed == "outputs" else 0)
    command = [*asked, sys.executable, str(ROOT / "train.py"), "trainer.epochs=1", "data.root=data"]
    try:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=HANGS)
    finally:
        (tmp_path / closed).chmod(mode)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"{closed}: no permission" in line or ("outputs" in line and "Permission denied" in line)
    assert "data.root=DIR" in line or "hydra.run.dir=DIR" in line


def test_a_sweep_goes_on_after_a_directory_that_cannot_be_made(tmp_path: Path, forked: Forked) -> None:
    """Such as a link to a disk that is not there: that job failed, with the reason."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o/seed=0").symlink_to(tmp_path / "absent/seed=0")
    sweep = ("hydra.sweep.dir=o", "hydra.sweep.subdir=seed=${seed}")
    status, output = forked.run(tmp_path, "-m", *TINY, "trainer.epochs=1", "seed=0,1", *sweep, COLUMNS="300")
    assert status == 1
    assert json.loads((tmp_path / "o/seed=1/results.json").read_text())["status"] == "finished"
    (row,) = (line for line in output.splitlines() if "failed" in line and "│" in line)
    assert "o/seed=0: File exists; fix the cause, or choose another directory" in row
    assert output.splitlines()[-1] == "error: 1 of this sweep's jobs did not finish"
    assert "Traceback" not in output


def test_a_job_whose_end_cannot_be_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk neither the sweep's folder nor results.json can be written; the next job is tried nevertheless."""

    def full(path: Path, _: object) -> None:
        raise UserError(f"cannot write {path}")

    monkeypatch.setattr("vix.runs.sweep.write_json", full)
    (tmp_path / "results.json").write_text('{"status": "running"}')
    job = {"parts": ["x"], "outputs": "o", "state": "lost", "results": {}, "directory": str(tmp_path)}
    (tmp_path / "000000.json").write_text(json.dumps(job))
    record_end(tmp_path, 0, ["x"], "failed", "No space left on device")


PLACES: dict[str, Callable[[Path], object]] = {
    "load_run": load_run,
    "find_runs": lambda directory: find_runs([directory]),
    "diff": diff.load,
    "replay": repeat_step,
    "config-dir": lambda directory: compose([], Flags(config_dir=str(directory))),
    "init_from": lambda directory: weights_digest(str(directory)),
    "plan": lambda directory: plan([*TINY, f"hydra.sweep.dir={directory}"]),
}


@pytest.mark.parametrize("place", PLACES)
def test_below_a_directory_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Such as a colleague's: one line instead of pathlib's PermissionError."""
    stat = Path.stat

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if tmp_path in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "run"))) as error:
        PLACES[place](tmp_path / "run")
    if sys.version_info < (3, 13):  # there pathlib answers False, and the directory is said to be absent
        assert "no permission to read it" in str(error.value)


def test_a_sweep_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line instead of a traceback, and nothing is left behind."""

    def full(path: Path, _: bytes) -> None:
        raise UserError(f"cannot write {path}") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vix.runs.sweep.atomic_write", full)
    with pytest.raises(SystemExit, match=r"^error: .*outputs: No space left on device; fix the cause"):
        Sweep([], tmp_path / "outputs", tmp_path / "outputs/.sweeps/rerun-1").__enter__()
    assert not list(tmp_path.iterdir())
