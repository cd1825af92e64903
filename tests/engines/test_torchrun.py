"""torchrun on two machines: two network namespaces, which share nothing but the files and a cable."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import HANGS, ROOT, run_train
from paused import SMALL, go_on, paused, pausing, results_in

pytestmark = pytest.mark.slow

PORT = 29400


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=HANGS)
    return done.stdout


class Machines:
    """Two network namespaces, joined by a virtual cable."""

    def __init__(self) -> None:
        self.names = [f"vix{os.getpid()}{side}" for side in "ab"]
        self.addresses = ["10.213.0.1", "10.213.0.2"]

    def build(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip(*f"link add eth0 netns {self.names[0]} type veth peer name eth0 netns {self.names[1]}".split())
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")

    def start(self, number: int, directory: Path, *overrides: str, **env: str) -> subprocess.Popen[str]:
        """``torchrun`` on a machine, with one process, and the rendezvous on machine 0."""
        # A namespace has no host name of its own by which torchrun could know that it is the rendezvous's machine.
        rendezvous = (
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.addresses[0]}:{PORT}",
            f"--rdzv-conf=is_host={number == 0}",
            f"--local-addr={self.addresses[number]}",
        )
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *rendezvous]
        command = ["ip", "netns", "exec", self.names[number], *torchrun, str(ROOT / "train.py"), *overrides]
        pipe = subprocess.PIPE
        environment = env | {"GLOO_SOCKET_IFNAME": "eth0"}
        return subprocess.Popen(command, cwd=directory, env=environment, stdout=pipe, stderr=pipe, text=True)

    def kill(self, number: int) -> None:
        """As a power failure, but for the connections, which the kernel closes."""
        for process in ip("netns", "pids", self.names[number]).split():
            os.kill(int(process), signal.SIGKILL)

    def remove(self) -> None:
        for number, name in enumerate(self.names):
            if (Path("/run/netns") / name).exists():
                self.kill(number)
                ip("netns", "del", name)


@pytest.fixture
def machines() -> Iterator[Machines]:
    if not shutil.which("ip"):
        pytest.skip("two machines need the program ip: apt-get install iproute2")
    built = Machines()
    try:
        built.build()
    except subprocess.CalledProcessError as error:
        built.remove()
        pytest.skip(f"two machines need network namespaces, which root may make: {error.stderr.strip()}")
    yield built
    built.remove()


@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_two_machines_dies(tmp_path: Path, machines: Machines, killed: int) -> None:
    """The other one ends; the same commands continue to the losses of one process."""
    settings = (*SMALL, "data.train_size=41")
    processes = [machines.start(number, tmp_path, *settings, **pausing(2)) for number in (0, 1)]
    (run,) = paused(tmp_path, 2)
    machines.kill(killed)
    go_on(run, 2)
    output, errors = processes[1 - killed].communicate(timeout=HANGS)
    assert processes[1 - killed].returncode not in (0, None)
    if killed == 1:  # without the rendezvous, torchrun itself ends, and its process by SIGTERM
        assert "the same command continues" in errors, output + errors

    processes = [machines.start(number, tmp_path, *settings, **pausing(2)) for number in (0, 1)]
    said = [process.communicate(timeout=HANGS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "Continuing after" in said[0][0] + said[1][0]
    alone = tmp_path / "alone"
    alone.mkdir()
    assert run_train(alone, *settings).returncode == 0
    (two,), (one,) = results_in(tmp_path), results_in(alone)
    assert [(r["status"], r["processes"]) for r in (one, two)] == [("finished", 1), ("finished", 2)]
    losses = [[row["train_loss"] for row in results["history"]] for results in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert "torchrun --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=10.213.0." in two["command"]
