"""A sweep on a real Ray cluster of two nodes, which the tests start on this machine."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from common import table_after
from conftest import HANGS, ROOT, run_train
from paused import SMALL, end_with_this_process, free_ports, go_on, paused, pausing, results_in, wait_until

# Whether a new cluster asks for a token depends on the home directory; these do not.
RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]


class RayCluster:
    """Ray's own daemons. A node is a session of processes, so that it can be killed as a whole."""

    def __init__(self, folder: str) -> None:
        self.folder, self.port = folder, free_ports(1)[0]
        self.nodes: list[subprocess.Popen[bytes]] = []

    def start_node(self, name: str, *options: str) -> None:
        """A node with two CPUs, and the resource NAME."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=2", "--num-gpus=0", *options]
        environment = pausing(1, **RAY)
        del environment["OMP_NUM_THREADS"]  # Ray says how many CPUs a job has
        with open(f"{self.folder}/{name}.out", "wb") as output:
            self.nodes.append(
                subprocess.Popen(
                    [*command, "--object-store-memory=80000000", f'--resources={{"{name}": 2}}', "--disable-usage-stats"],
                    env=environment,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            )

    def alive(self) -> int:
        """The number of nodes that the cluster knows."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "status", f"--address=127.0.0.1:{self.port}"]
        environment = os.environ | RAY
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=False, env=environment)
        return done.stdout.count("1 node_")

    def processes(self, number: int) -> list[int]:
        """The processes of a node: those of its session, and their descendants."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid,sid"], capture_output=True, text=True, check=True).stdout
        rows = [tuple(map(int, line.split())) for line in listed.splitlines()[1:]]
        found = {pid for pid, _, session in rows if session == self.nodes[number].pid}
        while more := {pid for pid, parent, _ in rows if parent in found} - found:
            found |= more
        return sorted(found)

    def kill(self, number: int) -> None:
        """As a power failure."""
        for process in self.processes(number):
            os.kill(process, signal.SIGKILL)
        self.nodes[number].wait(HANGS)

    def stop(self) -> None:
        for number in reversed(range(len(self.nodes))):
            self.kill(number)


def need_the_launcher() -> None:
    for plugin in ("ray", "hydra_plugins.hydra_ray_launcher"):
        if not find_spec(plugin.partition(".")[0]) or not find_spec(plugin):
            pytest.skip("hydra-ray-launcher is not installed: pip install -r requirements-launchers.txt")


@pytest.fixture
def ray() -> Iterator[RayCluster]:
    """A head and a second node; the programs of a sweep run on both."""
    need_the_launcher()
    with tempfile.TemporaryDirectory(prefix="vix-ray-") as folder:  # the path of a socket must be short
        cluster = RayCluster(folder)
        try:
            cluster.start_node("first", "--head", f"--port={cluster.port}", "--include-dashboard=false", f"--temp-dir={folder}")
            wait_until(lambda: cluster.alive() == 1)
            cluster.start_node("second", f"--address=127.0.0.1:{cluster.port}")
            wait_until(lambda: cluster.alive() == 2)
            yield cluster
        finally:
            cluster.stop()


def start_sweep(cluster: RayCluster, directory: Path, *overrides: str, **variables: str) -> subprocess.Popen[str]:
    """Two jobs of two CPUs: one per node."""
    launcher = ("hydra/launcher=ray_gpus", f"hydra.launcher.ray.init.address=127.0.0.1:{cluster.port}")
    remote = ("hydra.launcher.ray.remote.num_gpus=0", "hydra.launcher.ray.remote.num_cpus=2")
    command = [sys.executable, str(ROOT / "train.py"), "-m", *launcher, *remote, *SMALL, "seed=0,1", *overrides]
    environment = pausing(1, COLUMNS="400", **RAY, **variables)
    del environment["OMP_NUM_THREADS"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=directory, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=end_with_this_process
    )


def test_a_killed_nodes_job_runs_again_elsewhere(tmp_path: Path, ray: RayCluster) -> None:
    """It continues there from its checkpoint, and ends as if nothing had happened."""
    sweep = start_sweep(ray, tmp_path)
    runs = paused(tmp_path, 1, 2)
    ray.kill(1)
    for run in runs:
        go_on(run, 1)
    output, errors = sweep.communicate(timeout=HANGS)
    assert sweep.returncode == 0, output + errors
    assert [row[:2] for row in table_after(output, "jobs of this sweep")] == [[f"seed={n}", "finished"] for n in range(2)]
    assert sum("Continuing after" in (run / "train.log").read_text() for run in runs) == 1
    assert [r["threads"] for r in results_in(tmp_path)] == [2, 2]  # num_cpus
    for seed, found in enumerate(results_in(tmp_path)):
        alone = tmp_path / f"alone{seed}"
        alone.mkdir()
        assert run_train(alone, *SMALL, f"seed={seed}", OMP_NUM_THREADS="2").returncode == 0
        (expected,) = results_in(alone)
        assert [row["train_loss"] for row in found["history"]] == [row["train_loss"] for row in expected["history"]]


def test_ctrl_c_saves_first(tmp_path: Path, ray: RayCluster) -> None:
    """Here with an option from a variable that is set for the command alone, not on the machines of the cluster."""
    sweep = start_sweep(ray, tmp_path, "model.dropout='${oc.decode:${oc.env:VIX_DROPOUT}}'", VIX_DROPOUT="0.125")
    paused(tmp_path, 1, 2)
    sweep.send_signal(signal.SIGINT)
    output, errors = sweep.communicate(timeout=HANGS)
    assert sweep.returncode == 130, output + errors
    found = [(r["status"], r["config"]["model"]["dropout"]) for r in results_in(tmp_path)]
    assert found == [("interrupted", 0.125)] * 2


def test_no_cluster_at_the_address(tmp_path: Path) -> None:
    """One line says what is missing."""
    need_the_launcher()
    address = f"127.0.0.1:{free_ports(1)[0]}"
    overrides = ("-m", "hydra/launcher=ray_gpus", f"hydra.launcher.ray.init.address={address}", *SMALL, "seed=0,1")
    done = run_train(tmp_path, *overrides, **RAY)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: hydra.launcher.ray.init.address={address}: no Ray cluster answers there")
    assert "ray start --head" in last
