"""What a submitted job does on its first node: start the ranks with srun, name what ended them, see to another run.

The ranks save and requeue by themselves when a signal stops them. This supervisor is for what they cannot do: a rank
that was killed says nothing, and a job whose step has ended would end too. It holds no state: all it knows is on disk.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dino_dist.config_file import load_config
from dino_dist.ledger import Ledger, read_rows
from dino_dist.manifest import committed
from dino_dist.requeue import Outcome, ask_for_requeue
from dino_dist.run_folder import RunFolder
from dino_dist.slurm import Job, SlurmError, expand, own_job_id, run_slurm, show_job
from launch.faulty_hosts import repeat_offenders

SUBMITTED_CONFIG: Final = "submitted.yaml"
"""In the run folder: the resolved config that each start of the job trains."""
DONE, FAILED, BAD_INPUT, STOPPED, NO_RESTART_HELPS = 0, 1, 2, 3, 4
"""Exit codes, of a rank as of the job."""
_RETRY_DELAYS_S: Final = (0.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0)
"""Longer than a rank's: nobody else waits here, and a controller may be away for minutes."""
_TASK_ENDED: Final = re.compile(r"srun: error: (?P<host>\S+): tasks? (?P<ranks>[\d,-]+): (?P<how>.*\S)")
_NODE_LOST: Final = re.compile(r"srun: error: Node failure on (?P<host>\S+)")


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
    return after_the_step(task, folder, attempts_before, job_id, code=code, said=said)


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


def after_the_step(
    task: TrainTask, folder: RunFolder, attempts_before: int, job_id: str, *, code: int, said: Sequence[str]
) -> int:
    """Whether the ranks have settled everything themselves; if not, name the fault and ask for another run.

    `said`: srun's own lines. Returns the exit code of the job.
    """
    lost = [match["host"] for line in said for match in [_NODE_LOST.search(line)] if match]
    if lost:
        enter_lost_nodes(folder, lost)
    rows = [row for row in read_rows(folder.ledger) if row["attempt"] > attempts_before]
    ends = [row for row in rows if row["event"] in ("stop", "requeue")]
    if ends:  # the first rank that leaves makes srun end the others, so its exit code says less than the ledger
        return int(ends[-1].get("exit_code", STOPPED))
    began = first_end(said)
    for settled in (code, None if began is None else began.exit_code):
        if settled in (DONE, BAD_INPUT, STOPPED, NO_RESTART_HELPS):
            return settled
    return after_a_crash(task, folder, job_id, code=code, said=said)


def enter_lost_nodes(folder: RunFolder, hosts: Sequence[str]) -> None:
    """Name nodes that failed: ranks on the others saved and left, and Slurm requeues the job, but neither says why."""
    step = newest_step(folder)
    with folder.join_attempt(folder.newest_attempt()) as attempt:
        for host in dict.fromkeys(hosts):
            ledger = Ledger(attempt, rank=None, host=os.environ.get("SLURMD_NODENAME", ""))
            ledger.append("fault", step=step, why=f"node {host} failed", suspect_host=host)


def newest_step(folder: RunFolder) -> int:
    """Of the newest checkpoint; 0 before the first."""
    return max((step for step, _ in committed(folder.checkpoints)), default=0)


def after_a_crash(task: TrainTask, folder: RunFolder, job_id: str, *, code: int, said: Sequence[str]) -> int:
    """Enter the fault into the ledger and requeue, unless that led nowhere several times in a row."""
    why, suspect = cause(code, said)
    job = _job_now(job_id)
    slurm_ends_it = job is not None and job.state != "RUNNING" and not job.preempted
    if job is not None and slurm_ends_it:
        why = f"{why}, while Slurm ends the job ({job.state}) and knows whether it runs again"
    print(why, file=sys.stderr, flush=True)
    step = newest_step(folder)
    with folder.join_attempt(folder.newest_attempt()) as attempt:
        ledger = Ledger(attempt, rank=None, host=os.environ.get("SLURMD_NODENAME", ""))
        if slurm_ends_it:
            ledger.append("fault" if suspect else "stop", step=step, why=why, suspect_host=suspect)
            return FAILED
        ledger.append("fault", step=step, why=why, suspect_host=suspect)
        limit = load_config(str(folder.path / SUBMITTED_CONFIG)).run.max_idle_restarts
        if idle_restarts(read_rows(folder.ledger), step) >= limit:
            why = f"gave up: {limit} restarts in a row after a crash brought no checkpoint after step {step}"
            ledger.append("stop", step=step, why=why, exit_code=FAILED)
            print(f"failed: {why}; see {folder.ledger}", file=sys.stderr)
            return FAILED
        answer = ask_for_requeue(job_id, delays_s=_RETRY_DELAYS_S)
        if answer.outcome is Outcome.REQUEUED:
            ledger.append("requeue", step=step, why=f"after a crash: {answer.words}", after_crash=True)
        else:
            ledger.append("fault", step=step, why=f"no other run: {answer.words}")
    print(f"{answer.outcome.value} ({answer.words})", file=sys.stderr, flush=True)
    if answer.outcome is Outcome.REQUEUED and task.exclude_faulty:
        exclude(job_id, [found.host for found in repeat_offenders(read_rows(folder.ledger))])
    return FAILED


@dataclass(frozen=True, kw_only=True)
class TaskEnd:
    """How srun says that one or more ranks ended."""

    ranks: str
    host: str
    how: str

    @property
    def exit_code(self) -> int | None:
        """None: it did not exit by itself."""
        code = re.fullmatch(r"Exited with exit code (\d+)", self.how)
        return None if code is None else int(code[1])

    @property
    def suspect_host(self) -> str | None:
        """The node, unless the program ended by itself or took all memory: that happens anywhere."""
        by_itself = self.exit_code is not None or "memory" in self.how.lower()
        return None if by_itself else self.host


def first_end(said: Sequence[str]) -> TaskEnd | None:
    """The rank that ended first: those that follow, srun ends because of it."""
    matches = (_TASK_ENDED.match(line) for line in said)
    return next(
        (TaskEnd(ranks=found["ranks"], host=found["host"], how=found["how"]) for found in matches if found), None
    )


def cause(code: int, said: Sequence[str]) -> tuple[str, str | None]:
    """What ended the step, in one line, and the node that may be to blame."""
    began = first_end(said)
    if began is not None:
        return f"rank {began.ranks} on {began.host}: {began.how}", began.suspect_host
    words = " ".join(line for line in said if "error" in line)[:300]
    return f"srun ended with exit code {code}" + (f": {words}" if words else ""), None


def idle_restarts(rows: Sequence[Mapping[str, Any]], checkpoint_step: int) -> int:
    """How many restarts after a crash in a row began at the checkpoint that is still the newest."""
    crashes = [row for row in rows if row["event"] == "requeue" and row.get("after_crash")]
    count = 0
    for row in reversed(crashes):
        if row["step"] != checkpoint_step:
            break
        count += 1
    return count


def _job_now(job_id: str) -> Job | None:
    try:
        return show_job(job_id)
    except SlurmError:
        return None  # the requeue asks again, several times


def exclude(job_id: str, hosts: Sequence[str]) -> None:
    """Keep nodes out of the next run of a job that waits for it, besides those that its submission kept out."""
    if not hosts:
        return
    try:
        job = show_job(job_id)
        before = "(null)" if job is None else job.fields.get("ExcNodeList", "(null)")
        excluded = {*hosts, *(expand(before) if before != "(null)" else ())}
        run_slurm("scontrol", "update", f"jobid={job_id}", f"excnodelist={','.join(sorted(excluded))}")
        print(f"the next run of job {job_id} avoids {', '.join(hosts)}", file=sys.stderr)
    except SlurmError as error:
        print(f"job {job_id} may run on {', '.join(hosts)} again: {error}", file=sys.stderr)


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
    print(f"{signal.Signals(number).name}: the ranks have it too, and save", file=sys.stderr, flush=True)
