"""`dino-dist launch --wait`: stay until the submitted jobs are over for good, through all their requeues."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Final

from dino_dist import slurm
from dino_dist.ledger import read_rows
from dino_dist.run_folder import RunFolder

_POLL_S: Final = 3.0
_REACHED: Final = "reached train.length"


def wait_for(jobs: Mapping[str, Path], *, poll_s: float = _POLL_S) -> list[str]:
    """Block until no job (id: run folder) will run again; the ids of those whose run did not reach its length.

    Changes of state are said on stderr. A controller that does not answer is asked again, for ever.
    """
    told: dict[str, str] = {}
    over: dict[str, int] = dict.fromkeys(jobs, 0)
    while min(over.values()) < 2:  # seen twice: between two runs of a job nobody promises a state
        for job_id in (job_id for job_id, seen in over.items() if seen < 2):
            try:
                job = slurm.show_job(job_id)
            except slurm.SlurmError as error:
                _tell(told, job_id, f"unknown: {error}")
                continue
            over[job_id] = over[job_id] + 1 if job is None or job.is_over else 0
            _tell(told, job_id, _described(job))
        time.sleep(poll_s)
    return [job_id for job_id, run_dir in jobs.items() if not reached_its_length(run_dir)]


def reached_its_length(run_dir: Path) -> bool:
    """Whether the last start of a run ended because there was nothing left to train."""
    ends = [row for row in read_rows(RunFolder(run_dir).ledger) if row.get("event") in ("start", "stop")]
    return bool(ends) and ends[-1].get("event") == "stop" and ends[-1].get("why") == _REACHED


def _described(job: slurm.Job | None) -> str:
    if job is None:
        return "over, and no longer known to Slurm"
    reason = f" ({job.reason})" if job.state == "PENDING" and job.reason != "None" else ""
    nodes = job.fields.get("NodeList", "")
    where = f" on {nodes}" if job.state == "RUNNING" and nodes not in ("", "(null)") else ""
    times = f", restart {job.restarts}" if job.restarts else ""
    return f"{job.state}{reason}{where}{times}{', preempted' if job.preempted else ''}"


def _tell(told: dict[str, str], job_id: str, text: str) -> None:
    if told.get(job_id) != text:
        told[job_id] = text
        print(f"{datetime.now():%H:%M:%S} job {job_id}: {text}", file=sys.stderr, flush=True)
