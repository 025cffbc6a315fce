"""The end of a start that a signal or the clock asked for: save, commit, another run of the job, and who says so."""

from __future__ import annotations

import logging
import time

from dino_dist.errors import FailedTogether, StopAsked
from dino_dist.preemption import SAVE_AND_REQUEUE, TimeLimit
from dino_dist.requeue import Answer, Outcome, ask_for_requeue
from dino_dist.resume import save
from dino_dist.run import Run
from dino_dist.slurm import SlurmError, show_job

_log = logging.getLogger(__name__)

STOPPED = 3
"""Exit code: a signal stopped the run and everything is saved."""
_PATIENCE_S = 900.0
"""For Slurm to end a job that it preempts; its grace time is usually minutes."""


def job_time_limit(job_id: str) -> TimeLimit | None:
    """When Slurm will end the job; a controller that does not answer now is no reason not to train."""

    def ask() -> float | None:
        job = show_job(job_id)
        return None if job is None else job.end_s

    try:
        return TimeLimit(ask)
    except SlurmError as error:
        _log.warning("the job's time limit is not known (%s): only signals stop this run", error)
        return None


def stop_early(run: Run, word: int) -> int:
    """Save at this step, on all ranks, see to another run if the word says so, and leave; returns the exit code."""
    run.pulse.enter("save", run.steps_done)
    run.session.signal_row(run.steps_done, run.signals.reason)
    if not save(run, wait=True):
        raise FailedTogether(
            f"stopped at step {run.steps_done} but its checkpoint could not be written: see the ledger"
        )
    run.pulse.enter("leaving", run.steps_done)
    job_id = run.session.job_id if run.config.run.requeue else None
    if word != SAVE_AND_REQUEUE or job_id is None:
        why = "stopped early, everything saved"
        run.session.ledger_row("stop", run.steps_done, why, exit_code=STOPPED)
        run.monitor.say(f"stopped at step {run.steps_done}, saved; the same command goes on from here")
        return STOPPED
    answer = run.world.first(lambda: ask_for_requeue(job_id))
    if answer.outcome is Outcome.REQUEUED:
        run.session.ledger_row("requeue", run.steps_done, answer.words)
    elif answer.outcome is Outcome.CANCELLED:
        why = f"stopped early, everything saved; {answer.words}: no requeue"
        run.session.ledger_row("stop", run.steps_done, why, exit_code=STOPPED)
    else:
        run.session.ledger_row("fault", run.steps_done, answer.words)
    run.monitor.say(f"stopped at step {run.steps_done}, saved; {answer.outcome.value} ({answer.words})")
    run.world.barrier()  # srun ends the others when the first has gone
    return leave(answer)


def stop_at_start(asked: StopAsked, job_id: str | None, *, is_first: bool) -> int:
    """Leave before there is anything new to save; rank 0 sees to another run. Returns the exit code."""
    if not is_first:
        return STOPPED
    if asked.word != SAVE_AND_REQUEUE or job_id is None:
        _log.warning("stopped before the first step of this start: nothing new to save")
        return STOPPED
    answer = ask_for_requeue(job_id)
    _log.warning("stopped before the first step of this start: %s (%s)", answer.outcome.value, answer.words)
    return leave(answer)


def leave(answer: Answer) -> int:
    """The exit code of a saved run, once it is certain that leaving does not end its job; `FailedTogether` if it would.

    A task that exits in good order without a requeue ends the job. So where Slurm refuses one, all ranks fail; where it
    preempts the job, and requeues it by itself, they wait for its kill.
    """
    if answer.outcome is Outcome.LEFT_TO_SLURM:
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(1.0)
    if answer.outcome in (Outcome.REFUSED, Outcome.LEFT_TO_SLURM):
        raise FailedTogether(f"everything is saved, but there is no other run of the job: {answer.words}")
    return STOPPED
