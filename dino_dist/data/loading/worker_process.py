"""How data workers live: started from a clean process, deaf to the job's signals, and never longer than their rank.

A scheduler signals every process of a job. The rank then finishes its step and saves, for which it needs its workers:
so these do not react. Their life is tied to the rank's instead, so that none is left when it is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import TypeVar

from dino_dist.errors import RunFailed

T = TypeVar("T")
R = TypeVar("R")

_JOB_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2})
_PRELOADED = ("dino_dist.data.loading.decode_process",)


def forkserver_context() -> ForkServerContext:
    """A context whose workers are forked from a server that has no threads, no GPU and no signal handlers.

    The server starts with the job's signals blocked, and it and its workers stay so: if it died, the workers would.
    Blocking in this process lasts only while it starts; a signal that comes meanwhile is delivered afterwards.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))  # imported once, not once a worker
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    try:
        resource_tracker.ensure_running()
        # Starting the tracker unblocks some of them.
        signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def settle_worker() -> None:
    """Obey nobody's signals but the rank's, and end with it; to be called first in a worker."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)  # threads inherit it, and the watch below takes them
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        for watch, name in ((_end_with, "life"), (_end_when_told_by, "signals")):
            threading.Thread(target=watch, args=(parent,), name=f"data-worker-{name}", daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    """The parent here is the rank, not the server; no polling, since its end closes a pipe."""
    parent.join()
    os._exit(1)  # from a thread, and with nobody left to tell


def _end_when_told_by(parent: BaseProcess) -> None:
    """A process that exits, even by an exception, terminates its workers and waits for them: that must work."""
    while True:
        received = signal.sigwaitinfo(_JOB_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent.pid:
            os._exit(0)


def map_in_processes(function: Callable[[T], R], items: Sequence[T], *, num_workers: int) -> Iterator[R]:
    """function(item) of each item in order, by `num_workers` processes; in this one if there is but one.

    Both must be picklable. An exception ends all work and is raised here; `RunFailed` if a process was killed.
    """
    if num_workers <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    workers = min(num_workers, len(items))
    pool = ProcessPoolExecutor(workers, mp_context=forkserver_context(), initializer=settle_worker)
    try:
        yield from pool.map(function, items)
    except BrokenProcessPool as error:
        raise RunFailed(
            f"one of {workers} worker processes was killed: by the kernel, if the memory of the machine or of the job "
            f"ran out; give the same command again, with fewer --workers if so"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
