"""Memory that two processes share, and who may write where in it: whole batches one after the other, in a circle.

The memory has no name: it never shows in /dev/shm, does not count against its size, and goes with the last process that
has it, however that ends.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
import psutil
from numpy.typing import NDArray

from dino_dist.errors import UserError

Bytes = NDArray[np.uint8]

ALIGNMENT_BYTES = 64
"""Regions, and what is laid out in them, start at multiples of it: enough for any type of number."""


class RingClosed(Exception):
    """Nobody will read what would be written: give up."""


def aligned(num_bytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def shared_memory(num_bytes: int) -> int:
    """A descriptor of new memory, which takes no more than what was ever used of it, unless it is page-locked (as on
    CUDA), which takes all of it at once; the caller closes it.

    `UserError` if the machine has less that is free.
    """
    free_bytes = psutil.virtual_memory().available
    if num_bytes > free_bytes:  # the kernel would give what there is, and then end processes
        raise UserError(
            f"data.buffer_mib={num_bytes / 2**20:.0f}: this machine has {free_bytes / 2**20:.0f} MiB of free memory; "
            "lower it"
        )
    fd = os.memfd_create("dino-dist-batches", os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return fd


def mapped(fd: int) -> Bytes:
    """The memory behind a descriptor, mapped as long as the array or a view of it lives."""
    return np.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), dtype=np.uint8)


@dataclass(slots=True, eq=False)
class Region:
    """A reserved part of the ring."""

    start: int
    stop: int
    released: bool = False


class RingSpace:
    """Which parts of `capacity` bytes are in use; for several threads of the process that writes.

    Regions are contiguous, and given out in a circle. Space is free again once its region and all earlier ones are
    released.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._used: deque[Region] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def reserve(self, num_bytes: int) -> Region:
        """A region of that size, after waiting until there is one.

        `ValueError` if it is empty or larger than the ring, `RingClosed` once that is closed.
        """
        if not 0 < num_bytes <= self.capacity:
            raise ValueError(f"num_bytes={num_bytes} must be 1..{self.capacity}")
        with self._changed:
            while True:
                if self._closed:
                    raise RingClosed
                start = self._free_start(aligned(num_bytes))
                if start is not None:
                    region = Region(start, start + num_bytes)
                    self._used.append(region)
                    return region
                self._changed.wait()

    def release(self, region: Region) -> None:
        """Give a region back; in any order."""
        with self._changed:
            region.released = True
            while self._used and self._used[0].released:
                self._used.popleft()
            self._changed.notify_all()

    def close(self) -> None:
        """End all waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _free_start(self, num_bytes: int) -> int | None:
        if not self._used:
            return 0
        oldest, end = self._used[0].start, aligned(self._used[-1].stop)
        if self._used[-1].start >= oldest:  # free: from their end to the ring's, and before the oldest
            if end + num_bytes <= self.capacity:
                return end
            return 0 if num_bytes <= oldest else None
        return end if end + num_bytes <= oldest else None
