"""``pip install -e .`` and the command ``vix``."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import HANGS, ROOT

from vix.__main__ import COMMANDS, main


def run(*command: str, directory: Path) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_editable_installation(tmp_path: Path) -> None:
    """Its dependencies and extras are those of the requirements files, and its command works in any directory."""
    run(sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", "venv", directory=tmp_path)
    python = str(tmp_path / "venv" / "bin" / "python")
    # The packages of the environment that runs the tests, so that nothing is downloaded.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    install = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet", "-e", str(ROOT))
    run(python, *install, directory=tmp_path)
    vix = str(tmp_path / "venv" / "bin" / "vix")
    assert all(command in run(vix, directory=tmp_path) for command in COMMANDS)
    assert run(vix, "plan", "experiment=quickstart", directory=tmp_path).startswith("Plan")
    show = "import importlib.metadata as m; print(*m.requires('vision-xformers'), sep='\\n')"
    required = run(python, "-c", show, directory=tmp_path).splitlines()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    files = {"": "requirements.txt", **{extra: entry["file"][0] for extra, entry in extras.items()}}
    for extra, file in files.items():
        names = {name(line) for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")}
        of_extra = {name(line) for line in required if (f'extra == "{extra}"' in line if extra else "extra ==" not in line)}
        assert of_extra == names, extra


def name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found
    return found[0].lower().replace("_", "-")


def test_an_interrupted_command_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vix.cli.diff.main", interrupt)
    monkeypatch.setattr(sys, "argv", ["vix", "diff", "a", "b"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["nosuch"]])
def test_the_table_of_commands(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "vix", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if arguments == ["nosuch"] else 0)
    text = done.stderr if arguments == ["nosuch"] else done.stdout
    assert all(command in text for command in COMMANDS)
    assert "Traceback" not in done.stderr
