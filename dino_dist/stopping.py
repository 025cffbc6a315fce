"""The end of a start that a signal or the clock asked for: save, commit, another run of the job, and who says so."""

from __future__ import annotations

import logging

from dino_dist.dist import World
from dino_dist.errors import FailedTogether, StopAsked
from dino_dist.exit_codes import FAILED, INTERRUPTED, STOPPED
from dino_dist.liveness import Pulse
from dino_dist.preemption import SAVE_AND_EXIT, SAVE_AND_REQUEUE, StopReason
from dino_dist.requeue import Answer, Outcome, ask_for_requeue, wait_for_kill
from dino_dist.resume import save
from dino_dist.run import Run
from dino_dist.run_session import RunSession

_log = logging.getLogger(__name__)


def stop_early(run: Run, word: int) -> int:
    """Save at this step, on all ranks, see to another run if the word says so, and leave; returns the exit code."""
    run.pulse.enter("save", run.steps_done)
    run.session.signal_row(run.steps_done, run.signals.reason)
    if not save(run, wait=True):
        failed = f"stopped at step {run.steps_done} but its checkpoint could not be written: see the ledger"
        if word == SAVE_AND_EXIT:  # nobody is to bring it back for that
            run.session.ledger_row("stop", run.steps_done, failed, exit_code=FAILED)
        raise FailedTogether(failed)
    return leave_together(run.world, run.session, word, run.steps_done, run.pulse)


def leave_together(world: World, session: RunSession, word: int, step: int, pulse: Pulse) -> int:
    """Leave on all ranks alike, with everything saved, and see to another run if the word says so; the exit code."""
    pulse.enter("leaving", step)
    answer = world.first(lambda: another_run(session, word, step))
    if world.is_first:
        _log.warning("stopped at step %d, saved; %s", step, in_words(answer))
    world.barrier()  # srun ends the others when the first has gone
    return leave(answer, pulse)


def stop_before_meeting(asked: StopAsked, reason: StopReason | None, job_id: str | None, *, is_first: bool) -> int:
    """Leave before the ranks have met: there is no ledger yet, and the other ranks may never come.

    SIGTERM alone is no reason to requeue here: srun sends it as well, when another rank has failed. What is left open
    the supervisor of a launched job settles.
    """
    _log.warning("stopped before the first step: nothing to save")
    if job_id is None:
        return STOPPED
    if asked.word != SAVE_AND_REQUEUE:
        return INTERRUPTED
    if not is_first or reason is None or reason.name == "SIGTERM":
        return STOPPED
    answer = ask_for_requeue(job_id)
    _log.warning("%s", in_words(answer))
    return leave(answer)


def another_run(session: RunSession, word: int, step: int) -> Answer | None:
    """On rank 0: ask for another run if the word says so, and enter into the ledger what came of it.

    None: nobody asks for one, or there is no job that could be requeued.
    """
    job_id = session.job_to_requeue
    answer = ask_for_requeue(job_id) if word == SAVE_AND_REQUEUE and job_id is not None else None
    if answer is None:
        session.ledger_row("stop", step, "stopped early, everything saved", exit_code=STOPPED)
    elif answer.outcome is Outcome.REQUEUED:
        session.ledger_row("requeue", step, answer.words)
    elif answer.outcome in (Outcome.ENDING, Outcome.CANNOT):
        why = f"stopped early, everything saved; no requeue: {answer.words}"
        session.ledger_row("stop", step, why, exit_code=STOPPED)
    else:
        session.ledger_row("fault", step, answer.words)
    return answer


def in_words(answer: Answer | None) -> str:
    """For the person at the terminal."""
    return "the same command goes on from here" if answer is None else f"{answer.outcome.value} ({answer.words})"


def leave(answer: Answer | None, pulse: Pulse | None = None) -> int:
    """The exit code of a saved run, once it is certain that leaving does not end its job; `FailedTogether` if it would.

    A task that exits in good order without a requeue ends the job. So where Slurm refuses one, all ranks fail; where it
    preempts the job, and requeues it by itself, they wait for its kill.
    """
    if answer is None or answer.outcome not in (Outcome.REFUSED, Outcome.LEFT_TO_SLURM):
        return STOPPED
    if answer.outcome is Outcome.LEFT_TO_SLURM:
        wait_for_kill(lambda: None if pulse is None else pulse.tick())
    raise FailedTogether(f"everything is saved, but there is no other run of the job: {answer.words}")
