"""Who holds a run folder: the owner of an attempt, the signs that it lives, and the lock between processes."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

_MISSED_BEATS = 2
_LOCK_PATIENCE_S = 10.0
_NO_LOCKS_HERE = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
_SAME_START_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who made an attempt: the content of `attempts/000001.json`."""

    number: int
    host: str
    pid_namespace: str
    """Pids compare only within one namespace: two containers may share a host name."""
    pid: int
    process_started: float
    """Seconds since the epoch, by the clock of `host`."""
    job_id: str | None
    restarts: int | None
    heartbeat_s: float
    time: str

    @staticmethod
    def of_this_process(number: int, *, job_id: str | None, restarts: int | None, heartbeat_s: float) -> Owner:
        """This process as the owner of attempt `number`."""
        return Owner(
            number=number,
            host=socket.gethostname(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            process_started=psutil.Process().create_time(),
            job_id=job_id,
            restarts=restarts,
            heartbeat_s=heartbeat_s,
            time=utc_now(),
        )


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive flock on `path`, if one can be had.

    It is the second wall, after the exclusive number: a stopped holder must not stop the run for ever, so after
    `_LOCK_PATIENCE_S` we go on without it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        held = _try_lock(descriptor)
        try:
            yield
        finally:
            if held:
                # Closing is not enough: a process forked meanwhile holds a copy of the descriptor.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        except OSError as error:
            if error.errno in _NO_LOCKS_HERE:
                return False
            raise


def is_live(file: Path, theirs: Owner | None, mine: Owner) -> bool:
    """Whether the owner of the attempt in `file` still runs, as far as `mine` can see.

    On our host the process table tells. Elsewhere, or if the process table is unclear (a reused pid, a clock that was
    set, an owner file torn by a kill), its heartbeat does: this takes up to two of its intervals.
    """
    if theirs is None:
        return _heartbeat_moves(file, mine.heartbeat_s)
    if _is_requeue_of(theirs, mine):
        return False
    if (theirs.host, theirs.pid_namespace) == (mine.host, mine.pid_namespace):
        running = _process_runs(theirs.pid, theirs.process_started)
        if running is not None:
            return running
    return _heartbeat_moves(file, theirs.heartbeat_s)


def _is_requeue_of(theirs: Owner, mine: Owner) -> bool:
    """Slurm restarts a job only after its earlier run is over, whatever a node that it lost still does."""
    if theirs.job_id is None or theirs.job_id != mine.job_id:
        return False
    if theirs.restarts is not None and mine.restarts is not None:
        return mine.restarts > theirs.restarts
    return theirs.host != mine.host


def _process_runs(pid: int, started: float) -> bool | None:
    """True: runs; False: gone; None: a process has that pid, but another start time (reuse, or the clock was set)."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return True if abs(process.create_time() - started) < _SAME_START_S else None
    except psutil.NoSuchProcess:
        return False


def _heartbeat_moves(file: Path, interval_s: float) -> bool:
    """Watch for two intervals. Modification times are compared with each other only: hosts' clocks differ."""
    first = _modified_ns(file)
    deadline = time.monotonic() + _MISSED_BEATS * interval_s
    while time.monotonic() < deadline:
        time.sleep(interval_s / 10)
        if _modified_ns(file) != first:
            return True
    return False


def _modified_ns(file: Path) -> int:
    # Opened, since NFS answers a bare stat from its cache for up to a minute but asks the server at an open.
    with open(file, "rb") as opened:
        return os.fstat(opened.fileno()).st_mtime_ns


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def utc_now() -> str:
    """Now, as an ISO 8601 text in UTC with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
