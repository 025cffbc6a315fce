"""What Slurm says of jobs and nodes, in its own words where it refuses, and the requeue of a job."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Final

_PATIENCE_S: Final = 30.0
_ALREADY_REQUEUED: Final = "job is pending execution"
_UNKNOWN_JOB: Final = "invalid job id"


class SlurmError(Exception):
    """A Slurm command failed or is missing; the message is Slurm's own, in one line."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as `scontrol show job` describes it at one moment."""

    job_id: str
    state: str
    """RUNNING, PENDING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL, ..."""
    reason: str
    restarts: int
    preempted: bool
    """Slurm wants its nodes for another job and has said so."""
    end_s: float | None
    """When the time limit is reached, in seconds since the epoch by the controller's clock; None without one."""
    fields: Mapping[str, str]
    """All that Slurm said, by Slurm's names."""

    @property
    def is_over(self) -> bool:
        """It will not run again by itself."""
        return self.state not in _ALIVE


_ALIVE: Final = frozenset(
    {
        *("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"),
        *("SPECIAL_EXIT", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "RESV_DEL_HOLD"),
    }
)


def run_slurm(*command: str, timeout_s: float = _PATIENCE_S) -> str:
    """What a Slurm command prints; `SlurmError` with Slurm's words if it fails, is missing or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on the PATH: is this a machine of the cluster?") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be run ({error.strerror})") from None
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())
        raise SlurmError(words or f"{command[0]} failed with exit code {done.returncode}, without a word")
    return done.stdout


def own_job_id(environ: Mapping[str, str]) -> str | None:
    """The job that a process with this environment belongs to; None outside of Slurm.

    A task of a job array is `59_2`: one of its tasks has the array's own number as SLURM_JOB_ID, which names them all.
    """
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def parse_fields(text: str) -> dict[str, str]:
    """The `Name=value` words of `scontrol show` output; a value with blanks keeps its first word.

    The first of a name counts: a user's comment further down may hold another.
    """
    return dict(word.split("=", 1) for word in reversed(text.split()) if "=" in word)


def show_job(job_id: str) -> Job | None:
    """The job as it is now; None once Slurm has forgotten it. `SlurmError` if Slurm does not answer."""
    try:
        text = run_slurm("scontrol", "show", "job", job_id)
    except SlurmError as error:
        if _UNKNOWN_JOB in str(error).lower():
            return None
        raise
    fields = parse_fields(text)
    return Job(
        job_id=job_id,
        state=fields.get("JobState", "UNKNOWN"),
        reason=fields.get("Reason", "None"),
        restarts=int(fields.get("Restarts", "0")),
        preempted=fields.get("PreemptTime", "None") not in ("None", "Unknown"),
        end_s=_seconds(fields.get("EndTime", "Unknown")),
        fields=MappingProxyType(fields),
    )


def requeue(job_id: str) -> None:
    """Ask for another run of a job; that Slurm has requeued it already is as good. `SlurmError` if it refuses."""
    try:
        run_slurm("scontrol", "requeue", job_id)
    except SlurmError as error:
        if _ALREADY_REQUEUED not in str(error).lower():
            raise


def expand(nodelist: str) -> list[str]:
    """Names of the nodes in Slurm's short form, as in `n[0-1]`."""
    return run_slurm("scontrol", "show", "hostnames", nodelist).split()


def node_address(name: str) -> str:
    """Where a node is reached: names of nodes need not resolve."""
    return parse_fields(run_slurm("scontrol", "show", "node", name)).get("NodeAddr", name)


def _seconds(text: str) -> float | None:
    """Local time as Slurm prints it to seconds since the epoch."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # Unknown, None, or a limit that does not exist
        return None
