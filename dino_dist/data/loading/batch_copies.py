"""From the ring to where a batch is used: a copy of its own, on the device or on the CPU.

On CUDA the ring is page-locked and copies run on a stream of their own, so that neither the CPU nor the step under way
waits for them; room in the ring is given back once its copy is done. On the CPU the memory of batches that nobody
holds any more is used again: fresh pages would cost more than the copy.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from dino_dist.data.loading.batch import Batch
from dino_dist.data.loading.ring import Bytes

_log = logging.getLogger(__name__)
_SPARE_BUFFERS = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Loan:
    """A batch as it comes from the decoding process, whose memory is to be given back."""

    batch: Batch
    in_ring: bool
    """Whether it lies there; else its memory is its own, and only what was reserved for it is given back."""
    release: Callable[[], None]
    """To be called once, when the batch is not needed any more."""


class BatchCopies(Protocol):
    """Copies batches out of the ring."""

    runs_aside: bool
    """Whether it is worth to copy the next step while one is under way."""

    def copy(self, loan: Loan) -> Batch:
        """A batch with memory of its own; the loan is released once it is not needed any more."""
        ...

    def hand_over(self, batches: list[Batch]) -> None:
        """Make the device's current work wait for these copies, and keep their memory until that is done."""
        ...

    def release_done(self, *, wait: bool) -> None:
        """Release what has been copied by now, or all of it after waiting."""
        ...

    def close(self) -> None:
        """After the last copy."""
        ...


def batch_copies(device: torch.device, memory: Bytes) -> BatchCopies:
    """For batches that lie in `memory` and are used on `device`."""
    return CudaCopies(device, memory) if device.type == "cuda" else HostCopies(device)


class HostCopies:
    """Copies on the CPU (or, at once, to any other device)."""

    runs_aside = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spare: list[Bytes] = []
        self._returned: deque[Bytes] = deque(maxlen=_SPARE_BUFFERS)
        """Appended to by whichever thread drops a batch, at any moment; all else is the loader's own."""

    def copy(self, loan: Loan) -> Batch:
        """See `BatchCopies`."""
        own = loan.batch
        if self._device.type != "cpu":
            own = own.to(self._device)
        elif loan.in_ring:
            pixels = torch.from_numpy(self._buffer(own.pixels.nbytes)).copy_(own.pixels)
            extra = {name: tensor.clone() for name, tensor in own.extra.items()}
            own = replace(own, pixels=pixels, extra=extra)
        loan.release()
        return own

    def hand_over(self, batches: list[Batch]) -> None:
        """Nothing to wait for."""

    def release_done(self, *, wait: bool) -> None:
        """Copies are released when they are made."""

    def close(self) -> None:
        """Nothing is held."""

    def _buffer(self, num_bytes: int) -> Bytes:
        """Memory that comes back to the spare buffers when the last tensor on it is gone."""
        while self._returned:
            self._spare.append(self._returned.popleft())
        self._spare = sorted(self._spare, key=len)[-_SPARE_BUFFERS:]
        fitting = [spare for spare in self._spare if len(spare) >= num_bytes]
        whole = min(fitting, key=len) if fitting else np.empty(num_bytes + num_bytes // 8, dtype=np.uint8)
        self._spare = [spare for spare in self._spare if spare is not whole]
        part = whole[:num_bytes]  # an array object of its own, which the tensor made of it keeps
        weakref.finalize(part, self._returned.append, whole).atexit = False
        return part


@dataclass(frozen=True)
class _UnderWay:
    done: torch.cuda.Event
    loan: Loan


class CudaCopies:
    """Copies to a GPU on a stream of their own."""

    runs_aside = True

    def __init__(self, device: torch.device, memory: Bytes) -> None:
        self._device = device
        self._memory = memory
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._under_way: deque[_UnderWay] = deque()
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            error = cudart.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)
        self._is_registered = bool(error == cudart.cudaError.success)
        if not self._is_registered:
            _log.warning(
                "the buffer of %.0f MiB could not be page-locked (%s): copies to the GPU take the time of the CPU",
                memory.nbytes / 2**20,
                cudart.cudaGetErrorString(error),
            )
            with suppress(RuntimeError):
                torch.zeros(1, device=device)  # else the error would be taken for that of the next kernel

    def copy(self, loan: Loan) -> Batch:
        """See `BatchCopies`."""
        with torch.cuda.stream(self._stream):
            own = loan.batch.to(self._device, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        self._under_way.append(_UnderWay(done, loan))
        return own

    def hand_over(self, batches: list[Batch]) -> None:
        """See `BatchCopies`."""
        user = torch.cuda.current_stream(self._device)
        user.wait_stream(self._stream)
        for batch in batches:
            for tensor in (batch.pixels, *batch.extra.values()):
                tensor.record_stream(user)  # made on the other stream, where its memory would be free at once

    def release_done(self, *, wait: bool) -> None:
        """See `BatchCopies`."""
        while self._under_way and (wait or self._under_way[0].done.query()):  # type: ignore[no-untyped-call]
            copied = self._under_way.popleft()
            copied.done.synchronize()
            copied.loan.release()

    def close(self) -> None:
        """Wait for the copies and give the memory back to the system's paging."""
        self._stream.synchronize()
        self._under_way.clear()
        if self._is_registered:
            self._is_registered = False
            with torch.cuda.device(self._device):
                torch.cuda.cudart().cudaHostUnregister(self._memory.ctypes.data)  # type: ignore[no-untyped-call]
