"""What the report's charts are drawn from: points of a curve, ticks, bins, events; and numbers and times as words."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dino_dist.report.event_files import Histogram, spread
from dino_dist.report.scales import log_ticks, ticks, time_ticks
from dino_dist.report.series import Series
from dino_dist.report.usage_chart import binned
from dino_dist.report.wording import count, number, percent, seconds_of, shortened, span


def test_a_long_curve_keeps_its_mean_and_its_range(rng: random.Random) -> None:
    generator = np.random.default_rng(rng.randrange(10**6))
    steps, values = np.arange(1, 200_001) * 10.0, generator.normal(size=200_000)
    values[123_456] = 50.0
    curve = Series(capacity=300)
    order = generator.permutation(len(steps))
    for part in np.array_split(order, 37):
        curve.extend(steps[part], values[part])
    points = curve.points()
    assert 150 <= len(points) <= 300
    assert max(point.high for point in points) == 50.0
    assert min(point.low for point in points) == values.min()
    assert [point.step for point in points] == sorted(point.step for point in points)
    widths = np.diff([point.step for point in points])[1:-1]
    assert widths.max() < 2.1 * widths.min(), "evenly over the run"
    assert (curve.last, curve.last_step) == (values[-1], steps[-1])
    assert (curve.highest, curve.highest_step) == (50.0, steps[123_456])
    assert curve.num_rows == 200_000
    window = (steps > points[9].step - widths[0] / 2) & (steps <= points[9].step + widths[0] / 2)
    assert points[9].mean == pytest.approx(values[window].mean(), abs=0.02)


def test_a_short_curve_stays_as_it_is() -> None:
    curve = Series()
    curve.extend(np.array([10.0, 20.0, 35.0]), np.array([1.0, -2.0, 3.0]))
    assert [(p.step, p.mean, p.low, p.high) for p in curve.points()] == [(10, 1, 1, 1), (20, -2, -2, -2), (35, 3, 3, 3)]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (4.8, 7.1), (-3.0, 1e6), (0.9931, 0.9999), (1e-7, 3e-7)])
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low <= value <= high for value in found)
    assert len({f"{value:.6g}" for value in found}) == len(found)


def test_logarithmic_and_time_ticks() -> None:
    assert log_ticks(0.001, 100.0) == [0.001, 0.01, 0.1, 1.0, 10.0, 100.0]
    assert log_ticks(0.2, 4.0) == [0.2, 0.5, 1.0, 2.0]
    assert log_ticks(0.70, 0.76), "no power of ten near"
    assert len(log_ticks(1e-12, 1e12)) <= 7
    assert time_ticks(3600.0) == [0, 600, 1200, 1800, 2400, 3000, 3600]
    assert len(time_ticks(1e9)) <= 11


def test_usage_is_binned_without_losing_a_prototype() -> None:
    histogram = Histogram(
        step=1, limits=(0.0, 1e-12, 0.5, 1.5, 2000.0), counts=(3.0, 0.0, 10.0, 20.0, 1.0), low=-1.0, high=1500.0
    )
    bins = binned(histogram)
    assert sum(bins) == pytest.approx(34.0)
    assert bins[0] >= 3.0, "prototypes without any share"
    middle = len(bins) // 2
    assert sum(bins[middle - 2 : middle + 2]) == pytest.approx(20.0, abs=3.0), "around a fair share"


def test_events_are_spread_over_the_run() -> None:
    class Event:
        def __init__(self, step: int) -> None:
            self.step = step

    shown = spread([Event(step) for step in [*range(0, 100, 5), 95]])
    assert [each.step for each in shown] == [0, 20, 40, 55, 75, 95]


def test_numbers_and_times_as_words() -> None:
    assert [number(x) for x in (0, 5.0497, 1024, 1.1450149e-5, 23456.7, 0.99)] == [
        *("0", "5.05", "1,024", "1.145e-5", "23,457", "0.99")
    ]
    assert [count(x) for x in (1437, 44_800, 128_000, 1_281_167, 10.2e9)] == [
        "1,437",
        "44,800",
        "128 k",
        "1.28 M",
        "10.2 G",
    ]
    assert [percent(x) for x in (0, 0.0012, 0.81666, 0.9951, 1)] == ["0.0%", "0.12%", "81.7%", "99.51%", "100.0%"]
    assert [span(x) for x in (0.3785, 8.26, 59.6, 727, 7500, 273600)] == [
        *("0.38 s", "8.3 s", "1 min 00 s", "12 min 07 s", "2 h 05 min", "3 d 04 h")
    ]
    assert seconds_of("2026-11-22T11:33:46+00:00") == seconds_of("2026-11-22T11:33:46") == 1795347226.0
    assert [seconds_of(text) for text in ("", None, "yesterday", "0001-01-01T00:00:00+14:00")] == [None] * 4
    assert shortened("x" * 20, 10) == "x" * 9 + "…"
