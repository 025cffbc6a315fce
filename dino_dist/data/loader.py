"""Batches in stream order, read and decoded ahead by worker processes; which processes read never shows in a batch.

Each step of a rank is one task: a worker reads the rank's slice of the step and hands back one flat byte buffer a
micro-batch. At most `num_workers * prefetch` steps are held ready, which bounds memory. Workers hold no state, so what
they prepared may be thrown away at any time.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_dist.data.order import Order, micro_slices, rank_slice
from dino_dist.data.stream import BadRecord, SampleReader
from dino_dist.data.worker_process import forkserver_context, settle_worker
from dino_dist.errors import UserError

Describe = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], dict[str, Tensor]]
"""(sample ids [n], epochs [n], sizes [n, 2]) -> named tensors; runs in the worker, so it must be picklable."""

_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The n images of one micro-batch of one rank."""

    pixels: Tensor
    """uint8 [total bytes]: RGB images [h, w, 3] one after the other."""
    sizes: Tensor
    """int64 [n, 2]: height and width in px. Stays on the CPU, where the augmenter needs it."""
    sample_ids: Tensor
    """int64 [n], on the CPU: the ids asked for (a stand-in for a bad sample carries the bad one's)."""
    epochs: Tensor
    """int64 [n], on the CPU."""
    labels: Tensor
    """int64 [n], on the CPU; negative where there is none."""
    step: int
    position: int
    """Of the first image in the stream: the number of samples consumed before it, by all ranks."""
    bad: tuple[BadRecord, ...] = ()
    decode_s: float = 0.0
    """Time the worker took to read and decode."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What `describe` said of the images, such as the augmentation parameters."""

    @property
    def num_images(self) -> int:
        """n."""
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        own = (self.pixels, self.sizes, self.sample_ids, self.epochs, self.labels)
        return sum(tensor.nbytes for tensor in (*own, *self.extra.values()))

    def pin(self) -> Batch:
        """The same with pixels and extras in page-locked memory, from which copies to a GPU need not wait."""
        extra = {name: tensor.pin_memory() for name, tensor in self.extra.items()}
        return replace(self, pixels=self.pixels.pin_memory(), extra=extra)

    def pin_memory(self) -> Batch:
        """The name under which DataLoader's pinning thread asks for `pin`."""
        return self.pin()

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """The same with pixels and extras on `device`; sizes, ids, epochs and labels stay on the CPU."""
        extra = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.extra.items()}
        return replace(self, pixels=self.pixels.to(device, non_blocking=non_blocking), extra=extra)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepReader:
    """A rank's micro-batches of any step: all that a worker needs, and a pure function of the step."""

    reader: SampleReader
    order: Order
    batch_size: int
    """Of all ranks together."""
    rank: int
    size: int
    accumulate: int
    describe: Describe | None

    def __post_init__(self) -> None:
        if self.batch_size // self.size < self.accumulate:
            raise UserError(
                f"train.batch_size={self.batch_size} gives some of {self.size} ranks fewer images a step than "
                f"train.accumulate={self.accumulate}; at least {self.size * self.accumulate} images are needed"
            )

    def read_step(self, step: int) -> list[Batch]:
        """`accumulate` batches, the rank's share of the positions [step * B, (step + 1) * B)."""
        start, stop = rank_slice(step * self.batch_size, (step + 1) * self.batch_size, self.rank, self.size)
        parts = micro_slices(stop - start, self.accumulate)
        return [self._read(step, start + first, start + last) for first, last in parts]

    def _read(self, step: int, start: int, stop: int) -> Batch:
        started_s = time.perf_counter()
        epochs, sample_ids = self.order.ids(start, stop)
        samples = [self.reader.read(sample_id) for sample_id in sample_ids.tolist()]
        sizes = np.array([sample.pixels.shape[:2] for sample in samples], dtype=np.int64)
        pixels = np.concatenate([sample.pixels.reshape(-1) for sample in samples])
        return Batch(
            pixels=torch.from_numpy(pixels),
            sizes=torch.from_numpy(sizes),
            sample_ids=torch.from_numpy(sample_ids),
            epochs=torch.from_numpy(epochs),
            labels=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
            step=step,
            position=start,
            bad=tuple(record for sample in samples for record in sample.bad),
            decode_s=time.perf_counter() - started_s,
            extra=self.describe(sample_ids, epochs, sizes) if self.describe is not None else {},
        )


def make_loader(
    reader: SampleReader,
    order: Order,
    *,
    batch_size: int,
    rank: int,
    size: int,
    accumulate: int = 1,
    start_step: int,
    stop_step: int,
    num_workers: int,
    prefetch: int = 2,
    pin: bool = False,
    describe: Describe | None = None,
) -> Generator[list[Batch], None, None]:
    """The rank's batches of the steps [start_step, stop_step), in order: one list of `accumulate` batches a step.

    `batch_size` is that of all ranks. Without workers the calling process decodes when asked. Each worker keeps
    `prefetch` steps ready. `close()`, or dropping the generator, ends its workers.
    `UserError`, here or while iterating, for a share too small to accumulate, unreadable shards or too little shared
    memory.
    """
    if reader.dataset.num_samples != order.samples_per_epoch:
        raise ValueError(f"the order has {order.samples_per_epoch} samples, the data set {reader.dataset.num_samples}")
    steps = StepReader(
        reader=reader,
        order=order,
        batch_size=batch_size,
        rank=rank,
        size=size,
        accumulate=accumulate,
        describe=describe,
    )
    if num_workers == 0:
        return _read_here(steps, start_step, stop_step, pin=pin)
    return _read_ahead(steps, range(start_step, stop_step), num_workers=num_workers, prefetch=prefetch, pin=pin)


def _read_here(steps: StepReader, start_step: int, stop_step: int, *, pin: bool) -> Generator[list[Batch], None, None]:
    for step in range(start_step, stop_step):
        batches = steps.read_step(step)
        yield [batch.pin() for batch in batches] if pin else batches


def _read_ahead(
    steps: StepReader, wanted: range, *, num_workers: int, prefetch: int, pin: bool
) -> Generator[list[Batch], None, None]:
    if not wanted:
        return
    loader: DataLoader[list[Batch] | _Refusal] = DataLoader(
        _StepDataset(steps),
        batch_size=None,
        sampler=wanted,
        num_workers=min(num_workers, len(wanted)),
        prefetch_factor=prefetch,
        pin_memory=pin,
        collate_fn=_as_it_is,
        worker_init_fn=settle_worker,
        multiprocessing_context=forkserver_context(),
        generator=torch.Generator(),  # DataLoader draws a seed: not from the process's own generator
    )
    for result in loader:
        if isinstance(result, _Refusal):
            raise UserError(result.message)
        yield result


@dataclass(frozen=True)
class _Refusal:
    """A `UserError` on its way from a worker: raised there, DataLoader would wrap a traceback into its one line."""

    message: str


class _StepDataset(Dataset[list[Batch] | _Refusal]):
    """dataset[step], for DataLoader."""

    def __init__(self, steps: StepReader) -> None:
        self._steps = steps

    def __getitem__(self, step: int) -> list[Batch] | _Refusal:
        try:
            batches = self._steps.read_step(step)
            _check_shared_memory(sum(batch.nbytes for batch in batches))
        except UserError as error:
            return _Refusal(str(error))
        return batches


def _check_shared_memory(needed_bytes: int) -> None:
    """Batches travel through /dev/shm: a full one kills the worker (SIGBUS) without a word, so look first."""
    if not os.path.ismount(_SHARED_MEMORY):
        return
    free_bytes = shutil.disk_usage(_SHARED_MEMORY).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"{_SHARED_MEMORY} has {free_bytes / 2**20:.0f} MiB free but a batch needs {needed_bytes / 2**20:.0f} MiB; "
            "enlarge it (--shm-size of a container), or lower data.num_workers or data.prefetch_steps"
        )


def _as_it_is(result: list[Batch] | _Refusal) -> list[Batch] | _Refusal:
    return result
