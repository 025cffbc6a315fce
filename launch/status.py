"""The one place that says how a run does: its job by Slurm, its progress by its own files, the hosts to avoid."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from dino_dist import slurm
from dino_dist.errors import UserError
from dino_dist.ledger import read_rows
from dino_dist.run_folder import RunFolder
from launch.faulty_hosts import repeat_offenders
from launch.run_progress import Progress, progress_of
from launch.submission import FILE, Submission, registry_file

_WIDTH: Final = 160
_FAULT_KEYS: Final = ("time", "step", "attempt", "rank", "host", "suspect_host", "why")
_RUNNING_BY_SACCT: Final = ("PENDING", "RUNNING", "REQUEUED", "RESIZING", "SUSPENDED")
_NOTHING: Final = ("", "None", "(null)", "N/A")


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What Slurm says of a job."""

    state: str
    source: str
    """The command that said it."""
    is_over: bool
    """It will not run again by itself."""
    reason: str | None = None
    nodes: str | None = None
    requeues: int | None = None


def status_of(run_dir: Path) -> dict[str, Any]:
    """All that is known of a run, as plain values; None where nothing is known.

    `state` comes from the first that knows it, named in `state_from`: scontrol, squeue, sacct, or the run's own ledger;
    `run_state` is always the ledger's (see `run_progress.Progress`). `eta_s` is the training that is left at the last
    speed, without queueing, evaluation and saves. `notes` says in lines what could not be found out and why.
    `UserError` if there is no such run.
    """
    run_dir = run_dir.absolute()
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir}: give the run.dir of a run")
    submission = Submission.read(run_dir)
    progress = progress_of(RunFolder(run_dir))
    if submission is None and progress.state == "NEW" and not (run_dir / "submitted.yaml").exists():
        raise UserError(f"{run_dir} holds no run (neither {FILE} nor attempts/): give the run.dir of a run")
    notes = list(progress.notes)
    job = None if submission is None else ask_slurm(submission.job_id, notes)
    if job is None or (progress.state == "RUNNING" and job.is_over):  # then it was started by hand since
        job = JobState(state=progress.state, source="ledger", is_over=progress.state != "RUNNING")
    return _report(run_dir, submission, job, progress, notes)


def all_runs(newest: int | None = 20) -> list[dict[str, Any]]:
    """The status of this user's submitted runs, the last submitted first; runs whose folder is gone are left out.

    A run that cannot be read has its folder and `error` only.
    """
    folders: dict[Path, None] = {}
    for row in reversed(read_rows(registry_file())):
        if isinstance(row.get("run_dir"), str):
            folders[Path(row["run_dir"])] = None
    found: list[dict[str, Any]] = []
    for run_dir in folders:
        if newest is not None and len(found) >= newest:
            break
        if run_dir.is_dir():
            try:
                found.append(status_of(run_dir))
            except UserError as error:
                found.append({"run_dir": str(run_dir), "error": str(error)})
    return found


def ask_slurm(job_id: str, notes: list[str]) -> JobState | None:
    """The job by scontrol, else squeue, else sacct; None if none of them knows it, with a note."""
    try:
        job = slurm.show_job(job_id)
        if job is not None:
            return JobState(
                state=job.state,
                source="scontrol",
                is_over=job.is_over,
                reason=None if job.reason in _NOTHING else job.reason,
                nodes=None if job.fields.get("NodeList", "") in _NOTHING else job.fields["NodeList"],
                requeues=job.restarts,
            )
        unknown = f"Slurm no longer knows job {job_id}"
    except slurm.SlurmError as error:
        unknown = f"job {job_id}: {error}"
        queued = _squeue(job_id)
        if queued is not None:
            return queued
    accounted = _sacct(job_id)
    if accounted is None:
        notes.append(f"{unknown}, and there is no accounting to ask: the state is the ledger's")
    return accounted


def _squeue(job_id: str) -> JobState | None:
    try:
        lines = slurm.run_slurm("squeue", "--noheader", "--jobs", job_id, "--format", "%T|%r|%N").splitlines()
    except slurm.SlurmError:
        return None
    state, reason, nodes = [*lines[0].split("|"), "", ""][:3] if lines else ("", "", "")
    if not state:
        return None
    return JobState(
        state=state,
        source="squeue",
        is_over=False,
        reason=None if reason in _NOTHING else reason,
        nodes=None if nodes in _NOTHING else nodes,
    )


def _sacct(job_id: str) -> JobState | None:
    """Many sites keep no accounts: sacct then fails."""
    try:
        text = slurm.run_slurm("sacct", "-n", "-X", "-P", "-j", job_id, "-o", "State,NodeList")
    except slurm.SlurmError:
        return None
    if not text.strip():
        return None
    state, _, nodes = text.strip().splitlines()[-1].partition("|")
    state = state.split()[0]  # as in "CANCELLED by 1000"
    return JobState(
        state=state,
        source="sacct",
        is_over=state not in _RUNNING_BY_SACCT,
        nodes=None if nodes in _NOTHING else nodes,
    )


def _report(
    run_dir: Path, submission: Submission | None, job: JobState, progress: Progress, notes: list[str]
) -> dict[str, Any]:
    faulty = repeat_offenders(progress.ledger)
    return {
        "run_dir": str(run_dir),
        "job_id": None if submission is None else submission.job_id,
        "submitted": None if submission is None else submission.submitted,
        "partition": None if submission is None else submission.partition,
        "state": job.state,
        "state_from": job.source,
        "run_state": progress.state,
        "job_is_over": submission is not None and job.is_over and job.source != "ledger",
        "reason": job.reason,
        "nodes": job.nodes,
        "step": progress.step,
        "total_steps": progress.total_steps,
        "images_per_s": progress.images_per_s,
        "eta_s": progress.left_s,
        "checkpoint_step": progress.checkpoint_step,
        "attempts": progress.attempts,
        "restarts": progress.restarts,
        "requeues": job.requeues,
        "last_row_age_s": progress.last_row_age_s,
        "last_event": progress.last_event,
        "last_fault": _chosen(progress.last_fault),
        "suggest_exclude": [host.host for host in faulty],
        "commit": None if submission is None else submission.code.get("commit"),
        "notes": notes,
    }


def _chosen(fault: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if fault is None else {key: fault[key] for key in _FAULT_KEYS if key in fault}


def print_status(status: Mapping[str, Any]) -> None:
    """One run as a table of two columns."""
    table = Table(show_header=False)
    for name, text in _lines(status):
        table.add_row(name, text)
    _console().print(table)
    for note in status.get("notes", []):
        _console().print(f"note: {note}", soft_wrap=True)


def print_runs(statuses: Sequence[Mapping[str, Any]]) -> None:
    """Several runs, one a row."""
    if not statuses:
        known = registry_file()
        _console().print(f"no submitted runs are known ({known} lists none); name one: status RUN", soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("job", "state", "step", "images/s", "left", "restarts", "last fault"):
        table.add_column(name, no_wrap=name != "last fault")
    table.add_column("run", overflow="fold")  # whole, for the next command
    for status in statuses:
        if "error" not in status:
            table.add_row(*_row(status), status["run_dir"])
    _console().print(table)
    for status in statuses:
        if "error" in status:
            _console().print(f"note: {status['error']}", soft_wrap=True)


def _row(status: Mapping[str, Any]) -> tuple[str, ...]:
    fault, total = status["last_fault"], status["total_steps"]
    # A run that was stopped and saved all is no failure, though its job has an exit code.
    settled = status["job_is_over"] and status["run_state"] in ("COMPLETED", "STOPPED")
    return (
        status["job_id"] or "",
        status["run_state"] if settled else status["state"],
        f"{status['step']}/{'?' if total is None else total}",
        _number(status["images_per_s"], "{:.1f}"),
        duration_text(status["eta_s"]),
        str(status["restarts"]),
        "" if fault is None else f"step {fault.get('step')} on {fault.get('host')}",
    )


def _console() -> Console:
    # n[0-1] is no markup; a file or pipe has no width of its own.
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


def _lines(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a human reads, without what is not known."""
    reason = f", {status['reason']}" if status["reason"] else ""
    differs = status["job_is_over"] and status["run_state"] != status["state"]
    by_files = f"; by its files {status['run_state']}" if differs else ""
    total = status["total_steps"]
    done = f" ({status['step'] / total:.1%})" if total else ""
    fault = status["last_fault"]
    texts = {
        "run": status["run_dir"],
        "job": _job_text(status),
        "state": f"{status['state']}{reason} (says {status['state_from']}{by_files})",
        "step": f"{status['step']} of {'?' if total is None else total}{done}",
        "images/s": _number(status["images_per_s"], "{:.1f}"),
        "left": duration_text(status["eta_s"]),
        "checkpoint": "none yet" if status["checkpoint_step"] is None else f"step {status['checkpoint_step']}",
        "attempts": str(status["attempts"]),
        "restarts": str(status["restarts"]),
        "last row": "" if status["last_row_age_s"] is None else f"{duration_text(status['last_row_age_s'])} ago",
        "last event": _event_text(status["last_event"]),
        "last fault": "" if fault is None else _event_text({"event": "fault", **fault}),
        "exclude": ", ".join(status["suggest_exclude"]) and f"{','.join(status['suggest_exclude'])} (repeated faults)",
    }
    return [(name, text) for name, text in texts.items() if text]


def _job_text(status: Mapping[str, Any]) -> str:
    if status["job_id"] is None:
        return ""
    where = [text for text in (status["partition"], status["nodes"]) if text]
    return f"{status['job_id']} on {', '.join(where)}" if where else str(status["job_id"])


def _event_text(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    where = f" on {row['host']}" if row.get("host") else ""
    return f"{str(row.get('time'))[:19]} {row.get('event')} at step {row.get('step')}{where}: {row.get('why')}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def duration_text(seconds: float | None) -> str:
    """`1:02:03`, `2 days, 0:00:01`; empty if unknown."""
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))
