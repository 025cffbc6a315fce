"""The record of what was handed to Slurm for a run, `RUN/submission.json`, and the list of all records of this user."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from dino_dist import slurm
from dino_dist.errors import UserError
from dino_dist.run_folder import fsync_folder

FILE: Final = "submission.json"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job as it was submitted; what became of it, Slurm and the ledger know."""

    job_id: str
    """`123`, or `123_0` for a task of a job array."""
    submitted: str
    """ISO 8601, UTC."""
    run_dir: str
    argv: list[str]
    """The command line as it was typed."""
    config_file: str
    """What each start of the job trains."""
    nodes_min: int
    nodes_max: int
    tasks_per_node: int
    gpus_per_node: int
    time_min: int | None
    """Time limit in minutes; None: the partition's."""
    partition: str | None
    slurm_folder: str
    """Where submitit keeps its files and the supervisor's log."""
    code: dict[str, Any]
    """What the snapshot of the code says of itself."""

    def write(self, run_dir: Path) -> None:
        """Put the record into the run folder, whole or not at all, and on the user's list.

        The list is a convenience: where it cannot be written, one line on stderr says so. `UserError` if the run folder
        cannot be written.
        """
        file = run_dir / FILE
        temporary = file.with_name(f".{FILE}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as opened:
                json.dump(asdict(self), opened, indent=1)
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(temporary, file)
            fsync_folder(run_dir)
        except OSError as error:
            raise UserError(
                f"{file} cannot be written ({error.strerror}): free some space or choose another run.dir"
            ) from error
        _register(self)

    @staticmethod
    def read(run_dir: Path) -> Submission | None:
        """The record of a run folder; None if it was never submitted; `UserError` if the file is no record."""
        file = run_dir / FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{file} cannot be read ({_one_line(error)}): restore it, or remove it if no job runs"
            ) from None
        return _checked(content, file)


def live_job(submission: Submission) -> slurm.Job | None:
    """The job while it may still run: queued, running, completing or requeued; None once it is over or forgotten.

    `slurm.SlurmError` if Slurm does not answer: whether the job lives is not known then.
    """
    job = slurm.show_job(submission.job_id)
    return None if job is None or job.is_over else job


def registry_file(environment: Mapping[str, str] | None = None) -> Path:
    """The user's list of submissions: `$XDG_STATE_HOME/dino_dist/submissions.jsonl`."""
    variables = os.environ if environment is None else environment
    state_home = variables.get("XDG_STATE_HOME", "")
    # The standard of these variables says that a relative path is to be ignored.
    base = Path(state_home) if os.path.isabs(state_home) else Path(variables.get("HOME", "/")) / ".local" / "state"
    return base / "dino_dist" / "submissions.jsonl"


def _register(submission: Submission) -> None:
    file = registry_file()
    row = {"job_id": submission.job_id, "run_dir": submission.run_dir, "submitted": submission.submitted}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, (json.dumps(row) + "\n").encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        print(
            f"note: {file} cannot be written ({error.strerror}): `status` without RUN will not list it", file=sys.stderr
        )


def _checked(content: Any, file: Path) -> Submission:
    known = {field.name: str(field.type) for field in fields(Submission)}
    if not isinstance(content, dict) or not known.keys() <= content.keys():
        missing = sorted(known.keys() - content.keys()) if isinstance(content, dict) else ["everything"]
        raise UserError(f"{file} is no record of a submission (lacks {', '.join(missing)}): restore or remove it")
    for name, kind in known.items():
        if not _fits(content[name], kind):
            raise UserError(
                f"{file} is no record of a submission ({name}={content[name]!r} is not {kind}): restore or remove it"
            )
    return Submission(**{name: content[name] for name in known})


def _fits(value: Any, kind: str) -> bool:
    if kind == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind.startswith("dict"):
        return isinstance(value, dict)
    if value is None:
        return kind.endswith("| None")
    wanted = int if kind.startswith("int") else str
    return isinstance(value, wanted) and not isinstance(value, bool)


def _one_line(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return " ".join(str(strerror or error).split())
