"""Output never fails a job: terminals that lack characters, pipes and disks that are gone, and names that look like markup."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANGS, ROOT, TINY, run_train
from matplotlib.image import imread

from vix.reporting.console import ERRORS, LossyFile, protect_stream
from vix.reporting.table import Table
from vix.system.files import run_directory_name

NAME = "a[bold]b[/] :car: $x^{2$ _猫"  # markup, an emoji code, a formula that is none, and a letter that most fonts lack


def shell(command: str, directory: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """A command of bash, in which $PYTHON is this Python; the exit status of a pipe is that of its first part that fails."""
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **env}
    whole = f"set -o pipefail; {command}"
    return subprocess.run(["bash", "-c", whole], cwd=directory, env=env, capture_output=True, timeout=HANGS, check=False)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two seeds of a kept run, under a name that is hard to print, and one that failed for a reason like that."""
    for seed in range(2):
        results = json.loads((ROOT / f"results/cpu/cpu_vit/seed={seed}/results.json").read_text())
        for key, folder in (("experiment", "new"), ("failed", "bad")):
            changes = {"experiment": NAME} if key == "experiment" else {"status": "failed", "error": NAME}
            path = tmp_path / "outputs" / folder / f"seed={seed}" / "results.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(results | changes))
    return tmp_path


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_the_report_in_any_encoding(runs: Path, encoding: str) -> None:
    """What can be printed is, with names as they are; typographic signs become plain ones."""
    done = shell("$PYTHON -m vix report --no-files", runs, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding)
    name = NAME if encoding == "utf-8" else NAME.replace("猫", "\\u732b")
    assert text.count(name) == 3  # the group, and the error of both that failed
    assert ("+/-" if encoding == "ascii" else "±") in text
    assert "Last epoch: percent of the test set, or of the images held out" in " ".join(text.split())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["| head -1", "| true", ">&-", ">/dev/full", ">&- 2>&-"])
def test_the_report_writes_its_files_whatever_happens_to_its_output(runs: Path, way: str) -> None:
    done = shell(f"$PYTHON -m vix report {way}", runs)
    assert done.returncode == 0
    lost = b"warning: further standard output is lost (No space left on device)\n"
    assert done.stderr == (lost if "full" in way else b"")
    assert NAME.replace("[", "\\[").replace("]", "\\]") in (runs / "outputs" / "report.md").read_text()
    assert imread(runs / "outputs" / "learning_curves.png").var() > 0


@pytest.mark.slow
def test_a_sweep_on_a_terminal_without_typographic_signs(tmp_path: Path) -> None:
    """A job that finishes, and one that is refused with brackets in its name, in ASCII: both are in the table at the end."""
    done = run_train(tmp_path, "-m", *TINY, "trainer.epochs=1", "model.dim=16,[red]", PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: 1 of this sweep's jobs did not finish"
    assert "Traceback" not in done.stderr
    assert "Logging error" not in done.stdout
    table = done.stdout[done.stdout.index("jobs of this sweep") :]
    assert "model.dim=[red]" in table
    assert "- (no GPU)" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("way", [pytest.param("| head -1", id="head"), pytest.param(">/dev/full", marks=pytest.mark.slow)])
def test_a_run_finishes_without_its_output(tmp_path: Path, way: str) -> None:
    done = shell(f"$PYTHON {ROOT / 'train.py'} {' '.join(TINY)} {way}", tmp_path)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    (path,) = tmp_path.glob("outputs/*/*/results.json")
    assert json.loads(path.read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "summary", "diff", "replay"])
def test_every_command_prints_in_ascii_and_to_nobody(command: str, tmp_path: Path) -> None:
    run = ROOT / "results/cpu/cpu_vit"
    arguments = {"diff": f"{run}/seed=0 {run}/seed=1", "replay": "."}.get(command, "experiment=quickstart")
    program = f"$PYTHON -m vix {command} {arguments}"
    status = 1 if command == "replay" else 0  # the message says that there is no such run
    for way in ("| true", ">&-"):
        done = shell(f"{program} {way}", tmp_path, PYTHONIOENCODING="ascii")
        assert done.returncode == status, done.stderr
        assert done.stderr.count(b"\n") == status


def test_a_protected_stream(tmp_path: Path) -> None:
    """Handlers of logging follow it; what a full disk refuses is dropped; what is no file is left alone."""
    stream = open("/dev/full", "w", encoding="ascii")  # noqa: SIM115
    handler = logging.StreamHandler(stream)
    logging.getLogger("vix.tried").addHandler(handler)
    try:
        safe = protect_stream(stream, stream.fileno())
        assert handler.stream is safe
        assert protect_stream(safe, stream.fileno()) is safe
        assert (safe.encoding, safe.errors) == ("ascii", ERRORS)
        for _ in range(3):
            print("± 猫", file=safe, flush=True)
        assert os.path.samefile(f"/proc/self/fd/{stream.fileno()}", os.devnull)
    finally:
        logging.getLogger("vix.tried").removeHandler(handler)
        stream.close()
    memory = io.TextIOWrapper(io.BytesIO())
    assert protect_stream(memory, 1) is memory


def test_a_pipe_that_is_not_ready_is_waited_for() -> None:
    """As a descriptor is that another program made non-blocking: nothing is lost."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with subprocess.Popen(["bash", "-c", "sleep 0.2; wc -c"], stdin=reading, stdout=subprocess.PIPE) as reader:
        os.close(reading)
        with io.BufferedWriter(LossyFile(writing, "wb")) as file:
            file.write(bytes(1_000_000))
        assert reader.communicate()[0].strip() == b"1000000"


def test_the_title_of_a_narrow_table_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """For grep: the name of a run is longer than a small table is wide."""
    Table(title := "Predicted classes: outputs/quickstart,attention=softmax/seed=0", ("a", "b"), [("x", "1")], 1).print()
    assert capsys.readouterr().out.splitlines()[0] == title


def test_the_name_of_a_runs_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vin" / "seed=0").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "vin" / "seed=0")
    assert [run_directory_name(Path(path)) for path in (".", "../seed=1", "/o/vin/seed=2")] == [
        "vin/seed=0",
        "vin/seed=1",
        "vin/seed=2",
    ]
