"""After everything is saved: another run of the Slurm job, unless somebody cancelled it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from dino_dist.slurm import SlurmError, requeue, show_job

_DELAYS_S: Final = (0.0, 1.0, 2.0, 4.0)
"""Between tries: a controller that restarts, or is busy with a preemption, answers again soon."""
_KILL_PATIENCE_S: Final = 900.0
"""For Slurm to end a job that it preempts; its grace time is usually minutes."""
_QUEUED: Final = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")


class Outcome(Enum):
    """What became of the wish for another run."""

    REQUEUED = "Slurm runs the job again"
    ENDING = "Slurm ends the job, and knows whether it runs again"
    CANNOT = "this job cannot be requeued"
    LEFT_TO_SLURM = "Slurm preempts the job and requeues it by itself"
    REFUSED = "Slurm refuses"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An outcome, and what was said."""

    outcome: Outcome
    words: str


def ask_for_requeue(job_id: str, *, delays_s: Sequence[float] = _DELAYS_S) -> Answer:
    """Requeue a job that runs: SIGTERM means preemption or scancel, and only the state tells which.

    A preempted job stays RUNNING for its grace time; a cancelled one, or one that lost a node, is COMPLETING.
    `delays_s`: the wait before each try.
    """
    preempted, words = False, ""
    for delay_s in delays_s:
        time.sleep(delay_s)
        try:
            job = show_job(job_id)
            if job is None or job.is_over or job.state == "COMPLETING":
                state = "forgotten" if job is None else job.state
                return Answer(outcome=Outcome.ENDING, words=f"job {job_id} is {state}")
            if "0" in (job.fields.get("BatchFlag"), job.fields.get("Requeue")):
                return Answer(
                    outcome=Outcome.CANNOT, words=f"job {job_id} is no batch job, or was sent with --no-requeue"
                )
            preempted = job.preempted
            if job.state not in _QUEUED:
                requeue(job_id)
            return Answer(outcome=Outcome.REQUEUED, words=f"job {job_id} runs again, restart {job.restarts + 1}")
        except SlurmError as error:
            words = str(error)
    outcome = Outcome.LEFT_TO_SLURM if preempted else Outcome.REFUSED
    return Answer(outcome=outcome, words=f"requeue of job {job_id} failed {len(delays_s)} times: {words}")


def wait_for_kill(tick: Callable[[], None]) -> None:
    """Stay while Slurm preempts the job: one that ends by itself is not requeued. `tick` is called each second."""
    deadline = time.monotonic() + _KILL_PATIENCE_S
    while time.monotonic() < deadline:
        time.sleep(1.0)
        tick()
