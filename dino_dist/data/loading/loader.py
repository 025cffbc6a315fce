"""Batches in stream order, read and decoded ahead by a process beside the rank; who reads never shows in a batch.

`num_workers` threads of that process fill a ring of `buffer_bytes` with whole micro-batches and wait while it is full.
Batches are copies on the device and own their memory. The process holds no state that matters: what it prepared may be
thrown away at any time. What went wrong ahead of time is raised when its step is asked for, and not before.
"""

from __future__ import annotations

import logging
import os
import signal
from collections import deque
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from math import ceil
from multiprocessing.reduction import send_handle

import numpy as np
import torch

from dino_dist.data.loading.batch import Batch
from dino_dist.data.loading.batch_copies import Loan, batch_copies
from dino_dist.data.loading.decode_process import Crashed, DecodeJob, Placed, Refused, serve
from dino_dist.data.loading.ring import Bytes, mapped, shared_memory
from dino_dist.data.loading.shard_hints import ShardHints
from dino_dist.data.loading.worker_process import forkserver_context
from dino_dist.data.order.order import SampleOrder, StreamIds
from dino_dist.data.order.step_plan import Describe, StepPlan
from dino_dist.data.reading.stream import SampleReader
from dino_dist.errors import RunFailed

__all__ = ["Batch", "Describe", "make_loader", "read_batch"]

_log = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_CRASH_SIGNALS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGSYS})
_END_S = 5.0
"""How long the decoding process may take to close its files before it is told to end at once."""


def make_loader(
    *,
    reader: SampleReader,
    order: SampleOrder,
    batch_size: int,
    rank: int,
    size: int,
    accumulate: int = 1,
    start_step: int,
    stop_step: int,
    num_workers: int,
    buffer_bytes: int,
    device: torch.device = _CPU,
    describe: Describe | None = None,
) -> Generator[list[Batch], None, None]:
    """The rank's batches of the steps [start_step, stop_step), in order: one list of `accumulate` batches a step.

    `batch_size` is that of all ranks; pixels and extras are on `device`, and a batch is the caller's for good. Without
    workers the calling process decodes when asked, and `buffer_bytes` is not used. On CUDA the next step is copied
    while one is computed. A micro-batch that is larger than the buffer passes beside it, alone and slower, which is
    logged once. `close()`, or dropping the generator, ends its process.
    `UserError`, here or while iterating, for a share too small to accumulate, unreadable shards, or a buffer that the
    memory does not hold; `RunFailed` if the process was killed.
    """
    plan = StepPlan(order=order, batch_size=batch_size, rank=rank, size=size, accumulate=accumulate)
    job = DecodeJob(
        reader=reader,
        plan=plan,
        describe=describe,
        start_step=start_step,
        stop_step=stop_step,
        num_threads=num_workers,
    )
    return _read_ahead(job, buffer_bytes, device) if num_workers else _read_here(job, device)


def read_batch(
    reader: SampleReader,
    ids: StreamIds,
    *,
    step: int = 0,
    describe: Describe | None = None,
    device: torch.device = _CPU,
) -> Batch:
    """One batch of these samples, read and decoded by the calling thread; errors as `make_loader`."""
    samples = [reader.read(sample_id) for sample_id in ids.sample_ids.tolist()]
    sizes = np.array([sample.pixels.shape[:2] for sample in samples], dtype=np.int64).reshape(-1, 2)
    pixels = np.concatenate([np.empty(0, dtype=np.uint8), *(sample.pixels.reshape(-1) for sample in samples)])
    return Batch(
        pixels=torch.from_numpy(pixels),
        sizes=torch.from_numpy(sizes),
        sample_ids=torch.tensor(ids.sample_ids),
        epochs=torch.tensor(ids.epochs),
        repeats=torch.tensor(ids.repeats),
        labels=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        step=step,
        bad=tuple(record for sample in samples for record in sample.bad),
        store=reader.store_counts(),
        extra=describe(ids, sizes) if describe is not None else {},
    ).to(device)


def _read_here(job: DecodeJob, device: torch.device) -> Generator[list[Batch], None, None]:
    hints = ShardHints(job.reader, job.plan)
    for step in range(job.start_step, job.stop_step):
        hints.before(step)
        parts = job.plan.micro_batches(step)
        yield [read_batch(job.reader, ids, step=step, describe=job.describe, device=device) for ids in parts]


def _read_ahead(job: DecodeJob, buffer_bytes: int, device: torch.device) -> Generator[list[Batch], None, None]:
    accumulate = job.plan.accumulate
    left = max(0, job.stop_step - job.start_step) * accumulate
    if not left:
        return
    with closing(DataProcess(job, buffer_bytes)) as beside, closing(batch_copies(device, beside.memory)) as copies:
        ready: deque[Batch] = deque()

        def next_step() -> list[Batch]:
            copies.release_done(wait=False)
            while len(ready) < accumulate:
                if not beside.has_batch():
                    copies.release_done(wait=True)  # the process may be waiting for room
                ready.append(copies.copy(beside.receive()))
            batches = [ready.popleft() for _ in range(accumulate)]
            copies.hand_over(batches)
            while copies.runs_aside and len(ready) < min(left, accumulate) and beside.has_batch():
                ready.append(copies.copy(beside.receive()))
            return batches

        while left:
            left -= accumulate
            yield next_step()  # not held here: the caller decides how long its memory is in use


class DataProcess:
    """The decoding process as the rank sees it: whole micro-batches come, room goes back."""

    def __init__(self, job: DecodeJob, buffer_bytes: int) -> None:
        memory_fd = shared_memory(buffer_bytes)
        try:
            self.memory: Bytes = mapped(memory_fd)
            context = forkserver_context()
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(job, theirs), name="data", daemon=True)
            self._process.start()
            theirs.close()
            assert self._process.pid is not None, "it was started"
            with suppress(ConnectionError):  # it is dead already: said when a batch is asked for
                send_handle(self._connection, memory_fd, self._process.pid)
        finally:
            os.close(memory_fd)
        self._next: Placed | Refused | Crashed | _Ended | None = None
        """Taken from the connection already; all but the first are the end, and stay."""
        self._told_oversized = False

    def has_batch(self) -> bool:
        """Whether `receive` would return a micro-batch at once. Where it would raise, that is left to it."""
        if self._next is None and self._connection.poll():
            self._next = self._message()
        return isinstance(self._next, Placed)

    def receive(self) -> Loan:
        """The next micro-batch, after waiting for it; or raises why there is none."""
        message = self._next = self._next or self._message()
        if isinstance(message, _Ended):
            raise self._why_it_ended()
        if isinstance(message, Refused):
            raise message.error
        if isinstance(message, Crashed):
            raise RuntimeError(f"the process that reads and decodes images failed:\n{message.traceback}")
        self._next = None
        self._tell_if_oversized(message)
        return Loan(
            batch=self._batch(message), in_ring=message.loose is None, release=partial(self._release, message.start)
        )

    def close(self) -> None:
        """End the process, and wait until it has ended."""
        self._connection.close()
        self._process.join(_END_S)
        self._process.terminate()
        self._process.join()

    def _message(self) -> Placed | Refused | Crashed | _Ended:
        message: Placed | Refused | Crashed
        try:
            message = self._connection.recv()
        except (EOFError, OSError):  # between two messages, or within one
            return _Ended()
        return message

    def _tell_if_oversized(self, placed: Placed) -> None:
        if placed.needed_bytes > len(self.memory) and not self._told_oversized:
            self._told_oversized = True
            _log.warning(
                "step %d has a micro-batch of %d images that take %d MiB, more than data.buffer_mib=%g: such ones pass "
                "beside the buffer, one at a time and slower (said once); to avoid it raise data.buffer_mib",
                placed.step,
                len(placed.sizes),
                ceil(placed.needed_bytes / 2**20),
                len(self.memory) / 2**20,
            )

    def _batch(self, placed: Placed) -> Batch:
        if placed.loose is None:
            region = self.memory[placed.start :]
            pixels = region[: placed.pixel_bytes]
            extras = {
                name: np.ndarray(shape, dtype=dtype, buffer=region, offset=at)
                for name, (at, shape, dtype) in placed.extras.items()
            }
        else:
            pixels, extras = placed.loose
        return Batch(
            pixels=torch.from_numpy(pixels),
            sizes=torch.from_numpy(placed.sizes),
            sample_ids=torch.from_numpy(placed.ids.sample_ids),
            epochs=torch.from_numpy(placed.ids.epochs),
            repeats=torch.from_numpy(placed.ids.repeats),
            labels=torch.from_numpy(placed.labels),
            step=placed.step,
            bad=placed.bad,
            store=placed.store,
            extra={name: torch.from_numpy(array) for name, array in extras.items()},
        )

    def _release(self, start: int) -> None:
        with suppress(ConnectionError):  # it has ended: said when the next batch is asked for
            self._connection.send(start)

    def _why_it_ended(self) -> Exception:
        self._process.join(_END_S)
        code = self._process.exitcode
        what = f"the process that reads and decodes images (pid {self._process.pid})"
        if code is None or code >= 0:
            return RuntimeError(f"{what} ended with exit code {code}; see what it said")
        how = f"was killed by {_signal_name(-code)}"
        if -code == signal.SIGKILL:
            how += ": by the kernel, if the memory of the machine or of the job ran out (see data.buffer_mib)"
        elif -code in _CRASH_SIGNALS:
            how = f"crashed ({_signal_name(-code)}): a defect of a library or of this machine"
        return RunFailed(f"{what} {how}; the same command goes on from the last checkpoint")


@dataclass(frozen=True)
class _Ended:
    """Nothing more will come."""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"
