"""The benchmarks run, and what they compare is the same model."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HANGS, ROOT
from omegaconf import DictConfig
from torch import nn

from benchmarks import everything
from benchmarks import record as records
from benchmarks.crossover import crossover, sentence
from benchmarks.everything import KINDS, UNFINISHED, Piece, join_side_by_side, kept
from benchmarks.measure import traffic
from benchmarks.packages import package_model
from benchmarks.record import hardware
from benchmarks.rows import estimated_bytes
from benchmarks.scaling import MIXERS, expected
from benchmarks.variants import MODELS, skeleton
from benchmarks.waiting import QUICK
from vix import build_model
from vix.errors import UserError
from vix.models.counts import training_flops
from vix.runs.results import published_rows


def run_benchmark(module: str, out: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """``python -m MODULE`` in its quick setting, on the CPU."""
    command = [sys.executable, "-m", module, "--quick", "--device", "cpu", "--threads", "1", "--out", str(out), *arguments]
    environment = {**os.environ, **env}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS, env=environment, check=False)


def measured(module: str, out: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark prints and what it writes."""
    done = run_benchmark(module, out, *arguments)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["device"]["type"] == "cpu"
    assert record["versions"]["torch"] == torch.__version__
    assert record["git_commit"]
    return done.stdout, record


@pytest.mark.slow
def test_side_by_side(tmp_path: Path) -> None:
    """Ratios are the quotients of what was measured, and their geometric mean is printed."""
    shown, record = measured("benchmarks", tmp_path / "r.json", "--models", "vil", "window", "--batch", "2")
    assert not record["refused"]
    for row in record["rows"]:
        (costs,) = row["rounds"]
        for kind in ("package", "paper"):
            assert row[f"ours_speed_over_{kind}"] == pytest.approx(costs[kind]["seconds"] / costs["ours"]["seconds"])
            for own in ("ours", "full"):
                assert row[f"{own}_memory_over_{kind}"] == costs[own]["allocated"] / costs[kind]["allocated"]
        assert costs["full"]["allocated"] < costs["ours"]["allocated"]
        assert all(0 < row[kind]["of_matmul_ceiling"] < 1 for kind in ("ours", "package", "paper"))
    (mean,) = record["means"]
    first, second = (row["ours_speed_over_package"] for row in record["rows"])
    assert mean["ours_speed_over_package"] == pytest.approx((first * second) ** 0.5)
    assert "geometric mean" in shown


SCALED = ("softmax", "window", "mamba2", "identity")


@pytest.mark.slow
def test_scaling(tmp_path: Path) -> None:
    """Two sizes of some mixers, a picture, and a sentence about each; a third size, too large for memory, is skipped."""
    arguments = ("--tokens", "64", "256", "4194304", "--most-gb", "2", "--mixers", *SCALED)
    shown, record = measured("benchmarks.scaling", tmp_path / "s.json", *arguments)
    kinds = {*product(SCALED, ("forward", "training"))}
    assert {(p["mixer"], p["pass"], p["tokens"]) for p in record["points"]} == {(*kind, n) for kind in kinds for n in (64, 256)}
    assert {(gap["mixer"], gap["pass"], gap["tokens"]) for gap in record["skipped"]} == {(*kind, 4194304) for kind in kinds}
    assert all("more than" in gap["reason"] and gap["reason"] in shown for gap in record["skipped"])
    assert [sentence.split(",")[0] for sentence in record["sentences"]] == list(SCALED)[1:]
    assert all(sentence in shown for sentence in record["sentences"])
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_mixer_is_scaled(compose_config: Callable[..., DictConfig]) -> None:
    """All of conf/attention except the attentions of LeViT and CvT, which are softmax attention; each fits the skeleton."""
    assert {*MIXERS} - {"softmax-explicit"} == {p.stem for p in (ROOT / "conf/attention").glob("*.yaml")} - {"levit", "cvt"}
    for overrides in MIXERS.values():
        with torch.device("meta"):
            assert build_model(compose_config(*overrides, *skeleton(8)))(torch.empty(1, 3, 8, 8)).shape == (1, 10)


@pytest.mark.slow
def test_rows(tmp_path: Path) -> None:
    """Time and memory of two rows, next to the estimate, which is the same from the kept file alone."""
    out = tmp_path / "r.json"
    shown, record = measured("benchmarks.rows", out, "--batch", "2", "--rows", "vil", "fnet")
    assert set(record["rows"]) == {"vil", "fnet"}
    for row, costs in record["rows"].items():
        cost, estimate = costs["plain"], estimated_bytes(row, "cpu", 2)
        assert cost["seconds"] > 0
        assert cost["allocated"] < estimate  # which counts weights and optimizer state as well
        (line,) = (line.split() for line in shown.splitlines() if line.split()[:1] == [row])
        assert line[1] == f"{1e3 * cost['seconds']:,.1f}"
        assert line[-3:-1] == [f"{cost['allocated'] / 1e9:.2f}", f"{estimate / 1e9:.2f}"]
    again = run_benchmark("benchmarks.rows", out, "--show", str(out))
    assert again.stdout == shown.rpartition("Written")[0]
    refused = run_benchmark("benchmarks.rows", out, "--rows", "fnet", "--kinds", "graphs")
    assert "not measured: fnet, graphs: trainer.compile=cuda_graphs: needs a CUDA GPU" in refused.stdout
    missing = run_benchmark("benchmarks.rows", out, "--show", str(tmp_path / "no.json"))
    assert missing.stderr.startswith(f"error: --show {tmp_path / 'no.json'}: No such file or directory; pass a file that")


@pytest.mark.slow
def test_overhead(tmp_path: Path) -> None:
    """The three figures, from real runs of train.py."""
    began = time.monotonic()
    _, record = measured("benchmarks.overhead", tmp_path / "o.json")
    whole = time.monotonic() - began
    assert 0 < record["seconds_to_first_step"] < whole
    assert record["epoch_over_bare_steps"] > 0
    # The second run finds what the first one compiled.
    assert record["compile_seconds_again"] < record["compile_seconds"]
    assert min(record["jobs_per_hour_alone"], record["jobs_per_hour_packed"]) > 3600 / whole  # several jobs were done


@pytest.mark.slow
def test_accuracy_against_time_and_memory(tmp_path: Path) -> None:
    """Table and picture of kept runs, with the costs that another command measures; without runs or costs, one line."""
    costs, picture = tmp_path / "costs.json", tmp_path / "accuracy.png"
    arguments = ("--runs", str(ROOT / "results/recipe"), "--costs", str(costs), "--picture", str(picture))

    def call(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.accuracy", *arguments, *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS, check=False)

    done = call()
    assert done.returncode == 1
    assert done.stderr == f"error: {costs}: no such file; pass the one that python -m benchmarks.compact writes\n"
    _, record = measured("benchmarks.compact", costs, "--mixers", "softmax", "identity")
    done = call()
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in done.stdout.splitlines() if "|" in line]
    rows = {cells[0]: cells for cells in lines[2:]}
    assert set(rows) == {"softmax", "identity"}
    for row in record["rows"]:
        (path,) = (ROOT / "results/recipe").glob(f"*attention={row['mixer']},*/seed=0/results.json")
        run = json.loads(path.read_text())
        expected = [f"{run['top1']:.2f}", "1", f"{50_000 / row['images_per_second']:.0f}", f"{row['allocated'] / 1e6:,.0f}"]
        assert rows[row["mixer"]][1:5] == expected
    assert rows["identity"][6] == "time, memory"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "Not trained yet: performer, " in done.stdout
    assert call("--runs", str(tmp_path)).stderr.startswith(f"error: {tmp_path}: no finished run of ./sweep.sh compact")


def test_what_takes_longer_than_a_call_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not stop the pieces behind it; only when nothing else is left, more minutes are asked for."""
    tried: list[str] = []

    def measure(piece: Piece, folder: Path, timeout: float | None) -> None:
        tried.append(piece.name)
        if piece.name == "fnet":
            raise subprocess.TimeoutExpired(piece.module, timeout or 0.0)
        kept(folder, piece).write_text(json.dumps(settings))

    settings = {
        "device": {"name": hardware(torch.device("cpu"))},
        "options": {"threads": 1, "quick": False, "rounds": 1},
        "versions": {"torch": torch.__version__},
    }
    monkeypatch.setattr(everything, "measure", measure)
    monkeypatch.setattr(everything, "write_page", lambda *_: None)
    monkeypatch.setattr(everything.signal, "signal", lambda *_: None)
    (tmp_path / "pieces").mkdir()
    common = ("--device", "cpu", "--threads", "1", "--minutes", "9", "--out", str(tmp_path))
    rows = ("--only", "fnet", "vil_rope")
    with pytest.raises(SystemExit) as ended:
        everything.main([*common, *rows])
    assert ended.value.code == UNFINISHED
    with pytest.raises(UserError, match=r"^rows, fnet: takes more than 9 minutes; use more$"):
        everything.main([*common, *rows])
    assert tried == ["fnet", "vil_rope", "fnet"]
    assert [path.name for path in (tmp_path / "pieces").glob("*.json")] == ["rows-vil_rope.json"]
    with pytest.raises(UserError, match=r"rows-vil_rope\.json: was measured with threads 1, not 2; use another --out"):
        everything.main([*common, "--threads", "2", *rows])


def test_a_killed_piece_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although it had written what it could not measure."""
    (tmp_path / "killed.py").write_text(
        "import os, pathlib, sys\npathlib.Path(sys.argv[-1]).write_text('{\"refused\": [1]}')\nos.kill(os.getpid(), 9)\n"
    )
    monkeypatch.chdir(tmp_path)
    piece = Piece("compact", "softmax", "killed", ())
    assert everything.measure(piece, tmp_path, None) == "ended by signal 9"
    assert not kept(tmp_path, piece).exists()


def test_a_piece_with_an_error_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call tries again, unlike after a lack of memory."""
    gap = {"mixer": "softmax", "reason": "device busy\nwait"}
    for name, record in (("error", {"refused": [], "errors": [gap]}), ("memory", {"refused": [gap]})):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
        (tmp_path / f"{name}.py").write_text(f"import shutil, sys\nshutil.copy('{name}.json', sys.argv[-1])\nsys.exit(1)\n")
    monkeypatch.chdir(tmp_path)
    assert everything.measure(Piece("compact", "softmax", "error", ()), tmp_path, None) == "device busy"
    assert not [*tmp_path.glob("pieces/*.json")]
    assert everything.measure(Piece("compact", "softmax", "memory", ()), tmp_path, None) is None
    assert len([*tmp_path.glob("pieces/*.json")]) == 1


def test_what_fails_does_not_hide_what_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are the pieces behind it lost, and the page keeps what --only leaves out."""
    tried: list[str] = []

    def measure(piece: Piece, folder: Path, timeout: float | None) -> str | None:
        tried.append(piece.name)
        if piece.name == "vil_rope":
            raise subprocess.TimeoutExpired(piece.module, timeout or 0.0)
        return "is not installed" if piece.name == "fnet" else None

    shown: list[list[str]] = []
    monkeypatch.setattr(everything, "measure", measure)
    monkeypatch.setattr(everything, "write_page", lambda _, every: shown.append([piece.name for piece in every]))
    monkeypatch.setattr(everything.signal, "signal", lambda *_: None)
    (tmp_path / "pieces").mkdir()
    common = ("--device", "cpu", "--threads", "1", "--minutes", "9", "--out", str(tmp_path))
    settings = {
        "device": {"name": hardware(torch.device("cpu"))},
        "options": {"threads": 1, "quick": False, "rounds": 1},
        "versions": {"torch": torch.__version__},
    }
    (tmp_path / "pieces/rows-hybrid_vin.json").write_text(json.dumps(settings))
    rows = [name for name in published_rows() if name in ("fnet", "vil_rope", "mixer")]
    for _ in range(2):
        with pytest.raises(UserError, match="1 failed, the first: rows, fnet: is not installed"):
            everything.main([*common, "--only", *rows])
    first, second = tried[: tried.index("vil_rope") + 1], tried[tried.index("vil_rope") + 1 :]
    assert second[-1] == "vil_rope"
    assert {*first} | {*second} == {*rows}
    assert all({*names} == {*rows, "hybrid_vin"} for names in shown)


@pytest.mark.slow
def test_a_stopped_call_leaves_no_process(tmp_path: Path) -> None:
    """SIGTERM, as from a scheduler or timeout, also ends the measurement."""
    command = [sys.executable, "-m", "benchmarks", "everything", "--quick", "--only", "overhead", "--out", str(tmp_path / "m")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def measuring() -> bool:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended meanwhile
                line = path.read_bytes().decode(errors="replace")
                if "benchmarks.overhead" in line and str(tmp_path) in line:
                    return True
        return False

    while not measuring():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(HANGS) == 143
    assert not measuring()


@pytest.mark.slow
def test_everything_in_pieces(tmp_path: Path) -> None:
    """A call that has too little time leaves pieces to the next one, which ends with one page of all tables."""
    arguments = ("--only", "identity", "softmax", "fnet", "vil_rope")
    command = [sys.executable, "-m", "benchmarks", "everything", "--quick", "--device", "cpu", "--threads", "1", *arguments]
    command += ["--out", str(tmp_path / "machine")]

    def call(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=HANGS, check=False)

    done = call("--minutes", "0.001")
    assert done.returncode == UNFINISHED
    done = call()
    assert done.returncode == 0, done.stderr
    assert "6 of 6: scaling, softmax" in done.stderr  # after those that may be faster
    assert "6 of 6 pieces are measured" in done.stdout
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "machine/pieces").iterdir()}
    other = call("--threads", "2")
    assert other.stderr.endswith("scaling-softmax.json: was measured with threads 1, not 2; use another --out, or remove it\n")
    (tmp_path / "machine/pieces/compact-identity.json").unlink()
    (tmp_path / "machine/README.md").unlink()
    done = call("--minutes", "60")
    assert done.returncode == 0, done.stderr
    assert "1 of 1: compact, identity" in done.stderr
    again = {path for path, time in kept.items() if path.stat().st_mtime_ns != time}
    assert again == {tmp_path / "machine/pieces/compact-identity.json"}
    page = (tmp_path / "machine/README.md").read_text()
    written = {kind: json.loads((tmp_path / f"machine/{kind}.json").read_text()) for kind in ("scaling", "compact", "rows")}
    assert [row["mixer"] for row in written["compact"]["rows"]] == ["softmax", "identity"]
    assert f"| {written['compact']['rows'][0]['parameters']:,} |" in page
    assert list(written["rows"]["rows"]) == ["fnet", "vil_rope"]
    assert f"| vil_rope | {1e3 * written['rows']['rows']['vil_rope']['plain']['seconds']:,.1f} |" in page
    assert all(line in page for line in written["scaling"]["sentences"])
    assert len(written["scaling"]["sentences"]) == 1
    assert "Not measured yet" not in page
    assert (tmp_path / "machine/scaling.png").exists()


def test_pieces_side_by_side_are_joined() -> None:
    """Models that were measured one by one give the rows and means of all together, and every benchmark has its tables."""
    kept = json.loads((ROOT / "benchmarks/results/side-by-side-intel-xeon-processor-2-threads.json").read_text())
    pieces = [{**kept, "rows": [row], "means": []} for row in kept["rows"]]
    joined = {**pieces[0], **join_side_by_side(pieces)}
    assert (joined["rows"], joined["means"]) == (kept["rows"], kept["means"])
    assert len(KINDS["side-by-side"][1](joined)[0].lines) == len(MODELS) + 1


@pytest.mark.slow
def test_waiting(tmp_path: Path) -> None:
    """The default policy and ours, next to a busy process; what is compared with has the ratio 1."""
    options = ("--experiments", "quickstart", "--batch", "2", "--busy", "1")
    _, record = measured("benchmarks.waiting", tmp_path / "w.json", *options)
    assert [(row["way"], row["busy"]) for row in record["rows"]] == [(way, 1) for way in QUICK]
    assert all(row["images_per_second"] == pytest.approx(2 / row["seconds"][0]) for row in record["rows"])
    assert [row["speed_over_spinning"] for row in record["rows"] if row["way"] == QUICK[0]] == [1.0]


@pytest.mark.slow
def test_a_missing_package_is_one_line(tmp_path: Path) -> None:
    """Where a package to compare with is not installed, the error says what installs it."""
    (tmp_path / "linformer.py").write_text("raise ImportError('No module named linformer')")
    done = run_benchmark("benchmarks", tmp_path / "r.json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "pip install -r requirements-benchmarks.txt" in last
    assert "Traceback" not in done.stderr


# The package's name of a tensor → ours, where they differ beyond the skeleton's.
MIXER_NAMES: dict[str, dict[str, str]] = {
    "vil": {"to_q.weight": "to_q.weight", "to_k.weight": "to_k.weight", "proj_k": "length_k"},
    "vip": {"fast_attention.projection_matrix": "features_ME"},
}


def copy_weights(ours: Any, theirs: Any, name: str) -> None:
    """Give a package's model all of ours' weights."""
    pairs = [
        (theirs.to_patch_embedding[1].weight, ours.embedding.project.weight.flatten(1)),
        (theirs.to_patch_embedding[1].bias, ours.embedding.project.bias),
        (theirs.pos_embedding, ours.posenc.table_ND),
        (theirs.cls_token, ours.class_token[None]),
        (theirs.transformer.norm.weight, ours.norm.weight),
        (theirs.transformer.norm.bias, ours.norm.bias),
        (theirs.mlp_head.weight, ours.head.weight),
        (theirs.mlp_head.bias, ours.head.bias),
    ]
    for ((norm, attention), feed_forward), block in zip(theirs.transformer.layers, ours.blocks, strict=True):
        mine = {**dict(block.mixer.named_parameters()), **dict(block.mixer.named_buffers())}
        if name == "vip":
            for kind in ("weight", "bias"):
                for part, tensor in zip("qkv", mine[f"to_qkv.{kind}"].chunk(3), strict=True):
                    mine[f"to_{part}.{kind}"] = tensor
        renamed = MIXER_NAMES[name]
        their_tensors = {**dict(attention.named_parameters()), **dict(attention.named_buffers())}
        pairs += [(tensor, mine[renamed.get(key, key)]) for key, tensor in their_tensors.items() if tensor.is_floating_point()]
        pairs += [(norm.weight, block.norm1.weight), (norm.bias, block.norm1.bias)]
        for theirs_part, ours_part in ((0, block.norm2), (1, block.mlp[0]), (4, block.mlp[3])):
            layer = feed_forward.net[theirs_part]
            pairs += [(layer.weight, ours_part.weight), (layer.bias, ours_part.bias)]
    with torch.no_grad():
        for their_tensor, value in pairs:
            assert their_tensor.shape == value.shape
            their_tensor.copy_(value)


@pytest.mark.parametrize("name", MODELS)
def test_skeletons_have_the_same_parameters(compose_config: Callable[..., DictConfig], name: str) -> None:
    """A package's model has as many parameters as ours, at the paper's size, and computes logits."""
    ours, theirs = build_model(compose_config(*MODELS[name])), package_model(name, 32, 1)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    with torch.no_grad():
        assert theirs.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("name", ["vip", "vil"])
def test_skeletons_compute_the_same(compose_config: Callable[..., DictConfig], name: str) -> None:
    """On equal weights the logits are equal. (ViT's: test_vit_parity.py; ViN's package pads with zeros that attend.)"""
    torch.manual_seed(0)
    ours = build_model(compose_config(f"experiment={name}")).eval()
    theirs = package_model(name, 32, 1).eval()
    copy_weights(ours, theirs, name)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), atol=1e-5, rtol=0)


def test_flops_and_bytes_of_a_linear_layer() -> None:
    """As counted by hand: one product forward, two backward, and every tensor once per operation."""
    layer = nn.Linear(6, 5, bias=False)
    # Of an input that needs no gradient only the weight's product remains.
    assert training_flops(nn.Sequential(nn.Flatten(), layer), (1, 2, 3)) == 2 * (2 * 6 * 5)
    x, w = torch.randn(4, 6), torch.randn(6, 5)
    assert traffic(lambda: x @ w) == 4 * (4 * 6 + 6 * 5 + 4 * 5)
    assert traffic(lambda: x.T.expand(2, 6, 4)) == 0
    assert traffic(lambda: torch._foreach_mul_([x], 2.0)) == 4 * (2 * 4 * 6)


@pytest.mark.parametrize(
    ("mine", "other", "where"),
    [
        ({10: 4.0, 100: 4.0}, {10: 2.0, 100: 8.0}, 10**1.5),
        ({10: 1.0, 100: 1.0}, {10: 2.0, 100: 8.0}, 0),
        ({10: 1.0, 100: 9.0}, {10: 2.0, 100: 8.0}, None),
        ({10: 1.0, 100: 4.0, 1000: 4.0}, {10: 2.0, 100: 2.0, 1000: 8.0}, 100 * 10**0.5),
        ({10: 1.0}, {100: 2.0}, None),
    ],
)
def test_crossover(mine: dict[int, float], other: dict[int, float], where: float | None) -> None:
    """It is where lines on logarithmic axes meet for the last time."""
    assert crossover(mine, other) == (where if where is None else pytest.approx(where))


def test_a_sentence_about_the_largest_size_says_so() -> None:
    """Less memory at a small size, and more at the largest one."""
    costs = (("softmax", 100, 3.0, 4), ("softmax", 400, 6.0, 8), ("other", 100, 1.0, 2), ("other", 400, 2.0, 16))
    points = [{"mixer": m, "pass": "training", "tokens": n, "seconds": s, "bytes": b} for m, n, s, b in costs]
    assert sentence(points, "other", "softmax") == (
        "other, compared with softmax attention: trains faster from 100 tokens or fewer (3.0 times at 400); "
        "does not take less memory at the largest size (0.5 times at 400)."
    )


def test_what_the_next_size_takes_follows_from_the_growth() -> None:
    """Quadratic with one size known; with two the power between them, a little raised."""
    points = [{"tokens": 100, "seconds": 1.0}, {"tokens": 400, "seconds": 4.0}]
    assert expected([], 400, "seconds") is None
    assert expected(points[:1], 400, "seconds") == pytest.approx(16)
    assert expected(points, 1600, "seconds") == pytest.approx(4 * 4**1.25)


def test_a_smoke_test_or_a_part_does_not_replace_a_whole_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    for arguments, part in (([], False), (["--quick"], False), ([], True), (["--quick"], True)):
        options = records.parser("x", "").parse_args(["--threads", "1", *arguments])
        records.write("compact", torch.device("cpu"), options, {}, part)
    machine = records.machine(torch.device("cpu"), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"compact-{machine}{kind}.json" for kind in ("-part", "-quick", "")
    ]
