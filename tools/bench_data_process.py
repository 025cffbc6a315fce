"""One contender in a process of its own, measured between two marks: time, CPU time and memory of its process tree.

Imports, start-up and the first batches lie before the first mark. CPU time is user and system time of the process and
all its descendants, so that nobody hides work in a worker.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dino_dist.errors import UserError

Stream = Callable[[int], Generator[int, None, None]]
"""From a number of workers (0: all in this process) to the endless sizes of batches, each given when it is ready."""

_MIN_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class Round:
    """What happened between two marks."""

    images: int
    batches: int
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    """Largest resident memory of each process of the tree so far, summed; pages that they share count in each."""
    pss_bytes: int
    """Resident memory of the tree at the end of the round, each shared page counted once."""

    @property
    def images_per_s(self) -> float:
        """By the clock on the wall."""
        return self.images / self.wall_s

    @property
    def core_s_per_image(self) -> float:
        """User and system seconds of all cores together."""
        return self.cpu_s / self.images


@dataclass(frozen=True, kw_only=True)
class RoundOptions:
    """How a round is run."""

    num_workers: int
    warmup_batches: int
    min_s: float
    """A round ends with the first batch after this long, and two at least."""


class OperatorCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators that reach torch's dispatcher: on a GPU about the kernels launched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return func(*args, **(kwargs or {}))


class NotMeasured(Exception):
    """A contender cannot run here; the message says why."""


class Crashed(NotMeasured):
    """Its process failed; it has printed a traceback."""


class Contender:
    """A contender's process, seen from outside. Use it as a context; leaving it ends the process."""

    def __init__(self, open_stream: Callable[..., Stream], arguments: tuple[Any, ...], cores: list[int]) -> None:
        """`open_stream(*arguments)` is called in the new process, on `cores` alone; all of it must be picklable."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, open_stream, arguments, cores))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()

    def operators(self) -> int:
        """Operators of one batch, all made in one process. `NotMeasured` if the contender cannot run here."""
        count: int = self._ask(("count", None))
        return count

    def round(self, options: RoundOptions) -> Round:
        """Measure once. `NotMeasured` if the contender cannot run here."""
        measured: Round = self._ask(("round", options))
        return measured

    def _ask(self, request: tuple[Literal["count", "round"], RoundOptions | None]) -> Any:
        try:
            self._connection.send(request)
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self._process.join()
            raise Crashed(f"its process ended with code {self._process.exitcode}; see its traceback") from error
        if isinstance(answer, str):
            raise NotMeasured(answer)
        return answer


def measure_round(stream: Stream, options: RoundOptions) -> Round:
    """Run the stream from its start, pass over the first batches, and measure the next ones."""
    with contextlib.closing(stream(options.num_workers)) as batches:
        for _ in range(options.warmup_batches):
            next(batches)
        images = count = 0
        started_cpu_s, started_s = tree_cpu_s(), _now_s()
        while count < _MIN_BATCHES or time.perf_counter() - started_s < options.min_s:
            images += next(batches)
            count += 1
        wall_s, cpu_s = _now_s() - started_s, tree_cpu_s() - started_cpu_s
        return Round(
            images=images,
            batches=count,
            wall_s=wall_s,
            cpu_s=cpu_s,
            peak_rss_bytes=tree_memory_bytes("status", "VmHWM"),
            pss_bytes=tree_memory_bytes("smaps_rollup", "Pss"),
        )


def count_operators(stream: Stream) -> int:
    """Operators of the second batch without workers: the first may build constants."""
    with contextlib.closing(stream(0)) as batches:
        next(batches)
        with OperatorCount() as count:
            next(batches)
        operators: int = count.operators
    return operators


def tree_cpu_s() -> float:
    """User and system seconds that this process and its descendants, living and reaped, have used."""
    total_s = 0.0
    for process in _tree():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total_s += times.user + times.system + times.children_user + times.children_system
    return total_s


def tree_memory_bytes(file: str, field: str) -> int:
    """A field in kB of /proc/PID/`file`, summed over this process and its living descendants."""
    total_bytes = 0
    for process in _tree():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            lines = Path(f"/proc/{process.pid}/{file}").read_text().splitlines()
            sizes = [int(line.split()[1]) for line in lines if line.startswith(f"{field}:")]
            total_bytes += 1024 * sum(sizes)  # none in a process that has ended
    return total_bytes


def _tree() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _now_s() -> float:
    """After all that was asked of the device has been done."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()


def _serve(
    connection: Connection, open_stream: Callable[..., Stream], arguments: tuple[Any, ...], cores: list[int]
) -> None:
    """Answer until the other end is closed: a `Round`, a count, or a text that says why not."""
    os.sched_setaffinity(0, cores)  # before any thread or worker is started: they inherit it
    torch.set_num_threads(len(cores))
    torch.manual_seed(0)
    random.seed(0)
    try:
        stream: Stream | str = open_stream(*arguments)
    except UserError as error:
        stream = str(error)
    while True:
        try:
            kind, options = connection.recv()
        except EOFError:
            return
        connection.send(stream if isinstance(stream, str) else _answer(stream, kind, options))


def _answer(stream: Stream, kind: str, options: RoundOptions) -> Round | int | str:
    try:
        return count_operators(stream) if kind == "count" else measure_round(stream, options)
    except UserError as error:
        return str(error)
