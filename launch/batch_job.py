"""One job or job array as submitit and sbatch see it: the script, the environment it is sent from, the submission."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import submitit
from submitit.core.utils import FailedJobError

from dino_dist import slurm
from dino_dist.errors import UserError
from launch.job_options import JobOptions, signal_delay_s
from launch.task import TrainTask

_ANY_NUMBER_OF_TIMEOUTS: Final = 10**6
"""The run knows when it is done; how often its job reaches the time limit on the way does not matter."""
_HELD_BACK: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NEEDED_BY_CLIENTS: Final = frozenset({"SLURM_CONF", "SLURM_JWT"})
_STARTERS: Final = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_")
_RANKS: Final = frozenset({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """What is submitted in one call of sbatch: a job for one run, an array for several."""

    name: str
    folder: Path
    """submitit's files: script, pickles of the tasks, the supervisors' logs."""
    run_dirs: tuple[Path, ...]
    """A run each; its `code` is what the task of the same number imports."""
    options: JobOptions
    array_parallelism: int | None = None
    """Tasks of an array that may run at the same time; None: all."""


def script_text(job: BatchJob) -> str:
    """The batch script, exactly as `submit` hands it to sbatch; needs no Slurm here."""
    executor = _ScriptWriter(folder=job.folder)
    executor.update_parameters(**parameters(job))
    if len(job.run_dirs) > 1:
        executor.parameters["map_count"] = len(job.run_dirs)  # as submitit does for an array
    # Both are private to submitit, which has no public way to show a script without submitting it.
    return str(executor._make_submission_file_text(executor._submitit_command_str, uid=""))


def submit(job: BatchJob, tasks: Sequence[TrainTask]) -> list[str]:
    """Hand the tasks to sbatch; the job id of each. `UserError` in Slurm's words if it refuses, and nothing stays.

    To be called with `signals_held_back` until the ids are recorded.
    """
    before = _names(job.folder)
    try:
        with starters_hidden():
            executor = submitit.SlurmExecutor(folder=job.folder, max_num_timeout=_ANY_NUMBER_OF_TIMEOUTS)
            executor.update_parameters(**parameters(job))
            # submitit prints the words that its error holds as well.
            with redirect_stderr(io.StringIO()):
                submitted = executor.submit_array(tasks)
            return [str(accepted.job_id) for accepted in submitted]
    except FailedJobError as error:  # sbatch ended with an exit code
        _remove_new(job.folder, before)
        raise UserError(f"sbatch: {_slurm_words(str(error))}") from None
    except (RuntimeError, OSError) as error:  # perhaps after sbatch had accepted the job
        _cancel_jobs_of(job.folder, before)
        _remove_new(job.folder, before)
        raise UserError(f"{job.folder}: cannot submit from there: {' '.join(str(error).split())}") from error


def refusal(job: BatchJob) -> str | None:
    """Why sbatch would refuse the job, in its own words; None if it would take it. Submits nothing."""
    with starters_hidden(), tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(script_text(job))
        script.flush()
        try:
            slurm.run_slurm("sbatch", "--test-only", script.name)
        except slurm.SlurmError as error:
            return _slurm_words(str(error))
    return None


def require_slurm() -> None:
    """`UserError` where the commands of Slurm are missing."""
    for command in ("sbatch", "srun", "scontrol"):
        if shutil.which(command) is None:
            raise UserError(f"{command} is not on the PATH: submit on a machine of the cluster, or look with --dry-run")


def check_path(key: str, path: Path) -> None:
    """`UserError` for a folder that sbatch's file patterns, or the list in PYTHONPATH, would read otherwise."""
    odd = re.search(r"[%:\\\"'\x00-\x1f\x7f]", str(path))
    if odd:
        raise UserError(f"{key}={str(path)!r}: Slurm cannot use a folder with {odd[0]!r} in its path: choose another")


def parameters(job: BatchJob) -> dict[str, Any]:
    """What submitit is told; the user's own options of sbatch win."""
    options = job.options
    further: dict[str, Any] = {"requeue": True, **_node_range(options)}
    # submitit turns underscores into dashes as it writes; with them the option is the same key as its own.
    further |= {
        key.replace("-", "_"): True if value.lower() == "true" else value for key, value in options.slurm.items()
    }
    given = {
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "comment": options.comment,
        "mem": options.mem,
        "gpus_per_node": options.gpus_per_node or None,
        "time": options.time_min,
    }
    if options.nodes_min == options.nodes_max:
        given |= {"ntasks_per_node": options.tasks_per_node, "cpus_per_task": options.cpus_per_task}
    return given | {
        "job_name": job.name,
        "nodes": options.nodes_min,
        "signal_delay_s": signal_delay_s(options.time_min),
        "setup": [*options.setup, *_code_lines(job.run_dirs)],
        "array_parallelism": job.array_parallelism or len(job.run_dirs),
        "wckey": None,  # submitit's own is refused where such keys are checked
        "stderr_to_stdout": True,
        "use_srun": False,  # one supervisor, which starts the ranks itself
        "additional_parameters": further,
    }


def _node_range(options: JobOptions) -> dict[str, Any]:
    """A range of nodes is asked for with the cores of each node and no number of tasks.

    Given `--ntasks-per-node`, Slurm counts the tasks of the fewest nodes and never allocates more of them (seen with
    22.05); the supervisor's srun says how many tasks a node runs.
    """
    if options.nodes_min == options.nodes_max:
        return {}
    return {"nodes": options.nodes, "mincpus": options.tasks_per_node * (options.cpus_per_task or 1)}


def _code_lines(run_dirs: Sequence[Path]) -> list[str]:
    """Import from the run's own copy of the code, whatever lies in the folder that the job was submitted from.

    After the user's lines, which may set PYTHONPATH too.
    """
    folders = [shlex.quote(str(run_dir / "code")) for run_dir in run_dirs]
    if len(folders) == 1:
        code = folders[0]
        lines = []
    else:
        code = '"${run_code[$SLURM_ARRAY_TASK_ID]}"'
        lines = [f"run_code=({' '.join(folders)})"]
    return [*lines, "export PYTHONSAFEPATH=1", f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"']


class _ScriptWriter(submitit.SlurmExecutor):  # type: ignore[misc]  # submitit has no types
    """submitit refuses to make its own on a machine without Slurm, where a dry run is as good."""

    @classmethod
    def affinity(cls) -> int:
        """A positive number: usable."""
        return 1


@contextmanager
def starters_hidden() -> Iterator[None]:
    """Without the variables that Slurm, torchrun or submitit have set for this process.

    A job submitted from inside a job would inherit them, and sbatch prefers its own variables to the script's lines.
    """
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if (name.startswith(_STARTERS) or name in _RANKS) and name not in _NEEDED_BY_CLIENTS
    }
    unused = sorted(name for name in hidden if name.startswith("SBATCH_"))
    if unused:
        print(
            f"note: {', '.join(unused)} of the environment are not used: defaults come from cluster.yaml",
            file=sys.stderr,
        )
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Ctrl-C comes at the end of the block: in the midst of sbatch nobody would know whether there is a job.

    The main thread's. sbatch inherits the blocked signals; the handlers are for what other threads are given instead,
    such as those of a math library, which block nothing.
    """
    came: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _HELD_BACK}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in previous.items():
            signal.signal(number, handler)
        for first in came[:1]:
            signal.raise_signal(first)


def cancel(job_ids: Sequence[str]) -> None:
    """Take a submission back; where that fails, say how the user can."""
    if not job_ids:
        return
    try:
        slurm.run_slurm("scancel", *job_ids)
    except slurm.SlurmError as error:
        print(f"job {' '.join(job_ids)} is submitted and cannot be cancelled ({error})", file=sys.stderr)


def _cancel_jobs_of(folder: Path, before: frozenset[str]) -> None:
    """The job of a script that is new in `folder`, if sbatch took it before something else failed."""
    try:
        listed = slurm.run_slurm("squeue", "--me", "--noheader", "--format=%A %o").splitlines()
    except slurm.SlurmError as error:
        print(f"whether the job was submitted cannot be asked ({error}): look with squeue", file=sys.stderr)
        return
    new = {str(folder / name) for name in _names(folder) - before}
    cancel(sorted({job_id for job_id, _, script in (line.partition(" ") for line in listed) if script in new}))


def _names(folder: Path) -> frozenset[str]:
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()


def _remove_new(folder: Path, before: frozenset[str]) -> None:
    """Scripts and pickles of a call that came to nothing."""
    for name in _names(folder) - before:
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not _names(folder):
        folder.rmdir()


def _slurm_words(text: str) -> str:
    lines = [line.strip() for line in re.split(r"\n|(?:^|\s)sbatch: (?:error: )?", text)]
    return "; ".join(line for line in lines if line) or "refused without a word"
