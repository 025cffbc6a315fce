"""After the ranks of a job have ended: name the fault, if there was one, and ask for another run, if one is due.

The ranks settle all they can themselves and say so in the ledger. What is left is what they could not: a rank that was
killed says nothing, and a job whose step has ended would end too. Nothing here may fail for want of a disk.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dino_dist.config import RunSection
from dino_dist.config_file import load_config
from dino_dist.errors import Superseded, UserError
from dino_dist.exit_codes import BAD_INPUT, DONE, FAILED, INTERRUPTED, NO_RESTART_HELPS, STOPPED
from dino_dist.ledger import Event, Ledger, read_rows
from dino_dist.manifest import committed
from dino_dist.requeue import Answer, Outcome, ask_for_requeue, wait_for_kill
from dino_dist.run_folder import RunFolder
from dino_dist.slurm import Job, SlurmError, expand, run_slurm, show_job
from launch.faulty_hosts import repeat_offenders

SUBMITTED_CONFIG: Final = "submitted.yaml"
"""In the run folder: the resolved config that each start of the job trains."""
_RETRY_DELAYS_S: Final = (0.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0)
"""Longer than a rank's: nobody else waits here, and a controller may be away for minutes."""
_TASK_ENDED: Final = re.compile(r"srun: error: (?P<host>\S+): tasks? (?P<ranks>[\d,-]+): (?P<how>.*\S)")
_NODE_LOST: Final = re.compile(r"srun: error: Node failure on (?P<host>\S+)")
_OF_THE_NODE: Final = ("Killed", "Segmentation fault", "Bus error", "Aborted", "Illegal instruction")
"""Deaths that a bad node may be to blame for; those of other signals were asked for."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the step of a job's ranks ended."""

    job_id: str
    attempts_before: int
    """Attempts of the run before the step."""
    code: int
    """srun's exit code: the highest of all ranks."""
    said: Sequence[str]
    """srun's own lines."""


def settle(folder: RunFolder, ending: Ending, *, exclude_faulty: bool) -> int:
    """See to what the ranks have left open; the exit code of the job."""
    for match in filter(None, map(_NODE_LOST.search, ending.said)):
        # The ranks elsewhere saved and left, and Slurm requeues the job, but neither says why.
        enter(folder, "fault", f"node {match['host']} failed", suspect_host=match["host"])
    ends = [
        row
        for row in rows_of(folder)
        if row["event"] in ("stop", "requeue") and row["attempt"] > ending.attempts_before
    ]
    if ends:  # the first rank that leaves makes srun end the others, so its exit code says less than the ledger
        return int(ends[-1].get("exit_code", STOPPED))
    began = first_end(ending.said)
    code = ending.code if began is None else began.exit_code
    if code in (DONE, NO_RESTART_HELPS, INTERRUPTED):
        return int(code)
    if code == STOPPED:
        answer = ask_for_requeue(ending.job_id, delays_s=_RETRY_DELAYS_S)
        return tell_answer(folder, answer, "stopped before the ranks had a ledger", after_crash=False)
    return after_a_crash(folder, ending, exclude_faulty=exclude_faulty)


def after_a_crash(folder: RunFolder, ending: Ending, *, exclude_faulty: bool) -> int:
    """Enter the fault into the ledger and requeue, unless that led nowhere several times in a row.

    Bad input is a crash like any other here: it was checked at the submission, so what is bad may be this node.
    """
    why, suspect = cause(ending)
    job = _job_now(ending.job_id)
    if job is not None and job.state != "RUNNING":
        enter(folder, "stop", f"{why}, while Slurm ends the job ({job.state}) and knows whether it runs again")
        return FAILED
    enter(folder, "fault", why, suspect_host=None if job is not None and job.preempted else suspect)
    limit = max_idle_restarts(folder)
    if idle_restarts(rows_of(folder), newest_step(folder)) >= limit:
        enter(
            folder,
            "stop",
            f"gave up: {limit} restarts in a row after a crash brought no checkpoint after step {newest_step(folder)}",
            exit_code=FAILED,
        )
        return BAD_INPUT if ending.code == BAD_INPUT else FAILED
    answer = ask_for_requeue(ending.job_id, delays_s=_RETRY_DELAYS_S)
    code = tell_answer(folder, answer, "after a crash", after_crash=True)
    if answer.outcome is Outcome.REQUEUED and exclude_faulty:
        exclude(ending.job_id, [found.host for found in repeat_offenders(rows_of(folder))])
    return code


def tell_answer(folder: RunFolder, answer: Answer, why: str, *, after_crash: bool) -> int:
    """Enter what Slurm said to the wish for another run; the exit code of the job."""
    if answer.outcome is Outcome.REQUEUED:
        enter(folder, "requeue", f"{why}: {answer.words}", after_crash=after_crash)
    elif answer.outcome is Outcome.LEFT_TO_SLURM:
        enter(folder, "fault", f"{why}: {answer.outcome.value} ({answer.words})")
        wait_for_kill(lambda: None)
    else:
        enter(folder, "stop", f"{why}: {answer.outcome.value} ({answer.words})", exit_code=FAILED)
    return FAILED if after_crash else STOPPED


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
        """The node, if it may be to blame."""
        return self.host if self.how.startswith(_OF_THE_NODE) else None


def first_end(said: Sequence[str]) -> TaskEnd | None:
    """The rank that ended first: those that follow, srun ends because of it."""
    matches = (_TASK_ENDED.match(line) for line in said)
    return next(
        (TaskEnd(ranks=found["ranks"], host=found["host"], how=found["how"]) for found in matches if found), None
    )


def cause(ending: Ending) -> tuple[str, str | None]:
    """What ended the step, in one line, and the node that may be to blame."""
    began = first_end(ending.said)
    if began is not None:
        return f"rank {began.ranks} on {began.host}: {began.how}", began.suspect_host
    words = " ".join(line for line in ending.said if "error" in line)[:300]
    return f"srun ended with exit code {ending.code}" + (f": {words}" if words else ""), None


def idle_restarts(rows: Sequence[Mapping[str, Any]], checkpoint_step: int) -> int:
    """How many restarts of this job after a crash, in a row, began at the checkpoint that is still the newest."""
    count = 0
    for row in reversed(rows):
        if row["event"] == "stop" and "exit_code" in row:  # an end for good: of a job that was submitted before
            break
        if row["event"] == "requeue" and row.get("after_crash"):
            if row["step"] != checkpoint_step:
                break
            count += 1
    return count


def max_idle_restarts(folder: RunFolder) -> int:
    """The run's own limit, or the default where its config cannot be read."""
    try:
        return load_config(str(folder.path / SUBMITTED_CONFIG)).run.max_idle_restarts
    except (UserError, OSError):
        return RunSection().max_idle_restarts


def newest_step(folder: RunFolder) -> int:
    """Of the newest checkpoint; 0 before the first."""
    try:
        return max((step for step, _ in committed(folder.checkpoints)), default=0)
    except OSError:
        return 0


def rows_of(folder: RunFolder) -> list[dict[str, Any]]:
    """The ledger; empty where it cannot be read."""
    try:
        return read_rows(folder.ledger)
    except OSError as error:
        _say(f"{folder.ledger} cannot be read ({error})")
        return []


def enter(folder: RunFolder, event: Event, why: str, **more: Any) -> None:
    """A row of the newest attempt, from no rank; said on stderr as well, for the disk may be what failed."""
    _say(why)
    try:
        with folder.join_attempt(folder.newest_attempt()) as attempt:
            ledger = Ledger(attempt, rank=None, host=os.environ.get("SLURMD_NODENAME", ""))
            ledger.append(event, step=newest_step(folder), why=why, **more)
    except (OSError, Superseded) as error:
        _say(f"the ledger did not take it: {error}")


def exclude(job_id: str, hosts: Sequence[str]) -> None:
    """Keep nodes out of the next run of a job that waits for it, besides those that its submission kept out."""
    if not hosts:
        return
    try:
        job = show_job(job_id)
        before = "(null)" if job is None else job.fields.get("ExcNodeList", "(null)")
        excluded = {*hosts, *(expand(before) if before != "(null)" else ())}
        run_slurm("scontrol", "update", f"jobid={job_id}", f"excnodelist={','.join(sorted(excluded))}")
        _say(f"the next run of job {job_id} avoids {', '.join(hosts)}")
    except SlurmError as error:
        _say(f"job {job_id} may run on {', '.join(hosts)} again: {error}")


def _job_now(job_id: str) -> Job | None:
    try:
        return show_job(job_id)
    except SlurmError:
        return None  # the requeue asks again, several times


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
