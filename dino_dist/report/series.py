"""A curve of any length in bounded memory: neighbouring points share a bucket that keeps their mean and their range."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STEPS, _COUNT, _SUM, _LOW, _HIGH = range(5)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One bucket of a curve: of a short curve, one row."""

    step: float
    """Mean of its rows'."""
    mean: float
    low: float
    high: float


class Series:
    """What one key of the rows held over the steps.

    The steps are cut into intervals of equal width, which doubles whenever more than `capacity` of them hold a point,
    so a long curve keeps between half of `capacity` and all of it, evenly over the run.
    """

    def __init__(self, capacity: int = 360) -> None:
        self._capacity = capacity
        self._width = 1.0
        self._table: NDArray[np.float64] = np.empty((0, 5))
        self.num_rows = 0
        self.last: float | None = None
        """The value of the highest step."""
        self.last_step = -1.0
        self.highest: float | None = None
        self.highest_step = 0.0
        self.lowest: float | None = None

    def extend(self, steps: NDArray[np.float64], values: NDArray[np.float64]) -> None:
        """More finite values, [N] each. Steps may come in any order."""
        if not len(steps):
            return
        self._remember(steps, values)
        fresh = np.stack([steps, np.ones_like(steps), values, values, values], axis=1)
        self._table = self._merged(np.concatenate([self._table, fresh]))

    def points(self) -> list[Point]:
        """The curve, by rising step."""
        columns = self._table.T
        return [
            Point(step=float(steps / n), mean=float(total / n), low=float(low), high=float(high))
            for steps, n, total, low, high in zip(*columns.tolist(), strict=True)
        ]

    def _remember(self, steps: NDArray[np.float64], values: NDArray[np.float64]) -> None:
        self.num_rows += len(steps)
        latest = len(steps) - 1 - int(np.argmax(steps[::-1]))
        if steps[latest] >= self.last_step:
            self.last, self.last_step = float(values[latest]), float(steps[latest])
        top = int(np.argmax(values))
        if self.highest is None or values[top] > self.highest:
            self.highest, self.highest_step = float(values[top]), float(steps[top])
        low = float(values.min())
        self.lowest = low if self.lowest is None else min(self.lowest, low)

    def _merged(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        middles = table[:, _STEPS] / table[:, _COUNT]
        order = np.argsort(middles, kind="stable")
        table, middles = table[order], middles[order]
        while True:
            keys = np.floor(middles / self._width)
            starts = np.flatnonzero(np.diff(keys, prepend=-1.0))
            if len(starts) <= self._capacity:
                break
            self._width *= 2
        merged = np.empty((len(starts), 5))
        for column in (_STEPS, _COUNT, _SUM):
            merged[:, column] = np.add.reduceat(table[:, column], starts)
        merged[:, _LOW] = np.minimum.reduceat(table[:, _LOW], starts)
        merged[:, _HIGH] = np.maximum.reduceat(table[:, _HIGH], starts)
        return merged
