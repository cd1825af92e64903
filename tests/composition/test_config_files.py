"""Shared config files set the program's options and run nothing; mistakes in them are named with file and line."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from common import ON_DIGITS, table_after, write_configs
from conftest import TINY, run_train
from forked import Forked
from hydra.errors import HydraException

import vix
from vix.cli.plan import plan
from vix.composition.command import CONFIG_DIR, Flags
from vix.composition.compose import compose, compose_with_hydra, format_error
from vix.errors import ConfigError

QUICK = tuple(override for override in TINY if not override.startswith("experiment="))


def global_file(content: str) -> str:
    return f"{ON_DIGITS}{content}\n"


# What a file of a group may not set: the file, and what the message names. PROGRAM creates the file `executed` when it runs.
FORBIDDEN = {
    "env_set": ("hydra: {job: {env_set: {CXX: PROGRAM}}}", "hydra.job.env_set"),
    "env_copy": ("hydra: {job: {env_copy: [HOME]}}", "hydra.job.env_copy"),
    "chdir": ("hydra: {job: {chdir: true}}", "hydra.job.chdir"),
    "name": ("hydra: {job: {name: ../../x}}", "hydra.job.name"),
    "callbacks": ("hydra: {callbacks: {x: {_target_: subprocess.Popen, args: [PROGRAM]}}}", "hydra.callbacks"),
    "job_logging": ("hydra: {job_logging: {handlers: {x: {(): subprocess.Popen, args: [PROGRAM]}}}}", "hydra.job_logging"),
    "hydra_logging": ("hydra: {hydra_logging: {handlers: {x: {class: logging.FileHandler}}}}", "hydra.hydra_logging"),
    "launcher": ("hydra: {launcher: {_target_: subprocess.Popen, args: [PROGRAM]}}", "hydra.launcher"),
    "sweeper": ("hydra: {sweeper: {_target_: subprocess.Popen, args: [PROGRAM]}}", "hydra.sweeper._target_"),
    "searchpath": ("hydra: {searchpath: [/tmp]}", "hydra.searchpath"),
    "output_subdir": ("hydra: {output_subdir: ../../x}", "hydra.output_subdir"),
    "whole_node": ("hydra: ${model}", "hydra"),
    "params_node": ("hydra: {sweeper: {params: '${attention}'}}", "hydra.sweeper.params"),
    "params_env": ("hydra: {sweeper: {params: {+hydra.job.env_set.CXX: PROGRAM}}}", "hydra.sweeper.params"),
    "params_dict": ("hydra: {sweeper: {params: {++hydra: '{job:{env_set:{CXX:PROGRAM}}}'}}}", "hydra.sweeper.params"),
    "params_group": ("hydra: {sweeper: {params: {hydra/launcher: joblib}}}", "hydra.sweeper.params"),
    "params_package": ("hydra: {sweeper: {params: {+attention@hydra.job: linear}}}", "hydra.sweeper.params"),
    "another_key": ("callbacks: {x: 1}", "callbacks: unknown key"),
    "tag": ("model: {dim: !!python/object/apply:os.system [PROGRAM]}", "python/object/apply"),
    "defaults_group": ("# @package _global_\ndefaults: [override /hydra/launcher: joblib]", "/hydra/launcher"),
    "defaults_added": ("# @package _global_\ndefaults: [/hydra/callbacks: evil]", "/hydra/callbacks"),
    "defaults_file": ("# @package _global_\ndefaults: [/hydra/callbacks/evil]", "/hydra/callbacks/evil"),
    "defaults_package": ("# @package _global_\ndefaults: [/variables@hydra.job.env_set: cxx]", "hydra.job.env_set"),
    "defaults_here": ("# @package _global_\ndefaults: [/variables@_global_.hydra.job.env_set: cxx]", "hydra.job.env_set"),
    "defaults_outside": ("# @package _global_\ndefaults: [/attention/../../secret]", "outside of the group's directory"),
    "option_outside": (
        "# @package _global_\ndefaults: [override /attention: ../hydra/callbacks/evil]",
        "outside of the group's directory",
    ),
    "package": ("# @package hydra.job\nenv_set: {CXX: PROGRAM}", "hydra.job.env_set"),
    "package_whole": ("# @package hydra\njob: {env_set: {CXX: PROGRAM}}", "hydra.job.env_set"),
    "includes": ("# @package _global_\ndefaults: [env_set]", "hydra.job.env_set"),
    "includes_root": ("# @package _global_\ndefaults: [/root]", "hydra.job.env_set"),
}


@pytest.mark.slow
def test_no_shared_file_runs_a_program(tmp_path: Path, forked: Forked) -> None:
    """Every way is refused with file and key before anything of it takes effect, in a sweep in which a good run finishes."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    files = {name: text if text.startswith("#") else global_file(text) for name, (text, _) in FORBIDDEN.items()}
    mine = tmp_path / "mine"
    write_configs(mine / "experiment", {name: text.replace("PROGRAM", str(program)) for name, text in files.items()})
    write_configs(
        mine,
        {
            "experiment/good": ON_DIGITS,
            "variables/cxx": f"CXX: {program}",
            "root": f"hydra: {{job: {{env_set: {{CXX: {program}}}}}}}",
        },
    )
    write_configs(mine, {"hydra/callbacks/evil": f"x: {{_target_: subprocess.Popen, args: [{program}]}}"})
    status, output = forked.run(
        tmp_path, "--config-dir", "mine", "-m", *QUICK, "trainer.epochs=1", f"experiment={','.join(FORBIDDEN)},good"
    )
    assert status == 1
    assert f"error: {len(FORBIDDEN)} of this sweep's jobs did not finish" in output
    assert not (tmp_path / "executed").exists()
    by_experiment = {results["experiment"]: results for results in map(read, tmp_path.glob("outputs/*/*/results.json"))}
    assert by_experiment.pop("good")["status"] == "finished"
    assert set(by_experiment) == set(FORBIDDEN)
    for name, (_, key) in FORBIDDEN.items():
        results = by_experiment[name]
        assert results["status"] == "refused", name
        assert key in results["error"], results["error"]
        named = {"includes": "env_set", "includes_root": "root"}.get(name, f"experiment/{name}")
        assert f"{named}.yaml" in results["error"], results["error"]
        assert "\n" not in results["error"]


def read(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text())
    return results


@pytest.mark.slow
def test_an_experiment_names_no_compiler(tmp_path: Path) -> None:
    """A file cannot set CXX for a compiled step; the command line can."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\nexit 1\n")
    compiler.chmod(0o755)
    write_configs(tmp_path / "mine" / "experiment", {"evil": global_file(f"hydra: {{job: {{env_set: {{CXX: {compiler}}}}}}}")})
    compiled = (*QUICK, "trainer.epochs=1", "trainer.compile=true")
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    refused = run_train(tmp_path, "--config-dir", "mine", *compiled, "experiment=evil", **cache)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert "evil.yaml:5: hydra.job.env_set: a file of a group may not set this" in refused.stderr
    assert not (tmp_path / "executed").exists()
    # In a new interpreter, because PyTorch reads CXX when its compiler is imported.
    run_train(tmp_path, *compiled, "experiment=quickstart", f"+hydra.job.env_set.CXX={compiler}", fresh=True, **cache)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "options",
    [
        "{dim_head: {_target_: subprocess.Popen, args: [PROGRAM]}}",
        "{_target_: subprocess.Popen, args: [PROGRAM]}",
        "{_args_: [PROGRAM]}",
        "{_partial_: true}",
        "{_target_: vix.system.files.os.system, command: PROGRAM}",
        "{heads: '${oc.env:NOT_SET}'}",
    ],
)
def test_no_option_is_a_program(tmp_path: Path, options: str) -> None:
    """``_target_`` and its like inside an option, and what an interpolation cannot find."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    program.chmod(0o755)
    write_configs(tmp_path, {"experiment/mine": global_file(f"attention: {options}".replace("PROGRAM", str(program)))})
    cfg = compose(["experiment=mine"], Flags(str(tmp_path)))
    with pytest.raises(ConfigError, match=r"attention"):
        vix.build_model(cfg)
    assert not (tmp_path / "executed").exists()


def test_files_of_any_group_are_checked(tmp_path: Path, forked: Forked) -> None:
    """A recipe, an attention, a group of the user's own, and a file that takes the place of Hydra's own."""
    write_configs(
        tmp_path / "mine",
        {
            "recipe/evil": "# @package _global_\nhydra: {job: {env_set: {A: b}}}",
            "attention/evil": "# @package hydra.job\nenv_set: {A: b}",
            "own/evil": "# @package _global_\nhydra: {job: {env_set: {A: b}}}",
            "own/good": "# @package _global_\nmodel: {depth: 3}",
        },
    )
    flags = ("--config-dir=mine", *TINY)
    for override in ("recipe=evil", "attention=evil", "+own=evil"):
        status, output = forked.run(tmp_path / override, f"--config-dir={tmp_path}/mine", *TINY, override)
        assert status == 1
        assert "evil.yaml:2: hydra.job.env_set" in output
        assert not (tmp_path / override / "outputs").exists()
    assert compose([*TINY, "+own=good"], Flags(str(tmp_path / "mine"))).model.depth == 1  # the command line's
    assert compose(["+own=good"], Flags(str(tmp_path / "mine"))).model.depth == 3
    for name in ("hydra/launcher/basic", "hydra/config"):
        write_configs(tmp_path / "mine", {name: "_target_: subprocess.Popen"})
        status, output = forked.run(tmp_path, *flags)
        assert status == 1
        assert f"{name}.yaml: would replace Hydra's own {name}; give it another name" in output


def test_what_stays_free(tmp_path: Path) -> None:
    """The command line, a primary config, and files of hydra/ that are chosen; in any file the harmless keys of Hydra."""
    params = "{seed: '1,2', experiment: cct}"
    hydra_keys = f"{{run: {{dir: there}}, sweep: {{dir: here, subdir: x}}, sweeper: {{params: {params}}}, mode: MULTIRUN}}"
    write_configs(
        tmp_path,
        {
            "primary": "defaults: [config, override hydra/job_logging: none, _self_]\nhydra: {job: {env_set: {A: b}}}",
            "hydra/launcher/mine": "defaults: [basic]",
            "experiment/harmless": global_file(f"seed: 7\nhydra: {hydra_keys}"),
        },
    )
    flags = Flags(str(tmp_path))
    assert compose_with_hydra(["+hydra.job.env_set.A=b"]).hydra.job.env_set == {"A": "b"}
    primary = compose_with_hydra([], Flags(str(tmp_path), config_name="primary")).hydra
    assert (primary.job.env_set, primary.runtime.choices["hydra/job_logging"]) == ({"A": "b"}, "none")
    assert compose_with_hydra(["hydra/launcher=mine"], flags).hydra.runtime.choices["hydra/launcher"] == "mine"
    harmless = compose_with_hydra(["experiment=harmless"], flags)
    assert (harmless.seed, harmless.hydra.run.dir, harmless.hydra.sweep.dir) == (7, "there", "here")
    assert harmless.hydra.sweeper.params.seed == "1,2"


# Mistakes in YAML: the content of an experiment file, and what the message has after the file's name.
MISTAKES: dict[str, tuple[str | bytes, str]] = {
    "tab": ("# @package _global_\nmodel:\n\tdim: 64\n", ":3: indented with a tab; YAML requires spaces"),
    "late_tab": ("# @package _global_\nmodel:\n  dim: 64\n\tdepth: 2\n", ":4: indented with a tab"),
    "colon": ("# @package _global_\nmodel:\n  dim 64\n", ":3: model: text (dim 64) where options are expected"),
    "colon_before": ("# @package _global_\nmodel:\n  dim 64\n  depth: 2\n", ":3: a colon is missing (key: value): dim 64"),
    "colon_after": ("# @package _global_\nmodel:\n  depth: 2\n  dim 64\n", ":4: a colon is missing (key: value): dim 64"),
    "colon_on_top": ("# @package _global_\nmodel\n  depth: 2\n", ":2: a colon is missing (key: value): model"),
    "space": ("# @package _global_\nmodel:\n  dim:64\n", ":3: model: text (dim:64) where options are expected"),
    "nothing_below": ("# @package _global_\nmodel:\ntrainer:\n  epochs: 2\n", ":2: model: nothing where options are expected"),
    "indent": ("# @package _global_\nmodel:\n  dim: 64\n   depth: 2\n", ":4: a key is not allowed here"),
    "bracket": ("# @package _global_\nmodel: {dim: [1, 2}\n", ":2: invalid YAML"),
    "empty": ("", ": the file is empty"),
    "blank": ("\n  \n\n", ": the file is empty"),
    "no_package": ("model:\n  dim: 64\n", ":1: the first line must be '# @package _global_'"),
    "late_package": ("# Mine\n# @package _global_\nmodel:\n  dim: 64\n", ":1: the first line must be '# @package _global_'"),
    "list": ("# @package _global_\n- model\n- dim\n", ":2: a list where keys are expected"),
    "text": ("# @package _global_\nmodel dim 64\n", ":2: text where keys are expected"),
    "inner_list": ("# @package _global_\nmodel:\n  - dim: 64\n", ":3: model: a list where options are expected"),
    "twice": ("# @package _global_\nmodel:\n  dim: 64\n  dim: 32\n", ":4: dim is set twice, first on line 3"),
    "bom": ("\ufeff# @package _global_\nmodel:\n  dim: 64\n".encode(), ":1: starts with a byte-order mark"),
    "latin1": ("# @package _global_\n# für\nseed: 0\n".encode("latin1"), ":2: not UTF-8 text (byte 0xfc)"),
    "utf16": ("# @package _global_\nseed: 0\n".encode("utf-16"), ":1: not UTF-8 text"),
    "control": ("# @package _global_\nseed: \x01\n", ":2: the character U+0001"),
    "no_override": (
        "# @package _global_\ndefaults:\n  - /attention: performer\n",
        ":3: defaults: '/attention: performer' must be 'override /attention: performer'",
    ),
    "no_slash": (
        "# @package _global_\ndefaults:\n  - override attention: performer\n",
        "must be 'override /attention: performer'",
    ),
    "neither": ("# @package _global_\ndefaults:\n  - attention: performer\n", "must be 'override /attention: performer'"),
    "equals": (
        "# @package _global_\ndefaults:\n  - override /attention=performer\n",
        "must be 'override /attention: performer'",
    ),
    "option": ("# @package _global_\ndefaults:\n  - override /attention: performr\n", "nearest: performer"),
    "defaults": ("# @package _global_\ndefaults:\n  override /attention: performer\n", ":3: defaults: a list is expected"),
    "two_documents": ("# @package _global_\nseed: 0\n---\nseed: 1\n", ":3: invalid YAML"),
    "recipe": (
        "# @package _global_\ndefaults:\n  - /recipe: modern\n",
        ":3: defaults: '/recipe: modern' must be 'override /recipe: modern'",
    ),
    "own_group": (
        "# @package _global_\ndefaults:\n  - /experiment: vin\n",
        ":3: defaults: '/experiment: vin' must be '/experiment/vin'",
    ),
    "own_override": ("# @package _global_\ndefaults:\n  - override /experiment: vin\n", "must be '/experiment/vin'"),
    "no_group": (
        "# @package _global_\ndefaults:\n  - override /attentoin: linear\n",
        ":3: defaults: /attentoin: there is no such group; nearest: attention",
    ),
    "no_file": (
        "# @package _global_\ndefaults:\n  - /experiment/vim\n",
        ":3: defaults: experiment/vim: there is no such file; nearest: vi",
    ),
    "itself": (
        "# @package _global_\ndefaults:\n  - mine\n",
        ":3: defaults: the files include one another in a circle (experiment/mine → experiment/mine)",
    ),
    "group_twice": (
        "# @package _global_\ndefaults:\n  - override /attention: linear\n  - override /attention: fourier\n",
        ":3: defaults: attention is listed twice",
    ),
    "braces": (
        "# @package _global_\nmodel: {dim: ${model.depth}}\n",
        ":2: within brackets or braces, ${…} and ??? need quotes",
    ),
    "interpolation": ("# @package _global_\nmodel:\n  dim: ${model.depth\n", ":3: ${model.depth: invalid interpolation"),
    "alias": ("# @package _global_\nmodel: &a\n  dim: *a\n", "an alias"),
    "key": ("# @package _global_\nmodle:\n  dim: 64\n", ":2: modle: unknown key; nearest: model"),
}


@pytest.mark.parametrize(("content", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named_with_their_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    write_configs(tmp_path, {"experiment/mine": content})
    with pytest.raises(ConfigError) as refused:
        compose(["experiment=mine"], Flags(str(tmp_path)))
    assert str(refused.value).startswith(f"{tmp_path}/experiment/mine.yaml")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_what_is_circular_is_named(tmp_path: Path, forked: Forked) -> None:
    """Files that include one another, and values that refer to one another: in one line with the file, and nothing is made."""
    write_configs(
        tmp_path / "mine" / "experiment",
        {
            "a": "# @package _global_\ndefaults:\n  - /experiment/b\n",
            "b": "# @package _global_\ndefaults:\n  - c@_global_\n",
            "c": "# @package _global_\ndefaults:\n  - /experiment/a\n",
            "value": global_file("optimizer:\n  lr: ${.weight_decay}\n  weight_decay: ${optimizer.lr}"),
            "node": global_file("model: ${attention}\nattention: ${model}"),
            "inner": global_file("trainer:\n  warmup_epochs: ${trainer}"),
            "seed": global_file("seed: ${seed}"),
            "nothing": global_file("optimizer:\n  lr: ${nothing.there}"),
        },
    )
    messages = {
        "a": "c.yaml:3: defaults: the files include one another in a circle (experiment/c → experiment/a → experiment/b → ",
        "value": "optimizer.lr: its value refers to itself (set in ",
        "inner": "trainer.warmup_epochs: its value refers to itself (set in ",
        "node": "model: text (${attention}) where options are expected",
        "seed": "seed: its value refers to itself",
        "nothing": "optimizer.lr: Interpolation key 'nothing.there' not found (set in ",
    }
    jobs = plan([*QUICK, f"experiment={','.join(messages)}"], flags=Flags(str(tmp_path / "mine")))
    for job, message in zip(jobs, messages.values(), strict=True):
        assert (job.state, message in job.reason) == ("refused", True), job.reason
    for experiment in ("a", "value", "seed"):
        status, output = forked.run(tmp_path / experiment, "--config-dir=../mine", *QUICK, f"experiment={experiment}")
        assert status == 1
        assert "Traceback" not in output
        assert output.splitlines()[-1].startswith("error: ")
        assert messages[experiment] in output.splitlines()[-1]
        assert [path.name for path in (tmp_path / experiment).iterdir()] == ["out"]


def test_files_that_hydra_cannot_combine_are_named(tmp_path: Path) -> None:
    """A group that two files choose, a circle through choices of the command line, and files that do not exist."""
    mine = Path(tmp_path, "mine")
    write_configs(
        mine,
        {
            "twice": "defaults: [config, model: vit, _self_]",
            "absent": "defaults: [config, other, _self_]",
            "experiment/two": global_file("").replace("defaults:\n", "defaults:\n  - /variant: a\n"),
            "variant/a": "# @package _global_\ndefaults: [/variant: b]",
            "variant/c": "# @package _global_\ndefaults: [/more: x]",
            "more/x": "# @package _global_\nseed: 1",
            "more/y": "# @package _global_\ndefaults: [/variant: c]",
        },
    )
    write_configs(tmp_path, {"mine/variant/b": "# @package _global_\nseed: 2", "mine/experiment/z": ON_DIGITS})
    (mine / "experiment/z.yaml").rename(mine / "experiment/z.yml")
    for arguments, name, message in (
        (
            [],
            "twice",
            f"an option of model is chosen more than once ({mine}/twice.yaml, {CONFIG_DIR}/config.yaml); all but the",
        ),
        ([], "absent", f"{mine}/absent.yaml: defaults: Could not load 'other'."),
        (
            ["experiment=two"],
            None,
            f"an option of variant is chosen more than once ({mine}/experiment/two.yaml, {mine}/variant/a.yaml)",
        ),
        (["+variant=c", "more=y"], None, f"some include one another in a circle: {mine}/variant/c.yaml, {mine}/more/y.yaml"),
        (["experiment=z"], None, f"experiment=z: the name of {mine}/experiment/z.yml must end in .yaml"),
        (["hydra.mode=FOO"], None, "hydra.mode=FOO: Invalid value 'FOO', expected one of"),
        (["seed=1,2"], None, "seed=1,2: several values start a sweep with -m"),
        (["seed=("], None, "seed=(: not in the form key=value; a value with special characters needs two kinds of quotes"),
    ):
        flags = Flags(str(mine), None, name)
        with pytest.raises((HydraException, ConfigError)) as refused:
            compose(arguments, flags)
        assert message in format_error(refused.value, arguments, flags)


@pytest.mark.slow
def test_the_file_of_a_refused_value_is_named(tmp_path: Path, forked: Forked) -> None:
    """In train.py and the plan; of a value on the command line there is no file."""
    write_configs(tmp_path / "mine", {"experiment/odd": global_file("attention:\n  # of 16\n  heads: 3")})
    file, arguments = tmp_path / "mine/experiment/odd.yaml", ("experiment=odd", "model.dim=16")
    for given, end in (((), f" (set in {file}:7)"), (("attention.heads=3",), "")):
        message = f"attention.heads=3 does not divide the width 16; nearest that do: 2, 4{end}"
        status, output = forked.run(tmp_path / f"runs{len(end)}", f"--config-dir={tmp_path}/mine", *arguments, *given)
        assert (status, output.splitlines()[-1]) == (1, f"error: {message}")
        (job,) = plan([*arguments, *given], flags=Flags(str(tmp_path / "mine")))
        assert job.reason == message


@pytest.mark.slow
def test_the_good_jobs_of_a_sweep_run(tmp_path: Path, forked: Forked) -> None:
    """Jobs whose files are broken, absent, or lack an option that was set are refused in the sweep's table."""
    broken = {name: MISTAKES[name][0] for name in ("tab", "no_override")}
    write_configs(tmp_path / "mine" / "experiment", {**broken, "good": ON_DIGITS})
    flags = ("--config-dir", "mine", "-m", *QUICK, "trainer.epochs=1")
    status, output = forked.run(tmp_path, *flags, "experiment=tab,no_override,absent,quickstart,good", "seed=3")
    assert status == 1
    assert "error: 3 of this sweep's jobs did not finish" in output
    assert "Traceback" not in output
    rows = {row[0]: row[1] for row in table_after(output, "jobs of this sweep") if len(row) > 2 and row[1]}
    assert rows == {
        "tab": "refused",
        "no_override": "refused",
        "absent": "refused",
        "quickstart": "finished",
        "good": "finished",
    }
    by_experiment = {results["experiment"]: results for results in map(read, tmp_path.glob("outputs/*/seed=3/results.json"))}
    assert f"{tmp_path}/mine/experiment/tab.yaml:3: indented with a tab" in by_experiment["tab"]["error"]
    assert "experiment=absent: conf/experiment/ has no such file" in by_experiment["absent"]["error"]


def test_a_mistake_in_any_file_is_one_line(tmp_path: Path, forked: Forked) -> None:
    write_configs(
        tmp_path / "mine",
        {"experiment/tab": MISTAKES["tab"][0], "attention/empty": "", "primary": "defaults: [config]\nseed 3\n"},
    )
    flags = f"--config-dir={tmp_path}/mine"
    for arguments, named in (
        (("experiment=tab",), "experiment/tab.yaml:3: indented with a tab"),
        (("attention=empty",), "attention/empty.yaml: the file is empty"),
        (("--config-name=primary",), "primary.yaml:2: a colon is missing"),
    ):
        status, output = forked.run(tmp_path / named.split("/")[0], flags, *TINY, *arguments)
        assert status == 1
        line = output.splitlines()
        assert len(line) == 1, output
        assert line[0].startswith("error: ")
        assert named in line[0]


def test_sources_of_any_kind_are_read(tmp_path: Path) -> None:
    """An unreadable file is named, too."""
    write_configs(tmp_path, {"experiment/secret": ON_DIGITS})
    if os.geteuid() == 0:
        (tmp_path / "experiment" / "secret.yaml").unlink()
        (tmp_path / "experiment" / "secret.yaml").symlink_to("/proc/self/mem")
    else:
        (tmp_path / "experiment" / "secret.yaml").chmod(0)
    with pytest.raises(Exception, match=r"secret\.yaml: "):
        compose(["experiment=secret"], Flags(str(tmp_path)))
