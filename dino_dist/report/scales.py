"""Axes: where a value lies on one, and the round values that are marked on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_STEPS: Final = (1.0, 2.0, 2.5, 5.0, 10.0)
_TIME_STEPS_S: Final = (
    *(0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800),
    *(3600, 7200, 10800, 21600, 43200, 86400, 172800, 432000, 864000, 2592000),
)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From `low` to `high`, drawn from `start_px` to `end_px`."""

    low: float
    high: float
    start_px: float
    end_px: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies, in px; values beyond the axis lie at its ends."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = (self._scaled(max(value, self.low) if self.log else value) - low) / (high - low)
        return self.start_px + min(1.0, max(0.0, share)) * (self.end_px - self.start_px)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round values in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in _STEPS if factor * size >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12 - math.floor(math.log10(step))) for number in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten in [low, high], thinned; where they are few, 2 and 5 times them too."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = [10.0**power for power in range(first, last + 1)]
    inside = [value for value in decades if low <= value <= high]
    if len(inside) < 3:
        inside = [v for decade in decades for v in (decade, 2 * decade, 5 * decade) if low <= v <= high]
    if not inside:
        return ticks(low, high, most)
    every = math.ceil(len(inside) / most)
    return inside[::every]


def time_ticks(total_s: float, most: int = 9) -> list[float]:
    """Round times from 0 to `total_s`."""
    step = next((step for step in _TIME_STEPS_S if total_s / step <= most), total_s / most)
    return [number * step for number in range(math.floor(total_s / step + 1e-9) + 1)]


def value_axis(
    lows: Sequence[float], highs: Sequence[float], *, start_px: float, end_px: float, log: bool, from_zero: bool
) -> Axis:
    """An axis that holds all values with some air; it begins at 0 where asked, or where the values come near it."""
    low, high = min(lows), max(highs)
    if log:
        return Axis(low=low / 1.15, high=high * 1.15, start_px=start_px, end_px=end_px, log=True)
    if low >= 0 and (from_zero or low < 0.35 * high):
        low = 0.0
    air = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(low=low if low == 0 else low - air, high=high + air, start_px=start_px, end_px=end_px)
