"""The fault drill's job on a Slurm, where nobody but Slurm and the job itself starts it again, and what a Slurm can do.

It is submitted to the partition `low` of a cluster on this machine (node names are its slurmd processes), which the
partition `high` preempts. The drill only ends waits for BeginTime, and brings back the node that it took away.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Final

import psutil
from drill_faults import Fault, Scene, Unexpected, wake_zombies
from drill_job import ROOT, Recipe, Story, gone_is_fine, send, tail

from dino_dist.slurm import Job as JobState
from dino_dist.slurm import run_slurm, show_job

NODES: Final = 2
PARTITION: Final = "low"
PREEMPTOR: Final = "high"
_LOOK_EVERY_S: Final = 0.25
_PATIENCE_S: Final = 120.0
_SETTLE_S: Final = 3.0
"""Slurm's nodes refuse a job that comes back within the second in which its last run was revoked, and fail it for good;
that is what the wait for BeginTime is for."""
_WRAPPER: Final = """\
#!/bin/sh
# scontrol, but for as many requeues as there are files named refuse.*: those Slurm does not hear of.
if [ "$1" = requeue ]; then
  for file in "{folder}"/refuse.*; do
    [ -e "$file" ] && rm "$file" && echo "scontrol: error: refused by the fault drill" >&2 && exit 1
  done
fi
exec "{scontrol}" "$@"
"""


class SlurmJob:
    """`dino-dist launch`, once."""

    def __init__(self, recipe: Recipe, run_dir: Path, num_ranks: int) -> None:
        if num_ranks % NODES:
            raise Unexpected(f"--ranks {num_ranks}: a multiple of {NODES}")
        self.story = Story(run_dir)
        self.launched_s = 0.0
        self.job_id = ""
        self.wrapper = run_dir.with_suffix(".bin")
        """Comes first on the job's PATH."""
        self._command = [
            sys.executable,
            "-m",
            "launch.cli",
            "launch",
            *recipe.settings(run_dir),
            "--json",
            "--no-probe",
        ]
        self._command += ["--nodes", str(NODES), "--tasks-per-node", str(num_ranks // NODES), "--time", "60"]
        self._command += ["--partition", PARTITION]
        self._seen: tuple[float, JobState | None] = (0.0, None)

    def start(self) -> None:
        if not self.job_id:
            self._submit()
        deadline = time.monotonic() + _PATIENCE_S
        while (state := self._look(now=True)) is None or state.state != "RUNNING":
            if state is None or state.is_over or time.monotonic() > deadline:
                break
            if state.state == "PENDING" and state.reason == "BeginTime":
                time.sleep(_SETTLE_S)
                _scontrol("update", f"jobid={self.job_id}", "StartTime=now")
            time.sleep(_LOOK_EVERY_S)
        # To the second below, so that what counts from here is at most a second too long.
        self.launched_s = time.time() if state is None else _started_s(state)

    def _submit(self) -> None:
        self.wrapper.mkdir(parents=True, exist_ok=True)
        scontrol = shutil.which("scontrol")
        script = self.wrapper / "scontrol"
        script.write_text(_WRAPPER.format(folder=self.wrapper, scontrol=scontrol), encoding="utf-8")
        script.chmod(0o755)
        command = ["sh", "-c", 'PATH="$0:$PATH" exec "$@"', str(self.wrapper), *self._command]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unexpected(f"dino-dist launch: {done.stderr.strip()}")
        self.job_id = json.loads(done.stdout)["jobs"][0]["job_id"]

    def ranks(self) -> dict[int, psutil.Process]:
        """The tasks of the newest step, whatever older ones a lost node left behind."""
        found: dict[int, tuple[int, psutil.Process]] = {}
        for process in psutil.process_iter():
            with gone_is_fine():
                environment = process.environ()
                parent = process.parent()
                if environment.get("SLURM_JOB_ID") != self.job_id or "SLURM_PROCID" not in environment:
                    continue
                if not _of_this_cluster(environment):
                    continue
                if parent is None or not parent.name().startswith("slurmstepd"):
                    continue  # a rank's own child
                if "train" not in process.cmdline():
                    continue  # the batch script
                rank, restart = int(environment["SLURM_PROCID"]), int(environment.get("SLURM_RESTART_COUNT", "0"))
                if restart >= found.get(rank, (-1, process))[0]:
                    found[rank] = (restart, process)
        return {rank: process for rank, (_, process) in found.items()}

    def is_down(self) -> bool:
        state = self._look()
        return state is None or state.state in ("PENDING", "REQUEUED") or state.is_over

    def verdict(self) -> str | None:
        state = self._look(now=True)
        if state is not None and not state.is_over:
            return None
        if self.story.is_done():
            return None
        return f"job {self.job_id} is {'forgotten' if state is None else state.state} and will not run again"

    def abandon(self) -> list[psutil.Process]:
        raise Unexpected("Slurm knows its jobs: take the node away")

    def output(self) -> str:
        folder = self.story.folder
        files = sorted(folder.logs.glob("rank-*.log")) + sorted((folder.path / "slurm").glob("*_log.err"))
        return "\n".join(f"--- {file.name}\n{tail(file)}" for file in files)

    def close(self) -> None:
        if not self.job_id:
            return
        state = self._look(now=True)
        if state is not None and not state.is_over:
            run_slurm("scancel", self.job_id)
        deadline = time.monotonic() + _PATIENCE_S
        while (state := self._look(now=True)) is not None and (not state.is_over) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)

    def _look(self, *, now: bool = False) -> JobState | None:
        """The job's state, asked for a few times a second at most."""
        at_s, state = self._seen
        if now or time.monotonic() - at_s > _LOOK_EVERY_S:
            state = show_job(self.job_id)
            self._seen = (time.monotonic(), state)
        return state


def _started_s(state: JobState) -> float:
    return datetime.fromisoformat(state.fields["StartTime"]).timestamp()


def _scontrol(*arguments: str) -> None:
    run_slurm("scontrol", *arguments)


def _job(scene: Scene) -> SlurmJob:
    assert isinstance(scene.job, SlurmJob)
    return scene.job


def preempt(scene: Scene) -> str:
    """A job that takes all nodes for a second."""
    output = f"--output={scene.job.story.folder.path}/preemptor.out"
    command = ["sbatch", "--parsable", "--exclusive", output, "-p", PREEMPTOR, "-N", str(NODES), "--wrap", "sleep 1"]
    return f"by job {run_slurm(*command).strip()}"


def requeue_by_hand(scene: Scene) -> str:
    """An administrator requeues the job."""
    _scontrol("requeue", _job(scene).job_id)
    return ""


def refuse_requeues(scene: Scene) -> str:
    """SIGUSR2 to all ranks, and scontrol fails so often that a rank, or even all of them, cannot requeue."""
    times = scene.rng.choice([2, 6])
    for number in range(times):
        (_job(scene).wrapper / f"refuse.{number}").touch()
    send(list(scene.job.ranks().values()), signal.SIGUSR2)
    return f"{times} times"


def leave_a_torn_pickle(scene: Scene) -> str:
    """What submitit leaves when it is killed while it rewrites its pickle; the next time it refuses to."""
    for pickle in (scene.job.story.folder.path / "slurm").glob("*_submitted.pkl"):
        pickle.with_suffix(".pkl.save_tmp").write_bytes(scene.rng.randbytes(100))
        return pickle.name
    raise Unexpected("no pickle to be found")


def lose_node(scene: Scene) -> str:
    """A node's slurmd is killed, and the node set down; the ranks on it live on."""
    rank, process = scene.pick(scene.job.ranks())
    return f"{_take_down(scene, process.environ()['SLURMD_NODENAME'])} with rank {rank}"


def lose_stopped_node(scene: Scene) -> str:
    """The same, and the rank on it is stopped, with nothing left that could end it."""
    rank, process = scene.pick(scene.job.ranks())
    node = process.environ()["SLURMD_NODENAME"]
    stepd = process.parent()
    scene.left_behind = [process]
    send([process], signal.SIGSTOP)
    told = _take_down(scene, node)
    send([stepd] if stepd is not None else [], signal.SIGKILL)
    return f"{told} with stopped rank {rank}"


def _take_down(scene: Scene, node: str) -> str:
    daemon = _slurmd(node)
    command = daemon.cmdline()
    send([daemon], signal.SIGKILL)
    _scontrol("update", f"nodename={node}", "state=down", "reason=drill")

    def bring_back() -> None:
        subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + _PATIENCE_S
        while "*" in (state := _node_state(node)) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
        if "down" in state:
            _scontrol("update", f"nodename={node}", "state=resume")

    scene.bring_back = bring_back
    return node


def bring_node_back(scene: Scene) -> str:
    """The node is there again."""
    scene.bring_back()
    return "back"


def _slurmd(node: str) -> psutil.Process:
    for process in psutil.process_iter():
        with gone_is_fine():
            command = process.cmdline()
            if process.name() == "slurmd" and node in command and _of_this_cluster(process.environ()):
                return process
    raise Unexpected(f"no slurmd of {node} on this machine")


def _of_this_cluster(environment: Mapping[str, str]) -> bool:
    """Another cluster on the same machine has jobs and nodes of the same names."""
    return environment.get("SLURM_CONF") == psutil.Process().environ().get("SLURM_CONF")


def _node_state(node: str) -> str:
    return run_slurm("sinfo", "-h", "-n", node, "-o", "%T").split()[0]


SLURM_FAULTS: Final = (
    Fault(name="preempt", strike=preempt, saves=True, on=("slurm",)),
    Fault(name="requeue-by-hand", strike=requeue_by_hand, on=("slurm",)),
    Fault(name="requeue-refused", strike=refuse_requeues, saves=True, on=("slurm",)),
    Fault(name="torn-pickle", strike=requeue_by_hand, while_down=leave_a_torn_pickle, on=("slurm",)),
    Fault(name="node-down", strike=lose_node, while_down=bring_node_back, on=("slurm",), needs_root=True),
    Fault(
        name="node-zombie",
        strike=lose_stopped_node,
        while_down=bring_node_back,
        after=wake_zombies,
        on=("slurm",),
        needs_root=True,
    ),
)
