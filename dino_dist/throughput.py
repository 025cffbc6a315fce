"""Where the wall time between two log rows went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ThroughputMeter:
    """Images a second, seconds a step and the share of the wall time spent waiting for data, between two reads.

    Evaluations and blocking saves run inside `paused()` and do not count. The clock is an argument for the tests' sake.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._restart()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the call that takes the next batch from the loader."""
        start_s = self._clock()
        try:
            yield
        finally:
            self._waited_s += self._clock() - start_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training."""
        start_s = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - start_s

    def step_done(self, *, images: int) -> None:
        """One more step over `images` images (of all ranks, for the throughput of the run)."""
        self._steps += 1
        self._images += images

    @property
    def mean_step_s(self) -> float:
        """Seconds a step since the last read, without what was paused; 0 before the first step."""
        return (self._clock() - self._start_s - self._paused_s) / self._steps if self._steps else 0.0

    def read(self) -> dict[str, float]:
        """`images_per_s`, `step_s`, `data_wait` (0 to 1) since the last read; an empty dict if there was no step."""
        wall_s = self._clock() - self._start_s - self._paused_s
        steps, images, waited_s = self._steps, self._images, self._waited_s
        self._restart()
        if not steps or wall_s <= 0.0:
            return {}
        return {"images_per_s": images / wall_s, "step_s": wall_s / steps, "data_wait": waited_s / wall_s}

    def _restart(self) -> None:
        self._start_s = self._clock()
        self._waited_s = self._paused_s = 0.0
        self._steps = self._images = 0
