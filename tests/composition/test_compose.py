"""Commands that repeat a run, Hydra's grammar in every place, home directories in paths, and directories of runs."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from common import ON_DIGITS, table_after, write_configs
from conftest import HANGS, ROOT, TINY
from forked import Forked
from hydra.errors import HydraException
from omegaconf import OmegaConf

from vix.__main__ import main as run_command
from vix.build import parse
from vix.cli.plan import plan
from vix.composition.command import Flags, expand_arguments, flags_of, parse_command, reproduce_command
from vix.composition.compose import compose, compose_with_hydra, os_error, sweep_outputs
from vix.errors import ConfigError, UserError
from vix.overrides import as_value, canonical, override_key, parse_override
from vix.runs.identity import run_name

QUICK_DATA = (*(o for o in TINY if o.startswith(("data.", "trainer.batch", "trainer.prec"))), "trainer.epochs=1")
QUICK = (*(override for override in TINY if not override.startswith(("experiment=", "trainer.epochs"))), "trainer.epochs=1")
CHOICES = {"experiment": None, "model": "vit", "attention": "nystrom", "embedding": "linear", "posenc": "learned"}


def results_below(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(directory.rglob("results.json")) if "previous-" not in str(path)]


# The command of a run


@pytest.mark.slow
def test_the_command_repeats_what_chose_the_config(tmp_path: Path, forked: Forked) -> None:
    """Directories of configs, the primary config and search paths are in the kept command, which then trains the same."""
    write_configs(tmp_path / "my configs", {"experiment/tiny": ON_DIGITS, "primary": "defaults: [config, _self_]\nseed: 5\n"})
    write_configs(tmp_path / "more", {"experiment/other": f"{ON_DIGITS}model: {{dim: 32}}"})
    starts = (
        ("--config-dir", "my configs", "--config-name=primary", *QUICK, "experiment=tiny"),
        (f"hydra.searchpath=[{tmp_path}/more]", *QUICK, "experiment=other", "hydra.run.dir='here, there'"),
    )
    for number, arguments in enumerate(starts):
        directory = tmp_path / str(number)
        directory.mkdir()
        if arguments[0] == "--config-dir":
            (directory / "my configs").symlink_to(tmp_path / "my configs")
        status, output = forked.run(directory, *arguments)
        assert status == 0, output
        (first,) = results_below(directory)
        assert f"To reproduce: {first['command']}" in output
        words = shlex.split(first["command"])
        assert words[:2] == ["python", "train.py"]
        elsewhere = tmp_path / f"{number} again"
        status, output = forked.run(elsewhere, *words[2:])
        assert status == 0, output
        (again,) = results_below(elsewhere)
        assert (first["config"].pop("rerun"), again["config"].pop("rerun")) == (False, True)
        same = ("seed", "experiment", "config", "train_loss", "top1", "command")
        assert {key: again[key] for key in same} == {key: first[key] for key in same}
    assert (tmp_path / "1" / "here, there" / "results.json").is_file()


@pytest.mark.slow
def test_the_command_of_a_sweeps_job_is_one_run(tmp_path: Path, forked: Forked) -> None:
    """Its files are found again; that it was in a sweep, and how that was started, is no part of it."""
    write_configs(tmp_path / "mine", {"experiment/tiny": ON_DIGITS})
    status, output = forked.run(
        tmp_path, "-cd", "mine", "-m", *QUICK, "experiment=tiny", "hydra.sweep.dir=runs", "fail_fast=true", "seed=1,2"
    )
    assert status == 0, output
    commands = [shlex.split(results["command"]) for results in results_below(tmp_path)]
    flags = ["python", "train.py", "--config-dir", str(tmp_path / "mine")]
    assert commands == [[*flags, *QUICK, "experiment=tiny", f"seed={seed}", "rerun=true"] for seed in (1, 2)]


def test_the_command_starts_as_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun with its processes, on one machine or several; flags that the program has by itself are left out."""
    job = compose_with_hydra(["experiment=vin", "trainer.resume=force"]).hydra
    job.mode = "RUN"
    overrides = ["experiment=vin", "trainer.resume=force"]
    assert reproduce_command(job, overrides) == "python train.py experiment=vin rerun=true"
    monkeypatch.setenv("VIX_PACKAGES", "mine,yours")
    assert reproduce_command(job, overrides) == "env VIX_PACKAGES=mine,yours python train.py experiment=vin rerun=true"
    monkeypatch.delenv("VIX_PACKAGES")
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert reproduce_command(job, overrides) == "torchrun --standalone --nproc-per-node=4 train.py experiment=vin rerun=true"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    start = "torchrun --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=node1:"
    assert reproduce_command(job, overrides).startswith(start)


@pytest.mark.slow
def test_every_entry_point_takes_the_same_flags(tmp_path: Path) -> None:
    """plan, summary and sweep.sh find configs where train.py finds them, and name a directory that is not there."""
    write_configs(tmp_path / "mine", {"experiment/tiny": f"{ON_DIGITS}model: {{dim: 24, depth: 1}}\nattention: {{heads: 2}}"})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=HANGS
        )

    for command in (
        (
            sys.executable,
            "-m",
            "vix",
            "plan",
            "--config-dir=mine",
            "experiment=tiny,quickstart",
            f"hydra.sweep.dir={tmp_path}/x",
        ),
        (str(ROOT / "sweep.sh"), "--plan", "-cd", "mine", "-m", "experiment=tiny,quickstart", f"hydra.sweep.dir={tmp_path}/x"),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
        assert "tiny/seed=0" in done.stdout
        assert "2 new" in done.stdout
    done = run(sys.executable, "-m", "vix", "summary", "experiment=tiny", "--config-dir", "mine")
    assert "1×24" in done.stdout, done.stderr
    done = run(sys.executable, "-m", "vix", "summary", "experiment=tiny", "--config-dir", "nowhere")
    assert done.stderr == "error: --config-dir nowhere: no such directory\n"


def test_flags_are_those_of_the_config(tmp_path: Path) -> None:
    """Also where only the composed config is at hand, as in a launcher's process."""
    write_configs(tmp_path, {"primary": "defaults: [config]\n"})
    for flags in (Flags(), Flags(str(tmp_path)), Flags(str(tmp_path), None, "primary")):
        assert flags_of(compose_with_hydra(["experiment=vin"], flags).hydra) == flags


# Hydra's grammar


def test_overrides_are_read_by_hydras_grammar() -> None:
    assert override_key("+model.dim=64") == override_key("++model.dim='64'") == override_key("~model.dim") == "model.dim"
    assert override_key("attention@extra=linear") == "attention"
    assert override_key("data.root='a=b@c'") == "data.root"
    assert canonical("+optimizer.lr=1e-3") == canonical("optimizer.lr=0.001") == "optimizer.lr=0.001"
    assert canonical("experiment='vin'") == "experiment=vin"
    assert canonical("x='3'") == "x='3'"  # a text, and no number
    assert canonical("x='a,b'") == "x='a,b'"
    assert canonical("x=[1, 2]") == "x=[1,2]"
    assert canonical("x=TRUE") == "x=true"
    assert canonical("~x") == canonical("~x=1") == "~x"
    assert canonical("what is this") == "what is this"
    assert canonical('x="a,b"') == canonical("x='a,b'") == canonical(r"x=a\,b") == "x='a,b'"
    assert canonical("x=''") == canonical("x=") == "x="


def test_values_go_through_hydras_grammar_and_back() -> None:
    """Quotes, commas, equals signs, brackets, interpolations and what looks like a number, also within lists."""
    plain = ("a=1,b", "[a,b]", "{a:1}", "a b", " a ", "3", "null", "true", "", "ü:é", "${seed}")
    texts = (*plain, "it's", 'say "x"', "\\", "a\\'b", "a,'b\"", "a\\")
    for value in (*texts, list(texts), {"key": list(texts)}, [[1, 2.5], {"a": None}], 1e-05, float("inf"), True, None):
        parsed = parse_override(f"x={as_value(value)}")
        assert not parsed.is_sweep_override()
        assert parsed.value() == value


def test_the_command_of_a_run_with_interpolations(tmp_path: Path, forked: Forked) -> None:
    """Absolute and relative ones, and of the environment: name, record and command have their values."""
    overrides = (
        "model.depth='${oc.decode:${oc.env:DEPTH}}'",
        "model.dim='${oc.decode:${.depth}6}'",
        "seed=${model.depth}",
        "attention={heads: 2}",
    )
    status, output = forked.run(tmp_path, "experiment=quickstart", *QUICK_DATA, *overrides, DEPTH="1")
    assert status == 0, output
    (results,) = results_below(tmp_path)
    given = ["model.depth=1", "model.dim=16", "seed=1", "attention={heads: 2}"]
    assert results["overrides"] == ["experiment=quickstart", *QUICK_DATA, *given]
    assert shlex.split(results["command"])[2:-1] == results["overrides"]
    assert "attention.heads=2" in results["name"]
    assert results["config"]["model"]["dim"] == 16


def test_one_run_has_one_directory_however_it_was_written() -> None:
    names = {
        run_name(CHOICES, overrides, 0)
        for overrides in (
            ["optimizer.lr=1e-3", "trainer.epochs=3"],
            ["trainer.epochs=3", "+optimizer.lr=0.001"],
            ["++optimizer.lr=0.0010", "trainer.epochs=3", "data.root='x=y'"],
            ["optimizer.lr=5", "optimizer.lr=1.0e-3", "trainer.epochs=3"],
        )
    }
    assert names == {"vit-nystrom-linear-learned,optimizer.lr=0.001,trainer.epochs=3/seed=0"}
    assert run_name({**CHOICES, "experiment": "vin"}, ["experiment='vin'"], 0) == "vin/seed=0"


@pytest.mark.parametrize(
    ("value", "directory"),
    [
        ('"a=1,x"', "a=1,x"),
        ("'with space'", "with space"),
        (r"a\,b", "a,b"),
        ("'it''s'", None),
        ("\"say 'hi'\"", "say 'hi'"),
        ("plain,", None),
        ("${oc.env:WHERE}/x", "there/x"),
    ],
)
def test_where_a_sweep_goes(value: str, directory: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotes, escapes and interpolations as Hydra reads them."""
    monkeypatch.setenv("WHERE", "there")
    command = parse_command(["-m", "seed=1,2", f"hydra.sweep.dir={value}"])
    if directory is None:
        with pytest.raises(HydraException):
            sweep_outputs(command)
    else:
        assert sweep_outputs(command) == Path(directory)


@pytest.mark.slow
def test_a_sweep_in_a_quoted_directory_is_reported(tmp_path: Path) -> None:
    """``./sweep.sh`` makes the report where the runs are, and leaves no other directory."""
    target = tmp_path / "a=1, x"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(ROOT / "sweep.sh"), *TINY, "trainer.epochs=1", "seed=0,1", f"hydra.sweep.dir='{target}'"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a=1, x"]
    assert {"report.md", "report.csv"} <= {path.name for path in target.iterdir()}


# Home directories


def test_a_home_directory_in_any_path(tmp_path: Path, forked: Forked, monkeypatch: pytest.MonkeyPatch) -> None:
    """In overrides with and without quotes, in files, in variables, in flags, and in what reads runs afterwards."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    write_configs(
        home / "configs",
        {"experiment/tiny": f"{ON_DIGITS}hydra: {{run: {{dir: ~/from file}}}}", "attention/x": "_target_: ~/no"},
    )
    monkeypatch.setenv("VIX_DATA", "~/images")
    assert compose(["data=cifar10"]).data.root == f"{home}/images"
    assert compose(["data=cifar10", "data.root='~/quoted'"]).data.root == f"{home}/quoted"
    assert compose(["data=cifar10", "data.root=~/plain"]).data.root == f"{home}/plain"
    assert compose(["data=cifar10", "data.root=~root/x"]).data.root == os.path.expanduser("~root/x") != "~root/x"
    assert compose(["data=cifar10", "data.root='a~b/~c'"]).data.root == "a~b/~c"
    cfg = compose_with_hydra(["hydra.sweep.dir=~/sweeps", "~recipe"], Flags("~/configs"))
    assert cfg.hydra.sweep.dir == f"{home}/sweeps"
    assert compose_with_hydra(["experiment=tiny"], Flags("~/configs")).hydra.run.dir == f"{home}/from file"
    assert compose_with_hydra(["experiment=tiny", "hydra.searchpath=['~/configs']"]).hydra.run.dir == f"{home}/from file"
    assert sweep_outputs(parse_command(["-m", "seed=1,2", "hydra.sweep.dir='~/sweeps'"])) == home / "sweeps"
    log_file = "hydra.job_logging.handlers.file.filename"
    assert OmegaConf.select(compose_with_hydra([f"{log_file}='~/x.log'"]), log_file) == f"{home}/x.log"


def test_the_home_of_an_unknown_user_is_refused(
    tmp_path: Path, forked: Forked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line that names the option, the variable or the flag; no directory gets that name."""
    path, what = "~nobody-here/x", "~nobody-here/x: there is no user nobody-here; a directory of that name is ./~nobody-here/x"
    write_configs(
        tmp_path,
        {
            "experiment/there": f"{ON_DIGITS}hydra: {{run: {{dir: {path}}}}}",
            "experiment/data": f"{ON_DIGITS}data: {{root: {path}}}",
        },
    )
    for overrides, named in (
        (["data=cifar10", f"data.root={path}"], "data.root"),
        (["data=cifar10", f"data.root='{path}'"], "data.root"),
        ([f"hydra.run.dir={path}"], "hydra.run.dir"),
        ([f"hydra.sweep.dir='{path}'"], "hydra.sweep.dir"),
        ([f"hydra.searchpath=[{path}]"], "hydra.searchpath"),
        (["experiment=there"], "hydra.run.dir"),
        (["experiment=data"], "data.root"),
    ):
        with pytest.raises(UserError) as refused:
            compose_with_hydra(overrides, Flags(str(tmp_path)))
        assert str(refused.value) == f"{named}={what}"
    with pytest.raises(UserError, match="there is no user nobody-here"):
        compose([], Flags(path))
    monkeypatch.setenv("VIX_DATA", path)
    with pytest.raises(ConfigError) as refused:
        parse(compose(["data=cifar10"]))
    assert str(refused.value) == f"data.root: VIX_DATA={what}"
    for command in (["report", path], ["report", f"--out={path}"], ["diff", path, path], ["replay", path]):
        monkeypatch.setattr(sys, "argv", ["vix", *command])
        with pytest.raises(SystemExit) as stop:
            run_command()
        assert stop.value.code == f"error: {what}"
    assert not capsys.readouterr().err
    for flags in ((f"--config-dir={path}",), ("-cd", path)):
        status, output = forked.run(tmp_path / flags[0][:4], *flags, *TINY)
        assert (status, output) == (2, f"error: {flags[0].partition('=')[0]}={what}\n")


def test_home_directories_within_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a choice of a sweep and as an item of a list; a ~ within quotes or a path is kept."""
    monkeypatch.setenv("HOME", "/home/me")
    for override, expanded in (
        ("data.root=~/a,~/b", "data.root='/home/me/a','/home/me/b'"),
        ("data.root=/x,~/b c", "data.root=/x,'/home/me/b c'"),
        ("data.root=~/a[1]", "data.root='/home/me/a[1]'"),
        ("hydra.searchpath=[~/a, ~/b]", "hydra.searchpath=['/home/me/a', '/home/me/b']"),
        ("data.root='~/a','x,~/b',~", "data.root='~/a','x,~/b','/home/me'"),
        ("data.root='a~b,~/c'", "data.root='a~b,~/c'"),
        ("~recipe", "~recipe"),
    ):
        assert expand_arguments([override]) == [expanded]
    for override, quoted in (  # characters that Hydra's grammar rejects, in a path
        ("data.root=/a/Photos (1)", "data.root='/a/Photos (1)'"),
        ("hydra.run.dir=x/seed=0,y", "hydra.run.dir='x/seed=0,y'"),
        ("data.root=/a/imgs[1]", "data.root='/a/imgs[1]'"),
        ("data.root=photos(1)", "data.root='photos(1)'"),
        ("trainer.init_from=outputs/vin,~recipe/seed=0", "trainer.init_from='outputs/vin,~recipe/seed=0'"),
        ("data.root=choice(a,b", "data.root=choice(a,b"),
        ("data.root=choice(a,b)", "data.root=choice(a,b)"),
        ("data.root=", "data.root="),
        ("model.dim=(1)", "model.dim=(1)"),
    ):
        assert expand_arguments([override]) == [quoted]
    assert expand_arguments(["-cd", "~/cfg", "--config-dir=~/cfg"]) == ["-cd", "/home/me/cfg", "--config-dir=/home/me/cfg"]


@pytest.mark.slow
def test_no_directory_is_named_tilde(tmp_path: Path) -> None:
    """A run and what reads it: none of them makes or looks for a directory with that name."""
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    (tmp_path / "home").mkdir()

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, *command]
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=HANGS)

    done = run(str(ROOT / "train.py"), *TINY, "trainer.epochs=1", "hydra.run.dir=~/run")
    assert done.returncode == 0, done.stderr
    for command in (
        ("-m", "vix", "report", "~/run", "--out=~/report"),
        ("-m", "vix", "diff", "~/run", "~/run"),
        ("-c", "import vix; print(vix.load_model('~/run'))"),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    assert "home/run contains no nonfinite.pt" in run("-m", "vix", "replay", "~/run").stderr
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
    assert {path.name for path in (tmp_path / "home").iterdir()} >= {"run", "report"}


# Modes and names


@pytest.mark.slow
def test_a_sweep_in_a_file_is_a_sweep(tmp_path: Path, forked: Forked) -> None:
    """``hydra.mode: MULTIRUN`` and parameters in an experiment: table, fail_fast, exit status and plan as with -m."""
    hydra_keys = "hydra: {mode: MULTIRUN, sweeper: {params: {attention.landmarks: '8,1000,16'}}}"
    nystrom = f"{ON_DIGITS}  - override /attention: nystrom\n{hydra_keys}\n"
    write_configs(tmp_path / "mine", {"experiment/sweep": f"{nystrom}fail_fast: true", "experiment/all": nystrom})
    flags = ("--config-dir", str(tmp_path / "mine"), *QUICK)
    status, output = forked.run(tmp_path / "one", *flags, "experiment=sweep")
    assert status == 1
    states = [row[1] for row in table_after(output, "jobs of this sweep") if len(row) > 2 and row[1]]
    assert states == ["finished", "refused", "not run"]
    assert "error: 2 of this sweep's jobs did not finish" in output
    jobs = plan([*QUICK, "experiment=all"], flags=Flags(str(tmp_path / "mine")))
    assert [job.state for job in jobs] == ["new", "refused", "new"]
    status, output = forked.run(tmp_path / "two", *flags, "experiment=all", "attention.landmarks=8")  # the command line wins
    assert (status, output.count("finished")) == (0, 1)


@pytest.mark.slow
def test_a_list_of_experiments_has_its_own_directory(tmp_path: Path, forked: Forked) -> None:
    write_configs(
        tmp_path / "mine" / "experiment",
        {"a": ON_DIGITS, "b": "# @package _global_\nmodel: {depth: 2}", "c": "# @package _global_\nseed: 3"},
    )
    for names in ("a,b", "a,c", "a"):
        status, output = forked.run(tmp_path, "--config-dir=mine", f"experiment=[{names}]", *QUICK, "model.dim=16")
        assert status == 0, output
    results = {r["experiment"]: r for r in results_below(tmp_path)}
    assert set(results) == {"a+b", "a+c", "a"}
    assert {r["name"].partition(",")[0] for r in results.values()} == {"a+b", "a+c", "a"}
    assert results["a+c"]["name"].endswith("/seed=3")


@pytest.mark.slow
def test_names_are_short_enough_for_any_file_system(tmp_path: Path, forked: Forked) -> None:
    """Bytes count: wide characters, long experiments, long seeds."""
    wide = "視覚" * 20
    for choices, overrides, seed in (
        (CHOICES, [f"+data.name='{wide * 4}'"], 0),
        ({**CHOICES, "experiment": wide * 5}, [], 0),
        (CHOICES, [], 10**400),
        (CHOICES, [], "../../x"),
    ):
        parts = run_name(choices, overrides, seed).split("/")
        assert len(parts) == 2
        assert all(0 < len(part.encode()) <= 200 for part in parts)
        assert ".." not in parts
    one, other = (run_name({**CHOICES, "experiment": wide * 5 + end}, [], 0) for end in "ab")
    assert one != other
    write_configs(tmp_path / "mine" / "experiment", {wide: ON_DIGITS})
    status, output = forked.run(tmp_path, "--config-dir=mine", f"experiment='{wide}'", *QUICK)
    assert status == 0, output
    status, output = forked.run(tmp_path, "-m", *TINY, f"seed={10**300},-1")
    assert status == 1
    assert "File name too long" not in output


def test_a_text_where_a_number_belongs() -> None:
    """In words for users, also where the constructor takes a tensor, too."""
    with pytest.raises(ConfigError) as refused:
        parse(compose(["optimizer.lr='1e-3'"]))
    assert str(refused.value) == (
        "optimizer.lr=1e-3: input should be a valid number "
        "(this is text; remove the quotes, or write ${oc.decode:${oc.env:NAME}} for a variable)"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["experiment=null"],
            "experiment=null: the value is the name of a file in conf/experiment/; leave it out, or use ~experiment",
        ),
        (["logger=null"], "logger=null: the value is the name of a file in conf/logger/; choose one of them"),
        (["attention=nystrom.yaml"], "attention=nystrom.yaml: use the name without ending: attention=nystrom"),
        (["experiment=vin.yaml"], "experiment=vin.yaml: use the name without ending: experiment=vin"),
        (
            ["experiment=true"],
            "experiment=true: the value is the name of a file in conf/experiment/; a name such as true needs quotes: "
            "\"experiment='true'\"",
        ),
        (["experiment=1"], "experiment=1: the value is the name of a file in conf/experiment/; a name such as 1 needs quotes"),
        (["+experiment=vit"], "+experiment=vit: an option of experiment is already chosen; remove the + to replace it"),
        (["-m", "experiment=glob(quikstart*)"], "experiment=glob(quikstart*): matches nothing, so there is no run"),
        (["-m", "seed=1,2", "hydra.sweeper.max_batch_size=1"], "hydra.sweeper.max_batch_size: Hydra drops all jobs after"),
        (["-m", "attention=softmax,linear", "seed=range(3,0)"], "seed=range(3,0): has no values, so there is no run"),
    ],
    ids=str,
)
def test_choices_that_are_no_names(tmp_path: Path, forked: Forked, words: list[str], message: str) -> None:
    status, output = forked.run(tmp_path, *words)
    assert status == 1
    assert output.splitlines()[-1].startswith(f"error: {message}")


def test_the_cause_of_an_error_is_reported_only_for_errors_of_libraries() -> None:
    cause = PermissionError(13, "Permission denied")
    for error, replaced in ((ValueError("no handler"), True), (ConfigError("mine.yaml: cannot be read"), False)):
        error.__cause__ = cause
        assert os_error(error) is (cause if replaced else error)


def test_directories_of_runs_need_no_quotes() -> None:
    """Although Hydra's grammar takes no second equals sign."""
    assert compose(["data.root=runs/seed=1"]).data.root == "runs/seed=1"
    assert compose([r"data.root=runs/seed\=1"]).data.root == "runs/seed=1"  # Hydra's own way
    cfg = compose_with_hydra(["hydra.run.dir=runs/a,b/seed=1", "hydra.sweep.subdir=seed=${seed}", "seed=3"])
    assert cfg.hydra.run.dir == "runs/a,b/seed=1"
    assert cfg.hydra.sweep.subdir == "seed=3"
