"""End a run's job for good: the ranks save first if they can, and the call returns once the job is gone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dino_dist import slurm
from dino_dist.errors import RunFailed, UserError
from dino_dist.manifest import committed
from dino_dist.run_folder import RunFolder
from launch.run_progress import progress_of
from launch.submission import Submission

_SHORTEST_PATIENCE_S: Final = 120.0
_MARGIN_S: Final = 30.0
"""For the step that is on its way and the exit, besides twice the last save."""
_LOOK_EVERY_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Cancelled:
    """How a job ended."""

    job_id: str
    state_before: str | None
    """By Slurm; None: it knew the job no longer."""
    state: str | None
    """The same, now."""
    saved_step: int | None
    """The newest committed checkpoint; None: there is none."""
    saved_now: bool
    """It was committed while the job ended."""
    how: str
    """`was not running`, `ended after SIGINT`, `ended by scancel` and when."""

    @property
    def line(self) -> str:
        """For a human."""
        saved = (
            "there is no checkpoint"
            if self.saved_step is None
            else f"the newest checkpoint is of step {self.saved_step}"
        )
        return f"job {self.job_id} {self.how}; {saved}{', saved now' if self.saved_now else ''}"


def cancel(run_dir: Path, *, wait_s: float | None = None) -> Cancelled:
    """Cancel the job of a run; a job that is over already is left as it is.

    Ranks that run get SIGINT, which means save and exit without a requeue. If the job is not over within `wait_s`
    (default: twice the last save and 30 s, at least 120 s), or comes back, plain scancel ends it. `UserError` if there
    is no such run or Slurm refuses, with Slurm's words; `RunFailed` if the job is still there `wait_s` after scancel.
    """
    run_dir = run_dir.absolute()
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir}: give the run.dir of a run")
    submission = Submission.read(run_dir)
    if submission is None:
        raise UserError(f"{run_dir} was never submitted: end a run of this machine with Ctrl-C where it was started")
    folder = RunFolder(run_dir)
    saved_before = _saved_step(folder)
    try:
        before = slurm.show_job(submission.job_id)
        how = "was not running"
        if before is not None and not before.is_over:
            how = _end(before, _patience_s(folder) if wait_s is None else wait_s)
        after = slurm.show_job(submission.job_id)
    except slurm.SlurmError as error:
        raise UserError(f"cannot cancel job {submission.job_id}: {error}") from None
    saved_step = _saved_step(folder)
    return Cancelled(
        job_id=submission.job_id,
        state_before=None if before is None else before.state,
        state=None if after is None else after.state,
        saved_step=saved_step,
        saved_now=saved_step != saved_before,
        how=how,
    )


def _end(job: slurm.Job, patience_s: float) -> str:
    """Let the ranks save and exit; scancel if none runs, they take too long, or the job comes back."""
    signalled: set[str] = set()
    deadline_s = time.monotonic() + patience_s
    now: slurm.Job | None = job
    while now is not None and not now.is_over:
        if now.restarts != job.restarts or now.state not in ("RUNNING", "COMPLETING"):
            return _scancel(job.job_id, patience_s, why=_when(now, signalled))  # no rank has anything to save
        if time.monotonic() > deadline_s:
            return _scancel(job.job_id, patience_s, why=f"since it did not end within {patience_s:g} s of SIGINT")
        if now.state == "RUNNING":
            steps = _rank_steps(job.job_id)
            if not steps and not signalled:
                return _scancel(job.job_id, patience_s, why="before a rank had started")
            for step in steps - signalled:
                _interrupt(step, job)
            signalled |= steps
        time.sleep(_LOOK_EVERY_S)
        now = slurm.show_job(job.job_id)
    return "ended after SIGINT" if signalled else "ended"


def _when(job: slurm.Job, signalled: set[str]) -> str:
    return f"when it came back as {job.state} after SIGINT" if signalled else f"while {job.state}"


def _rank_steps(job_id: str) -> set[str]:
    """The job's steps that srun started, such as `123.0` or `123_4.0`, without `123.batch` and `123.extern`."""
    listed = slurm.run_slurm("squeue", "--steps", "--noheader", f"--jobs={job_id}", "--format=%i").split()
    return {step for step in listed if step.rpartition(".")[2].isdecimal()}


def _interrupt(step: str, job: slurm.Job) -> None:
    """SIGINT to the ranks; in a job, a repeated one changes nothing."""
    try:
        slurm.run_slurm("scancel", "--signal=INT", step)
    except slurm.SlurmError:
        if step in _rank_steps(job.job_id):  # else it ended meanwhile
            raise


def _scancel(job_id: str, patience_s: float, *, why: str) -> str:
    """End a job and wait until it is gone."""
    deadline_s = time.monotonic() + patience_s
    slurm.run_slurm("scancel", job_id)
    while (job := slurm.show_job(job_id)) is not None and not job.is_over:
        if time.monotonic() > deadline_s:
            raise RunFailed(
                f"job {job_id} is still {job.state} {patience_s:g} s after scancel (a node may not answer): see "
                f"`scontrol show job {job_id}`; it will not run again"
            )
        if job.state != "COMPLETING":
            slurm.run_slurm("scancel", job_id)  # it was requeued at the same moment
        time.sleep(_LOOK_EVERY_S)
    return f"ended by scancel {why}"


def _patience_s(folder: RunFolder) -> float:
    try:
        save_s = progress_of(folder).save_s
    except UserError:  # a job can be cancelled whatever became of the run's files
        save_s = None
    return max(_SHORTEST_PATIENCE_S, 2 * (save_s or 0.0) + _MARGIN_S)


def _saved_step(folder: RunFolder) -> int | None:
    saved = committed(folder.checkpoints) if folder.checkpoints.is_dir() else []
    return saved[0][0] if saved else None
