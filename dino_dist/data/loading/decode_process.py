"""The process beside a rank that reads and decodes ahead: threads that fill the ring, in stream order.

A micro-batch takes two rounds of its threads. The first reads its files and their headers, after which the sizes are
known and room is reserved; the second decodes every image to its place. While the images of one are decoded, the files
of the next are read, so that no thread waits for the slowest of a batch. A full ring holds everything up; a
micro-batch that is larger than the ring waits until all of it is free, and then travels beside it.
"""

from __future__ import annotations

import os
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from queue import Queue

import numpy as np
import torch
from numpy.typing import NDArray

from dino_dist.data.loading.ring import Bytes, Region, RingClosed, RingSpace, aligned, mapped
from dino_dist.data.loading.rounds import Round, Rounds, finish
from dino_dist.data.loading.shard_hints import ShardHints
from dino_dist.data.loading.worker_process import settle_worker
from dino_dist.data.order.order import StreamIds
from dino_dist.data.order.step_plan import Describe, StepPlan
from dino_dist.data.reading.decode import Pixels
from dino_dist.data.reading.stream import BadRecord, OpenedSample, SampleReader
from dino_dist.data.stores.store_options import StoreCounts
from dino_dist.errors import UserError

_DECODED_AHEAD = 2
"""Micro-batches that wait for the threads, with their files in memory."""

Extras = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """A micro-batch that is ready: what the rank is told of it."""

    step: int
    start: int
    """Of its region in the ring, which is the rank's until it says this number."""
    needed_bytes: int
    """What it takes of the ring; more than all of it for one that travels beside it."""
    ids: StreamIds
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    bad: tuple[BadRecord, ...]
    store: StoreCounts
    pixel_bytes: int
    extras: dict[str, tuple[int, tuple[int, ...], str]]
    """Where each lies from the start on, its shape and NumPy type."""
    loose: tuple[Bytes, Extras] | None
    """Pixels and extras, where a stand-in's size is not the promised one, or the ring is too small for them: they lie
    here, not in the region."""


@dataclass(frozen=True)
class Refused:
    """A `UserError` on its way to the rank, and the end."""

    error: UserError


@dataclass(frozen=True)
class Crashed:
    """A defect: the traceback of the thread that found it, and the end."""

    traceback: str


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeJob:
    """All that the process needs to know; picklable."""

    reader: SampleReader
    plan: StepPlan
    describe: Describe | None
    start_step: int
    stop_step: int
    num_threads: int


@dataclass(kw_only=True, eq=False)
class _Work:
    """One micro-batch between its ids and its being ready."""

    number: int
    """Counts the micro-batches."""
    step: int
    ids: StreamIds
    opened: list[OpenedSample | None]
    labels: NDArray[np.int64]
    bad: list[tuple[BadRecord, ...]]
    reading: Round = field(default_factory=list)
    decoding: Round = field(default_factory=list)
    sizes: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    starts: list[int] = field(default_factory=list)
    """Of each image in the pixels, and their end."""
    extras: Extras = field(default_factory=dict)
    needed_bytes: int = 0
    region: Region = field(default_factory=lambda: Region(0, 0))
    pixels: Bytes = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    """In the region, or memory of their own if that is too small."""
    displaced: dict[int, Pixels] = field(default_factory=dict)
    """Stand-ins that do not fit the place of the image that turned out bad."""


class DecodeProcess:
    """Its threads: this one listens to the rank, one plans, one sends, and `num_threads` read and decode."""

    def __init__(self, job: DecodeJob, memory: Bytes, connection: Connection) -> None:
        self._job = job
        self._memory = memory
        self._connection = connection
        self._space = RingSpace(len(memory))
        self._lent: dict[int, Region] = {}
        self._is_ending = False
        self._sending = threading.Lock()
        self._rounds = Rounds(job.num_threads)
        self._hints = ShardHints(job.reader, job.plan)
        self._placed: Queue[_Work | Refused | None] = Queue(maxsize=_DECODED_AHEAD)

    def run(self) -> None:
        """Serve until the rank closes the connection."""
        for target in (self._plan, self._send):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()
        while True:
            try:
                start = self._connection.recv()
            except (EOFError, ConnectionError):
                break
            self._space.release(self._lent.pop(start))
        self._is_ending = True
        self._space.close()
        self._rounds.close()
        self._job.reader.close()

    def crash(self, failed: threading.ExceptHookArgs) -> None:
        """End everything, as a thread must not fail without a word to the rank."""
        if self._is_ending:  # it was cut off in its work
            return
        text = "".join(traceback.format_exception(failed.exc_type, failed.exc_value, failed.exc_traceback))
        with suppress(ConnectionError):
            self._tell(Crashed(text))
        os._exit(1)

    def _plan(self) -> None:
        before: _Work | None = None
        numbers = count()
        for step in range(self._job.start_step, self._job.stop_step):
            self._hints.before(step)
            for ids in self._job.plan.micro_batches(step):
                work = self._start_reading(next(numbers), step, ids)
                if before is not None and not self._place(before):
                    return
                before = work
        if before is not None and self._place(before):
            self._placed.put(None)

    def _start_reading(self, number: int, step: int, ids: StreamIds) -> _Work:
        num_images = len(ids.sample_ids)
        work = _Work(
            number=number,
            step=step,
            ids=ids,
            opened=[None] * num_images,
            labels=np.empty(num_images, dtype=np.int64),
            bad=[()] * num_images,
        )
        sample_ids: list[int] = ids.sample_ids.tolist()

        def read(index: int) -> None:
            work.opened[index] = self._job.reader.open(sample_ids[index])

        work.reading = self._rounds.start(number, read, num_images)
        return work

    def _place(self, work: _Work) -> bool:
        """Once its files are read, give it room and start decoding; False if that is the end."""
        try:
            finish(work.reading)
            if self._rounds.come_after_an_error(work.number):  # which is sent, and is the end
                return False
            self._reserve(work)
        except UserError as error:
            self._placed.put(Refused(error))
            return False
        except RingClosed:
            return False

        def decode(index: int) -> None:
            opened = work.opened[index]
            assert opened is not None, "read before"
            work.opened[index] = None
            height, width = work.sizes[index].tolist()
            place = work.pixels[work.starts[index] : work.starts[index + 1]].reshape(height, width, 3)
            sample = self._job.reader.decode_into(opened, place)
            if sample.pixels is not place:
                work.displaced[index] = sample.pixels
            work.labels[index] = sample.label
            work.bad[index] = sample.bad

        work.decoding = self._rounds.start(work.number, decode, len(work.opened))
        self._placed.put(work)
        return True

    def _reserve(self, work: _Work) -> None:
        sizes = [(opened.image.height, opened.image.width) for opened in work.opened if opened is not None]
        work.sizes = np.array(sizes, dtype=np.int64)
        work.starts = [0, *np.cumsum(work.sizes.prod(axis=1) * 3).tolist()]
        work.extras = self._described(work.ids, work.sizes)
        needed = work.starts[-1]
        for array in work.extras.values():
            needed = aligned(needed) + array.nbytes
        work.needed_bytes = needed
        capacity = self._space.capacity
        work.region = self._space.reserve(min(needed, capacity))  # all of it: no two such are under way at once
        self._lent[work.region.start] = work.region
        num_pixel_bytes = work.starts[-1]
        if needed <= capacity:
            work.pixels = self._memory[work.region.start :][:num_pixel_bytes]
        else:
            work.pixels = np.empty(num_pixel_bytes, dtype=np.uint8)

    def _described(self, ids: StreamIds, sizes: NDArray[np.int64]) -> Extras:
        if self._job.describe is None:
            return {}
        return {name: tensor.contiguous().numpy() for name, tensor in self._job.describe(ids, sizes).items()}

    def _send(self) -> None:
        while self._send_next():
            pass

    def _send_next(self) -> bool:
        """False if that was the last. Holds a micro-batch no longer than this: its memory may be its own."""
        work = self._placed.get()
        if work is None:
            return False
        message: Placed | Refused
        try:
            message = work if isinstance(work, Refused) else self._ready(work)
        except UserError as error:
            message = Refused(error)
        try:
            self._tell(message)
        except ConnectionError:
            return False  # the rank is gone, which ends this process by other means
        return isinstance(message, Placed)

    def _tell(self, message: Placed | Refused | Crashed) -> None:
        with self._sending:
            self._connection.send(message)

    def _ready(self, work: _Work) -> Placed:
        finish(work.decoding)
        loose = None
        if work.displaced:
            loose = self._rebuilt(work)
        elif work.needed_bytes > self._space.capacity:
            loose = work.pixels, work.extras
        extras, at = {}, work.starts[-1]
        for name, array in work.extras.items():
            at = aligned(at)
            extras[name] = at, array.shape, array.dtype.str
            if loose is None:
                place = self._memory[work.region.start + at :][: array.nbytes]
                place[...] = array.reshape(-1).view(np.uint8)
            at += array.nbytes
        return Placed(
            step=work.step,
            start=work.region.start,
            needed_bytes=work.needed_bytes,
            ids=work.ids,
            sizes=work.sizes,
            labels=work.labels,
            bad=tuple(record for records in work.bad for record in records),
            store=self._job.reader.store_counts(),
            pixel_bytes=work.starts[-1],
            extras=extras,
            loose=loose,
        )

    def _rebuilt(self, work: _Work) -> tuple[Bytes, Extras]:
        """The micro-batch with its displaced images, and with the sizes that it has now."""
        parts = [
            work.displaced[index].reshape(-1) if index in work.displaced else work.pixels[start:stop]
            for index, (start, stop) in enumerate(zip(work.starts, work.starts[1:], strict=False))
        ]
        for index, pixels in work.displaced.items():
            work.sizes[index] = pixels.shape[:2]
        return np.concatenate(parts), self._described(work.ids, work.sizes)


def serve(job: DecodeJob, connection: Connection) -> None:
    """The process's main function; it ends when the rank closes the connection, or with the rank."""
    settle_worker()
    torch.set_num_threads(1)
    memory_fd = recv_handle(connection)
    memory = mapped(memory_fd)
    os.close(memory_fd)
    process = DecodeProcess(job, memory, connection)
    threading.excepthook = process.crash
    process.run()
    os._exit(0)  # other threads may wait for what will not come
