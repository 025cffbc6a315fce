"""How evenly the prototypes are used, over the run: a histogram on a logarithmic axis, the last one filled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from dino_dist.report.event_files import Histogram
from dino_dist.report.markup import Markup, element, join
from dino_dist.report.scales import Axis, ticks
from dino_dist.report.wording import TIMES, count, number, percent

_LOW, _HIGH = -3.0, 3.0
"""Powers of ten of a fair share: from a thousandth to a thousand times."""
_BINS_PER_DECADE: Final = 6
_WIDTH, _HEIGHT = 400, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 392, 22, 284
_LIVE: Final = 0.01
"""A prototype with less than this of a fair share counts as dead (`dino_dist.health`)."""


def binned(histogram: Histogram) -> list[float]:
    """Counts in equal steps of log10(usage), from `_LOW` to `_HIGH`; what lies beyond is in the outermost bins.

    A count spreads over the bins that its interval of usage covers, in proportion.
    """
    number_of_bins = round((_HIGH - _LOW) * _BINS_PER_DECADE)
    counts = [0.0] * number_of_bins
    below = histogram.low
    for limit, amount in zip(histogram.limits, histogram.counts, strict=False):
        low, high = max(below, histogram.low), min(limit, histogram.high)
        below = limit
        if amount > 0 and math.isfinite(amount):
            _spread(counts, _place(low), _place(high), amount)
    return counts


def _place(usage: float) -> float:
    """Where a usage lies, in bins."""
    power = math.log10(usage) if usage > 0 else _LOW
    return (min(_HIGH, max(_LOW, power)) - _LOW) * _BINS_PER_DECADE


def _spread(counts: list[float], low: float, high: float, amount: float) -> None:
    first, last = min(int(low), len(counts) - 1), min(int(high), len(counts) - 1)
    if high <= low or first == last:
        counts[first] += amount
        return
    for place in range(first, last + 1):
        covered = min(high, place + 1) - max(low, place)
        counts[place] += amount * max(0.0, covered) / (high - low)


def usage_chart(histograms: Sequence[Histogram]) -> Markup:
    """The histograms, one at least, by rising step."""
    tables = [binned(histogram) for histogram in histograms]
    used = [place for table in tables for place, amount in enumerate(table) if amount > 0] or [0]
    # A decade around a fair share at least, whole decades, and no empty ones at the ends.
    low = min(_LOW + min(used) // _BINS_PER_DECADE, -1.0)
    high = max(_LOW + max(used) // _BINS_PER_DECADE + 1, 1.0)
    x = Axis(low=10**low, high=10**high, start_px=_LEFT, end_px=_RIGHT, log=True)
    top = max(max(table) for table in tables) or 1.0
    y = Axis(low=0.0, high=top * 1.08, start_px=_BOTTOM, end_px=_TOP)
    steps = [f"{histogram.step:,}" for histogram in histograms]
    return element(
        "svg",
        _grid(x, y, low, high),
        _bars(tables[-1], x, y),
        join(
            _outline(table, x, y, age=len(tables) - 1 - number)
            for number, table in enumerate(tables[:-1])
            if len(tables) - 1 - number <= 3
        ),
        _marks(x),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"Number of prototypes by usage, at the steps {', '.join(steps)}",
        class_="chart",
    )


def _grid(x: Axis, y: Axis, low: float, high: float) -> Markup:
    parts = []
    for value in ticks(0.0, y.high, most=4):
        at = f"{y.place(value):.1f}"
        parts.append(element("line", x1=_LEFT, x2=_RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(element("text", count(value), x=_LEFT - 7, y=at, dy="0.32em", class_="tick y"))
    for power in range(round(low), round(high) + 1):
        at = f"{x.place(10.0**power):.1f}"
        parts.append(element("text", f"{number(10.0**power)}{TIMES}", x=at, y=_BOTTOM + 16, class_="tick x"))
    parts.append(element("line", x1=_LEFT, x2=_RIGHT, y1=_BOTTOM, y2=_BOTTOM, class_="base"))
    parts.append(
        element(
            "text", "share of the assignments, in fair shares", x=(_LEFT + _RIGHT) / 2, y=_BOTTOM + 36, class_="tick x"
        )
    )
    return join(parts)


def _bars(table: Sequence[float], x: Axis, y: Axis) -> Markup:
    total = sum(table) or 1.0
    bars = []
    for place, amount in enumerate(table):
        low, high = (10 ** (_LOW + (place + shift) / _BINS_PER_DECADE) for shift in (0, 1))
        left, right = x.place(low), x.place(high)
        if amount <= 0 or right - left < 1:
            continue
        words = f"{number(low)}{TIMES} to {number(high)}{TIMES}: {amount:,.0f} prototypes, {percent(amount / total)}"
        bars.append(
            element(
                "g",
                element(
                    "rect", x=f"{left:.1f}", y=_TOP, width=f"{right - left:.1f}", height=_BOTTOM - _TOP, class_="hit"
                ),
                element(
                    "rect",
                    x=f"{left + 1:.1f}",
                    y=f"{y.place(amount):.1f}",
                    width=f"{right - left - 2:.1f}",
                    height=f"{_BOTTOM - y.place(amount):.1f}",
                    rx=2,
                    class_="bar h1",
                ),
                element("text", words, x=_RIGHT, y=13),
                class_="strip",
            )
        )
    return join(bars)


def _outline(table: Sequence[float], x: Axis, y: Axis, *, age: int) -> Markup:
    """A staircase; the older the fainter."""
    points = []
    for place, amount in enumerate(table):
        for shift in (0, 1):
            usage = 10 ** (_LOW + (place + shift) / _BINS_PER_DECADE)
            if x.low * 0.99 <= usage <= x.high * 1.01:
                points.append(f"{x.place(usage):.1f} {y.place(amount):.1f}")
    return element("path", d=f"M{'L'.join(points)}", class_=f"curve h2 age{age}")


def _marks(x: Axis) -> Markup:
    parts = []
    for usage, words in ((1.0, "fair share"), (_LIVE, "dead below")):
        if x.low < usage < x.high:
            at = f"{x.place(usage):.1f}"
            parts.append(element("line", x1=at, x2=at, y1=_TOP, y2=_BOTTOM, class_="reference"))
            parts.append(element("text", words, x=f"{x.place(usage) + 5:.1f}", y=_TOP + 9, class_="tick"))
    return join(parts)
