"""What a submitted job does on its first node: start the ranks with srun, wait for their end, and settle what is left.

The ranks save and requeue by themselves when a signal stops them; see `aftermath` for the rest. This supervisor holds
no state: all it knows is on disk.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_dist.run_folder import RunFolder
from dino_dist.slurm import own_job_id
from launch.aftermath import SUBMITTED_CONFIG, Ending, settle


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """The callable that submitit pickles: names of files and sizes, so that an old pickle is as good as a new one."""

    run_dir: str
    tasks_per_node: int
    cpus_per_task: int | None
    srun_args: tuple[str, ...] = ()
    exclude_faulty: bool = False
    """Keep nodes with repeated faults out of the next run of the job."""
    accept_changes: bool = False

    def __call__(self) -> None:
        """Run the ranks to their end; a job that is not done ends with an exit code other than 0."""
        code = supervise(self, os.environ)
        if code:
            raise SystemExit(code)  # submitit takes any exception but this one for a result

    def checkpoint(self) -> Any:
        """For submitit, should it ever be signalled before this task runs: the same task again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    __submitit_checkpoint__ = checkpoint


def supervise(task: TrainTask, environ: Mapping[str, str]) -> int:
    """Start the ranks of this run of the job, wait for their end, and return the exit code of the job."""
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGCONT):
        signal.signal(number, _leave_it_to_the_ranks)
    folder = RunFolder(Path(task.run_dir))
    attempts_before = folder.newest_attempt()
    command = srun_command(task, num_nodes=int(environ["SLURM_JOB_NUM_NODES"]))
    print("+", " ".join(command), file=sys.stderr, flush=True)
    code, said = _run(command)
    job_id = own_job_id(environ)
    assert job_id is not None, "a batch job has a number"
    ending = Ending(job_id=job_id, attempts_before=attempts_before, code=code, said=said)
    return settle(folder, ending, exclude_faulty=task.exclude_faulty)


def srun_command(task: TrainTask, *, num_nodes: int) -> list[str]:
    """The command that starts all ranks, on the nodes that the job has got this time."""
    folder = RunFolder(Path(task.run_dir))
    command = ["srun", "--unbuffered", "--kill-on-bad-exit=1"]
    command += [f"--nodes={num_nodes}", f"--ntasks={num_nodes * task.tasks_per_node}"]
    command += [f"--ntasks-per-node={task.tasks_per_node}"]
    # Neighbouring ranks on one node: the shard axis of hsdp then stays inside it.
    command += ["--distribution=block:block"]
    if task.cpus_per_task is not None:
        command += [f"--cpus-per-task={task.cpus_per_task}"]  # since 22.05 srun does not take it over from sbatch
    command += ["--open-mode=append", f"--output={folder.logs}/rank-%5t.log", *task.srun_args]
    command += [sys.executable, "-u", "-m", "launch.cli", "train", str(folder.path / SUBMITTED_CONFIG)]
    return command + ["--accept-changes"] * task.accept_changes


def _run(command: Sequence[str]) -> tuple[int, list[str]]:
    """The exit code of srun and the lines that it said itself, passed on as they come."""
    said: list[str] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as srun:
        assert srun.stderr is not None
        for line in srun.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            said.append(line.rstrip("\n"))
    return srun.returncode, said


def _leave_it_to_the_ranks(number: int, _: object) -> None:
    print(f"{signal.Signals(number).name}: left to the ranks, which get it too", file=sys.stderr, flush=True)
