"""What the ranks of a run, or the supervisor of its job, printed: the last lines, and on as they come."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from dino_dist import slurm
from dino_dist.errors import UserError
from dino_dist.run_folder import RunFolder
from launch.run_progress import is_running
from launch.submission import Submission, live_job

DEFAULT_LINES: Final = 200

_RANK_FILE: Final = re.compile(r"rank-(\d{5,})\.log")
_BLOCK_BYTES: Final = 1 << 16
_LOOK_EVERY_S: Final = 0.5
_ASK_EVERY_S: Final = 5.0
"""Of Slurm, whose controller serves everybody."""


def show_logs(
    run_dir: Path,
    *,
    rank: int = 0,
    lines: int = DEFAULT_LINES,
    follow: bool = False,
    supervisor: bool = False,
    out: BinaryIO | None = None,
) -> None:
    """Write the last `lines` lines of a rank's log (or the supervisor's) to `out`, by default stdout.

    With `follow`, then what is added, until Ctrl-C or the run is over. `UserError` if there is no such run or rank, or
    its job still waits (with `follow`, this waits with it).
    """
    run_dir = run_dir.absolute()
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir}: give the run.dir of a run")
    submission = Submission.read(run_dir)
    sink = sys.stdout.buffer if out is None else out
    try:
        files = _find(run_dir, submission, rank=rank, supervisor=supervisor, wait=follow)
        ends = [_show_end(file, lines, sink, title=len(files) > 1) for file in files]
        if follow:
            _follow(files, ends, sink, is_over=lambda: not _is_alive(run_dir, submission))
    except KeyboardInterrupt:  # the usual end of following
        return


def _find(run_dir: Path, submission: Submission | None, *, rank: int, supervisor: bool, wait: bool) -> list[Path]:
    """The files to show; `UserError` says why there are none."""
    while True:
        files = _supervisor_files(run_dir, submission) if supervisor else _rank_files(run_dir, rank)
        if files:
            return files
        waiting = _why_waiting(submission) if supervisor or not _ranks(run_dir) else None
        if waiting is None:
            raise UserError(_why_nothing(run_dir, submission, rank=rank, supervisor=supervisor))
        if not wait:
            raise UserError(f"{waiting}: no output yet; -f waits for it")
        print(waiting, file=sys.stderr)
        time.sleep(_ASK_EVERY_S)


def _rank_files(run_dir: Path, rank: int) -> list[Path]:
    file = RunFolder(run_dir).logs / f"rank-{rank:05d}.log"
    return [file] if file.is_file() else []


def _supervisor_files(run_dir: Path, submission: Submission | None) -> list[Path]:
    if submission is None:
        raise UserError(f"{run_dir} was never submitted, so that no supervisor wrote a log: leave out --job")
    folder = Path(submission.slurm_folder)
    files = (folder / f"{submission.job_id}_0_log.{end}" for end in ("out", "err"))
    return [file for file in files if file.is_file()]


def _why_waiting(submission: Submission | None) -> str | None:
    """A line on a job that has not come to write anything; None for all others."""
    job = _live(submission)
    if submission is None or job is None:
        return None
    reason = "" if job.reason in ("", "None") else f" ({job.reason})"
    return f"job {submission.job_id} is {job.state}{reason}"


def _why_nothing(run_dir: Path, submission: Submission | None, *, rank: int, supervisor: bool) -> str:
    if supervisor and submission is not None:
        return f"job {submission.job_id} left no log in {submission.slurm_folder}: it never started"
    logs, ranks = RunFolder(run_dir).logs, _ranks(run_dir)
    if ranks:
        return f"--rank {rank}: no such log in {logs}; there are ranks {_ranges(ranks)}"
    if submission is None:
        return f"{run_dir} was never submitted: its ranks wrote to the terminal they were started in"
    return f"{logs} holds no rank's log: see why with --job"


def _ranks(run_dir: Path) -> list[int]:
    names = (_RANK_FILE.fullmatch(path.name) for path in RunFolder(run_dir).logs.glob("rank-*.log"))
    return sorted(int(match[1]) for match in names if match)


def _ranges(ranks: Sequence[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _show_end(file: Path, lines: int, sink: BinaryIO, *, title: bool) -> int:
    """Write the last lines of a file; where it ended, in bytes."""
    with open(file, "rb") as opened:
        end = opened.seek(0, 2)
        start = _start_of_last_lines(opened, end, lines)
        opened.seek(start)
        if title:
            sink.write(f"==> {file} <==\n".encode())
        left = end - start
        while left > 0 and (block := opened.read(min(left, _BLOCK_BYTES))):
            sink.write(block)
            left -= len(block)
    sink.flush()
    return end


def _start_of_last_lines(opened: BinaryIO, end: int, lines: int) -> int:
    """Where the last `lines` lines begin: read from the end, since a log may be larger than memory."""
    position, missing = end, lines + 1  # the newline before the first line that is wanted
    if lines <= 0:
        return end
    if end and _at(opened, end - 1, 1) != b"\n":
        missing -= 1  # the last line is not ended yet
    while position > 0:
        size = min(_BLOCK_BYTES, position)
        position -= size
        block = _at(opened, position, size)
        found = block.count(b"\n")
        if found >= missing:
            newline = len(block)
            for _ in range(missing):
                newline = block.rindex(b"\n", 0, newline)
            return position + newline + 1
        missing -= found
    return 0


def _at(opened: BinaryIO, position: int, size: int) -> bytes:
    opened.seek(position)
    return opened.read(size)


def _follow(files: Sequence[Path], ends: list[int], sink: BinaryIO, *, is_over: Callable[[], bool]) -> None:
    """Write what is added to the files until the run is over."""
    last_shown = len(files) - 1
    next_question_s = 0.0
    while True:
        over = False
        if time.monotonic() >= next_question_s:
            over = is_over()  # asked before the last look, so that nothing written before the end is missed
            next_question_s = time.monotonic() + _ASK_EVERY_S
        for index, file in enumerate(files):
            added = _added(file, ends[index])
            if added:
                if index != last_shown:
                    sink.write(f"\n==> {file} <==\n".encode())
                    last_shown = index
                sink.write(added)
                sink.flush()
                ends[index] += len(added)
        if over:
            return
        time.sleep(_LOOK_EVERY_S)


def _added(file: Path, end: int) -> bytes:
    """What a file has beyond `end`. It is opened anew: a network file system looks only then."""
    with open(file, "rb") as opened:
        opened.seek(end)
        return opened.read()


def _is_alive(run_dir: Path, submission: Submission | None) -> bool:
    """Whether more output may come; a controller that does not answer for a while is no end."""
    if submission is None:
        return is_running(RunFolder(run_dir))
    try:
        return live_job(submission) is not None
    except slurm.SlurmError:
        return True


def _live(submission: Submission | None) -> slurm.Job | None:
    try:
        return None if submission is None else live_job(submission)
    except slurm.SlurmError as error:
        raise UserError(f"scontrol: {error}", may_pass=True) from None
