"""A real Slurm of three nodes on this machine, in a directory of its own, run by the user of the tests."""

import getpass
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import HANGS
from paused import end_with_this_process, free_ports, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd")
NODES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")

# The nodes pretend to have four CPUs. A job that exceeds its memory is killed by Slurm's accounting, since control groups need
# a machine of one's own.
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
JobRequeue=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=1
ReturnToService=2
MailProg=/bin/true
NodeName=127.0.0.1 NodeAddr=127.0.0.1 NodeHostname=localhost Port={ports[1]} CPUs=4 RealMemory=20000
NodeName=127.0.0.2 NodeAddr=127.0.0.1 NodeHostname=localhost Port={ports[2]} CPUs=4 RealMemory=20000
NodeName=127.0.0.3 NodeAddr=127.0.0.1 NodeHostname=localhost Port={ports[3]} CPUs=1 RealMemory=20000
PartitionName=cpu Nodes=127.0.0.1 Default=YES PriorityTier=1
PartitionName=both Nodes=127.0.0.[1-2] PriorityTier=1
PartitionName=graced Nodes=127.0.0.1 PriorityTier=1 GraceTime=600
PartitionName=urgent Nodes=127.0.0.1 PriorityTier=10
PartitionName=alone Nodes=127.0.0.3 PriorityTier=1
"""
# The accounting of a cluster, in a database.
ACCOUNTING = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[4]}
AccountingStoragePass={folder}/munge.socket
"""
DATABASE = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={ports[4]}
SlurmUser={user}
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[5]}
StorageUser=slurm
StoragePass=slurm
"""


class Cluster:
    """The daemons of a Slurm."""

    def __init__(self, folder: Path, accounting: bool = False) -> None:
        self.folder, self.daemons = folder, list[subprocess.Popen[bytes]]()
        self.values = {"folder": folder, "user": getpass.getuser(), "ports": free_ports(6)}
        self.accounting = accounting
        self.stops = threading.Event()
        self.env = {"SLURM_CONF": str(folder / "slurm.conf")}

    def daemon(self, *command: str) -> None:
        name = Path(command[0]).name
        with open(self.folder / f"{name}.out", "ab") as output:
            environment = os.environ | self.env
            self.daemons.append(
                subprocess.Popen(command, stdout=output, stderr=output, env=environment, preexec_fn=end_with_this_process)
            )

    def start(self) -> None:
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        (self.folder / "slurm.conf").write_text((CONFIG + (ACCOUNTING if self.accounting else "")).format(**self.values))
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self.daemon("munged", "--foreground", "--force", *files, f"--socket={self.folder}/munge.socket")
        self.wait_until_runs(lambda: (self.folder / "munge.socket").exists())
        if self.accounting:
            self.start_database()
        self.daemon("slurmctld", "-D")
        for node in NODES:
            self.daemon("slurmd", "-D", "-N", node)
        self.wait_until_runs(lambda: self.command("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 6)
        threading.Thread(target=self.hurry, daemon=True).start()

    def start_database(self) -> None:
        """MariaDB and slurmdbd."""
        data = self.folder / "mysql"
        user = f"--user={self.values['user']}"
        command = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", user, "--auth-root-authentication-method=normal"]
        subprocess.run([*command, "--skip-test-db"], check=True, capture_output=True, timeout=HANGS)
        port = f"--port={self.values['ports'][5]}"  # type: ignore[index]
        socket_file = f"--socket={self.folder}/mysql.socket"
        options = ("--no-defaults", f"--datadir={data}", user, port, socket_file, "--bind-address=127.0.0.1")
        self.daemon("mariadbd", *options)
        grant = "create user slurm@'%' identified by 'slurm'; grant all on *.* to slurm@'%'"
        client = ["mariadb", "--no-defaults", "-u", "root", socket_file, "-e", grant]
        self.wait_until_runs(lambda: subprocess.run(client, capture_output=True, check=False).returncode == 0)
        config = self.folder / "slurmdbd.conf"
        config.touch(mode=0o600)
        config.write_text(DATABASE.format(**self.values))
        self.daemon("slurmdbd", "-D")
        self.wait_until_runs(lambda: "Cluster" in self.command("sacctmgr", "show", "cluster"))

    def wait_until_runs(self, holds) -> None:  # type: ignore[no-untyped-def]
        wait_until(holds, lambda: self.output() if any(daemon.poll() is not None for daemon in self.daemons) else "")

    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.folder.glob("*.out"))

    def command(self, *command: str) -> str:
        """Run a command of Slurm; its output."""
        done = subprocess.run(
            command, env=os.environ | self.env, capture_output=True, text=True, check=False, timeout=HANGS, cwd=self.folder
        )
        return done.stdout

    def submit(self, *options: str) -> str:
        """A job that does nothing; its number."""
        return re.findall(r"\d+", self.command("sbatch", *options, "--output=/dev/null", "--wrap=true"))[0]

    def jobs(self, columns: str = "%i", partitions: str = "cpu,both,graced") -> list[list[str]]:
        """Columns of squeue, of jobs that have not ended."""
        shown = self.command("squeue", "-h", "--array", "-o", columns, *(("-p", partitions) if partitions else ()))
        return [line.split() for line in shown.splitlines()]

    def hurry(self) -> None:
        """Slurm starts a requeued job after two minutes, and no option changes that; an operator can.

        Not within a second or two: its credential would count as that of the requeued job, which has been revoked.
        """
        since: dict[str, float] = {}
        while not self.stops.wait(0.5):
            waiting = [job for job, reason in self.jobs("%i %r", "") if reason == "BeginTime"]
            since = {job: since.get(job, time.monotonic()) for job in waiting}
            for job, first in since.items():
                if time.monotonic() - first > 4:
                    self.command("scontrol", "update", f"JobId={job}", "StartTime=now")

    def stop(self) -> None:
        self.stops.set()
        if self.jobs("%i", ""):
            self.command("scancel", "--me", "--signal=KILL", "--full")
            self.command("scancel", "--me")
            wait_until(lambda: not self.jobs("%i", ""))
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            daemon.wait(HANGS)


@contextmanager
def cluster(accounting: bool = False) -> Iterator[Cluster]:
    """A running cluster. Skips the test where a program is absent."""
    needed = (*PROGRAMS, "slurmdbd", "mariadbd", "mariadb-install-db") if accounting else PROGRAMS
    for name in needed:
        if not shutil.which(name):
            packages = "munge slurm-wlm" + " slurmdbd mariadb-server" * accounting
            pytest.skip(f"{name} is not installed: apt-get install {packages}")
    folder = Path(tempfile.mkdtemp(prefix="vix-slurm-"))  # the path of a socket must be short
    running = Cluster(folder, accounting)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)
