"""From a config to a queued job: checked, planned, copied, submitted and recorded, or nothing of it at all."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dino_dist import slurm
from dino_dist.config import Config
from dino_dist.config_file import load_config, to_yaml
from dino_dist.errors import UserError
from dino_dist.fencing import utc_now
from dino_dist.run_folder import RunFolder
from launch import batch_job, snapshot
from launch.aftermath import SUBMITTED_CONFIG
from launch.batch_job import BatchJob
from launch.job_options import JobOptions
from launch.plan import Plan, index_dir_of, make_plan
from launch.preflight import check_submission
from launch.submission import FILE, Submission, live_job
from launch.task import TrainTask

_LOCK: Final = "submission.lock"
_CODE_BEFORE: Final = ".code.before"
"""Where the snapshot of an earlier submission waits until the new one is accepted."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that a call of `dino-dist launch` asks for."""

    configs: tuple[Config, ...]
    """A run each, with absolute `run.dir`; several are a sweep."""
    base_dir: Path
    """The run's folder, or the one that all runs of a sweep share."""
    options: JobOptions
    argv: tuple[str, ...]
    """The command line as typed."""
    accept_changes: bool = False
    exclude_faulty: bool = False
    array_parallelism: int | None = None
    probe: bool = True
    """Ask a free node whether it can write into the run folder."""

    @property
    def job(self) -> BatchJob:
        """The job as sbatch sees it."""
        return BatchJob(
            name=f"dino-{self.base_dir.name}",
            folder=self.base_dir / "slurm",
            run_dirs=tuple(Path(config.run.dir) for config in self.configs),
            options=self.options,
            array_parallelism=self.array_parallelism,
        )


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A run whose job Slurm has accepted."""

    job_id: str
    run_dir: Path
    plan: Plan

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"job_id": self.job_id, "run_dir": str(self.run_dir), "plan": self.plan.as_json()}


def load_runs(name: str, overrides: Sequence[str], sweep: Sequence[str]) -> tuple[Path, tuple[Config, ...]]:
    """The folder of the job, and the configs of its runs; each `key=value ...` of `sweep` is a run of its own.

    A run of a sweep lives in `run.dir/000`, `001`, ..., unless it sets `run.dir` itself.
    """
    base = _placed(load_config(name, overrides), None)
    base_dir = Path(base.run.dir)
    if not sweep:
        return base_dir, (base,)
    configs = []
    for number, entry in enumerate(sweep):
        own = _words(entry)
        try:
            config = load_config(name, [*overrides, *own])
        except UserError as error:
            raise UserError(f"--sweep {entry!r}: {error}") from None
        places_itself = any(word.partition("=")[0].strip() == "run.dir" for word in own)
        configs.append(_placed(config, None if places_itself else base_dir / f"{number:03d}"))
    folders = [config.run.dir for config in configs]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise UserError(f"--sweep: two runs have run.dir={twice}: give each its own")
    return base_dir, tuple(configs)


def plan_all(request: Request, *, dry_run: bool) -> list[Plan]:
    """The plan of each run; `UserError` for anything that its ranks would refuse."""
    plans = []
    for config in request.configs:
        run_dir = Path(config.run.dir)
        with index_dir_of(run_dir, dry_run=dry_run) as index_dir:
            plans.append(make_plan(config, request.options, index_dir=index_dir, accept_changes=request.accept_changes))
    return plans


def submit(request: Request) -> list[Submitted]:
    """Submit, and record what was submitted in each run folder.

    `UserError` before anything is submitted if the config, the folder or the cluster cannot do it, and in Slurm's words
    if sbatch refuses; then the folders are as they were. If the submission cannot be recorded the job is cancelled.
    """
    batch_job.require_slurm()
    run_dirs = request.job.run_dirs
    for run_dir in run_dirs:
        _refuse_live(run_dir)  # looked at again under the lock; now, because what follows takes seconds
    plans = plan_all(request, dry_run=False)
    _preflight(request)
    with ExitStack() as locks, ExitStack() as undo:
        codes = []
        for config, run_dir in zip(request.configs, run_dirs, strict=True):
            new = _missing(run_dir)
            RunFolder(run_dir).create()
            locks.enter_context(_locked(run_dir))
            undo.callback(_remove_empty, run_dir, new)
            _refuse_live(run_dir)
            undo.callback(_put_back, run_dir / SUBMITTED_CONFIG, _content(run_dir / SUBMITTED_CONFIG))
            codes.append(_take_code(run_dir, undo))
            _write(run_dir / SUBMITTED_CONFIG, to_yaml(config).encode())
        with batch_job.signals_held_back():
            job_ids = batch_job.submit(request.job, [_task(request, run_dir) for run_dir in run_dirs])
            undo.callback(batch_job.cancel, job_ids)
            for job_id, run_dir, code in zip(job_ids, run_dirs, codes, strict=True):
                undo.callback(_put_back, run_dir / FILE, _content(run_dir / FILE))
                _record(request, job_id, run_dir, code).write(run_dir)
        undo.pop_all()
        for run_dir in run_dirs:
            shutil.rmtree(run_dir / _CODE_BEFORE, ignore_errors=True)
    return [
        Submitted(job_id=job_id, run_dir=Path(plan.run_dir), plan=plan)
        for job_id, plan in zip(job_ids, plans, strict=True)
    ]


def _placed(config: Config, run_dir: Path | None) -> Config:
    """With an absolute `run.dir`: the job may start anywhere."""
    absolute = (run_dir or Path(config.run.dir).expanduser()).absolute()
    batch_job.check_path("run.dir", absolute)
    return replace(config, run=replace(config.run, dir=str(absolute)))


def _words(entry: str) -> list[str]:
    try:
        words = shlex.split(entry)
    except ValueError as error:
        raise UserError(f"--sweep {entry!r}: {str(error).lower()}: write 'key=value key=value'") from None
    if not words:
        raise UserError("--sweep '': give at least one key=value")
    return words


def _preflight(request: Request) -> None:
    """Say what may go wrong on this cluster; `UserError` for a job that would be lost, in Slurm's words too."""
    findings = check_submission(request.configs[0], request.options, request.base_dir, probe=request.probe)
    for finding in findings:
        if finding.works is False and not finding.fatal:
            print(f"warning: {finding.detail}", file=sys.stderr)
    for finding in findings:
        if finding.fatal:
            words = None if finding.what == "Slurm" else batch_job.refusal(request.job)  # where it answers at all
            raise UserError(finding.detail + (f" (sbatch: {words})" if words else ""))


def _task(request: Request, run_dir: Path) -> TrainTask:
    return TrainTask(
        run_dir=str(run_dir),
        tasks_per_node=request.options.tasks_per_node,
        cpus_per_task=request.options.cpus_per_task,
        srun_args=request.options.srun_args,
        exclude_faulty=request.exclude_faulty,
        accept_changes=request.accept_changes,
    )


def _record(request: Request, job_id: str, run_dir: Path, code: dict[str, Any]) -> Submission:
    options = request.options
    return Submission(
        job_id=job_id,
        submitted=utc_now(),
        run_dir=str(run_dir),
        argv=list(request.argv),
        config_file=str(run_dir / SUBMITTED_CONFIG),
        nodes_min=options.nodes_min,
        nodes_max=options.nodes_max,
        tasks_per_node=options.tasks_per_node,
        gpus_per_node=options.gpus_per_node,
        time_min=options.time_min,
        partition=options.partition,
        slurm_folder=str(request.job.folder),
        code=code,
    )


def _missing(run_dir: Path) -> list[Path]:
    """The folders that a run folder's creation will make, the run folder first."""
    return [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]


def _remove_empty(run_dir: Path, new: Sequence[Path]) -> None:
    """Take back what the creation of a run folder made, but for what others have put there since."""
    if not new:
        return
    folder = RunFolder(run_dir)
    for lock in (run_dir / _LOCK, run_dir / ".code.lock"):
        lock.unlink(missing_ok=True)
    for made in (folder.tensorboard, folder.checkpoints, folder.code, folder.logs, folder.attempts, *new):
        if made.is_dir() and not any(made.iterdir()):
            made.rmdir()


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Two submissions of one run at the same time: the second is refused. The lock ends with this process."""
    taken = f"run.dir={run_dir}: another `dino-dist launch` submits it at this moment"
    path = run_dir / _LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(taken) from None
        except OSError as error:
            print(f"note: {run_dir} has no file locks ({error.strerror}): submit it once only", file=sys.stderr)
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise UserError(taken)  # another one, which failed, has just removed the file
        yield
    finally:
        os.close(descriptor)


def _refuse_live(run_dir: Path) -> None:
    submission = Submission.read(run_dir)
    if submission is None:
        return
    try:
        job = live_job(submission)
    except slurm.SlurmError as error:
        raise UserError(f"scontrol: {error}", may_pass=True) from None
    if job is not None:
        raise UserError(
            f"run.dir={run_dir} is in use: its job {submission.job_id} is {job.state}: let it end, end it with "
            f"`dino-dist cancel {shlex.quote(str(run_dir))}`, or choose another run.dir"
        )


def _take_code(run_dir: Path, undo: ExitStack) -> dict[str, Any]:
    """The snapshot; what was there before comes back if the submission comes to nothing."""
    folder, before = RunFolder(run_dir), run_dir / _CODE_BEFORE
    shutil.rmtree(before, ignore_errors=True)  # of a submission that was killed
    folder.code.rename(before)

    def put_back() -> None:
        shutil.rmtree(folder.code, ignore_errors=True)
        before.rename(folder.code)

    undo.callback(put_back)
    return snapshot.take(folder)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _put_back(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink(missing_ok=True)
    else:
        _write(file, content)


def _write(file: Path, content: bytes) -> None:
    """A file, whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{file} cannot be written ({error.strerror}): free some space or choose another run.dir"
        ) from error
