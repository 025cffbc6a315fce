"""A real Slurm of two nodes on this machine, with its own munge: started, broken in the ways of clusters, and ended."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from dino_dist.slurm import Job, show_job

NODES = ("n0", "n1")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv")
INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge"
PREFIX = "dino-dist-slurm."
PATIENCE_S = 30.0
_PORTS = range(7100, 16000)
"""Below those of outgoing connections, and below those that a job's ranks meet at."""

CONFIGURATION = """\
ClusterName=dino-dist-test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
EnforcePartLimits=ALL
KillWait={kill_wait_s}
SlurmdTimeout=15
MinJobAge=300
BatchStartTimeout=60
SchedulerParameters=sched_interval=5,bf_interval=5
SlurmdParameters=config_overrides
NodeName=n0 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=low Nodes=n[0-1] Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=high Nodes=n[0-1] State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=closed Nodes=n[0-1] State=UP AllowAccounts=physics
"""
USER_SIGNAL = "SlurmctldParameters=preempt_send_user_signal\n"


def why_not() -> str | None:
    """Why no Slurm can be started here; None if one can."""
    missing = [program for program in PROGRAMS if _which(program) is None]
    if missing:
        return f"no {', '.join(missing)} here: {INSTALL}"
    if os.geteuid() != 0:
        return "only root can start a Slurm whose jobs run as root"
    return None


class Cluster:
    """Nodes n0 and n1; partition `low` is preempted by `high`, `closed` takes account `physics` only."""

    kill_wait_s = 10
    """From SIGTERM to SIGKILL."""
    grace_s = 20
    """From the warning of a preemption to the first signal of the kill."""

    def __init__(self) -> None:
        _remove_what_killed_tests_left()
        self.folder = Path(tempfile.gettempdir(), f"{PREFIX}{os.getpid()}")
        self.folder.mkdir(mode=0o755)
        self.configuration = self.folder / "slurm.conf"
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        self.env["SLURM_CONF"] = str(self.configuration)
        self._text = CONFIGURATION.format(
            folder=self.folder, ports=_free_ports(3), kill_wait_s=self.kill_wait_s, grace_s=self.grace_s
        )
        self._user_signal = True
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Bring all daemons up and both nodes idle."""
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self.configuration.write_text(self._text + USER_SIGNAL)
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        self._start("munged", "--foreground", "--force", *(f"--{key}={self.folder / to}" for key, to in files.items()))
        self.wait_for((self.folder / "munge.socket").exists, "munged's socket")
        self._start("slurmctld", "-D", "-c")
        self.wait_for(lambda: "UP" in self.run("scontrol", "ping", check=False), "an answer from slurmctld")
        for node in NODES:
            self._start(f"slurmd.{node}", "-D", "-N", node)
        self.wait_for_idle()

    def stop(self) -> None:
        """End every process of this cluster, its jobs' too, and remove its files."""
        kill_processes_of(self.folder)
        for daemon in self._daemons.values():
            daemon.wait()
        shutil.rmtree(self.folder)

    def run(self, *command: str, check: bool = True) -> str:
        """What a command says to this cluster; AssertionError if it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}"
        return done.stdout

    def set_user_signal(self, wanted: bool) -> None:
        """Whether a preempted job gets the signal that it asked for (SIGUSR2), or SIGTERM."""
        if wanted != self._user_signal:
            self.configuration.write_text(self._text + USER_SIGNAL * wanted)
            self.run("scontrol", "reconfigure")
            self._user_signal = wanted

    def wait_for(self, predicate: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> None:
        """Poll until it is true; AssertionError that names `what` after too long."""
        deadline_s = time.monotonic() + patience_s
        while not predicate():
            assert time.monotonic() < deadline_s, f"no {what} within {patience_s:g} s"
            time.sleep(0.1)

    def wait_for_idle(self) -> None:
        """Until both nodes could take a job."""
        self.wait_for(lambda: self.node_states() == dict.fromkeys(NODES, "idle"), "idle nodes", 60)

    def node_states(self) -> dict[str, str]:
        """Each node's state in sinfo's words; a `*` means that it does not answer."""
        lines = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T").splitlines()
        return dict((line.split()[0], line.split()[1]) for line in lines)

    def job(self, job_id: str) -> Job | None:
        """See `dino_dist.slurm.show_job`."""
        return show_job(job_id)

    def sbatch(self, script: str, *options: str, folder: Path) -> str:
        """Submit a shell script; returns the job's number. Its output goes to `folder`/JOB.out."""
        command = ["sbatch", "--parsable", "--open-mode=append", f"--output={folder}/%j.out", *options]
        return self.run(*command, "--wrap", script).strip()

    def release(self, job_id: str) -> None:
        """Shorten a requeued job's wait for its BeginTime, two minutes, to seconds; nothing if it does not wait.

        Not to none: a node takes a job that comes back within the second for the one that it has just killed.
        """
        job = self.job(job_id)
        if job is None or job.state != "PENDING" or job.reason != "BeginTime":
            return
        begin = datetime.fromisoformat(job.fields["EligibleTime"])
        if begin - datetime.now() > timedelta(seconds=5):
            self.run("scontrol", "update", f"jobid={job_id}", "StartTime=now+3", check=False)

    def preempt(self, seconds: float) -> str:
        """Submit a job that takes all nodes from those of `low`, for so long once it runs; returns its number."""
        return self.sbatch(f"sleep {seconds:g}", "--exclusive", "-p", "high", "-N2", folder=self.folder)

    def task_pids(self, job_id: str) -> dict[int, int]:
        """Rank to process of the tasks that srun started in a job; also of one that Slurm has lost sight of."""
        pids = {}
        for step in self._processes():
            if re.match(rf"slurmstepd: \[{job_id}\.\d+\]", _command_line(step)):
                for task in _children(step):
                    rank = _environment(task).get("SLURM_PROCID")
                    if rank is not None:
                        pids[int(rank)] = task.pid
        return pids

    def processes_of_job(self, job_id: str) -> list[psutil.Process]:
        """All that still runs for a job: supervisor, srun, ranks, and Slurm's own processes beside them."""
        return [
            process
            for process in self._processes()
            if _environment(process).get("SLURM_JOB_ID") == job_id
            or _command_line(process).startswith(f"slurmstepd: [{job_id}.")
        ]

    def signal_tasks(self, job_id: str, number: signal.Signals, ranks: Sequence[int]) -> None:
        """A signal to some ranks' processes, past Slurm."""
        pids = self.task_pids(job_id)
        for rank in ranks:
            os.kill(pids[rank], number)

    def stop_node(self, node: str) -> None:
        """The node is lost: its slurmd is killed, and Slurm is told that the node is down. Its tasks live on."""
        daemon = self._daemons[f"slurmd.{node}"]
        daemon.kill()
        daemon.wait()
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def start_node(self, node: str) -> None:
        """The node is back."""
        if self._daemons[f"slurmd.{node}"].poll() is not None:
            self._start(f"slurmd.{node}", "-D", "-N", node)
        self.wait_for(lambda: not self.node_states()[node].endswith("*"), f"answer from {node}")
        self.wait_for(lambda: self._is_back(node), f"return of {node}")

    def _is_back(self, node: str) -> bool:
        """Asks for it if need be; a node may also return to service by itself, and then Slurm refuses to resume it."""
        if self.node_states()[node] not in ("down", "drained", "draining"):
            return True
        self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        return False

    def clear(self) -> None:
        """No job, both nodes up and idle, as at the start: between two tests."""
        for job_id in self.run("squeue", "-h", "-o", "%A").split():
            self.run("scancel", job_id, check=False)
        for process in self._processes():
            if "SLURM_JOB_ID" in _environment(process):  # sooner than KillWait
                _kill(process)
        self.set_user_signal(True)
        for node in NODES:
            self.start_node(node)
        self.wait_for(lambda: not self.run("squeue", "-h"), "empty queue", 60)
        self.wait_for_idle()

    def log_tails(self, lines: int = 40) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"--- {path.name}\n{tail(path, lines)}" for path in sorted(self.folder.glob("*.log")))

    def _start(self, name: str, *options: str) -> None:
        """Run a daemon in the foreground, to die with this process."""
        program = name.split(".")[0]
        with open(self.folder / f"{name}.out", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", str(_which(program)), *options],
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _processes(self) -> Iterator[psutil.Process]:
        return processes_of(self.folder)


def processes_of(folder: Path) -> Iterator[psutil.Process]:
    """Daemons, steps and tasks of the cluster in `folder`: all inherit the path of its configuration."""
    for process in psutil.process_iter():
        if _environment(process).get("SLURM_CONF") == str(folder / "slurm.conf"):
            yield process


def kill_processes_of(folder: Path) -> None:
    """SIGKILL, until none is left: a step that dies may have started another process meanwhile."""
    while found := list(processes_of(folder)):
        for process in found:
            _kill(process)
        psutil.wait_procs(found, timeout=1)


def tail(path: Path, lines: int = 40) -> str:
    """The last lines of a file; empty if there is none."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def _remove_what_killed_tests_left() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        owner = folder.name.removeprefix(PREFIX)
        if owner == str(os.getpid()) or not psutil.pid_exists(int(owner)):
            kill_processes_of(folder)
            shutil.rmtree(folder)


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def _which(program: str) -> str | None:
    """Daemons are in directories that are not on everybody's PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin")


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def _environment(process: psutil.Process) -> dict[str, str]:
    """Not psutil's, which ends at the first gap: a step's has one, since it writes its own name over the beginning."""
    try:
        block = Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:  # ended, or another user's
        return {}
    return dict(entry.split("=", 1) for entry in block.decode(errors="replace").split("\0") if "=" in entry)


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.Error:
        return []
